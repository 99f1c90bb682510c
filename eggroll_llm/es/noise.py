"""The only source of evolution-strategy randomness: (seed, step, pair, parameter) -> A, B.

A member of the population replaces each linear weight W (out x in) by

    W + sign * sigma * E,    E = A B^T / sqrt(r),    A (out x r) and B (in x r) i.i.d. standard normal.

Nothing is stored or sent. A and B are a pure function of a counter: Philox4x32-10 with the run seed as key
and (step, pair, parameter id, block) as counter gives four 32-bit words w0..w3 per block, and Box-Muller
makes them four normals: the values 0 and 1 of the block from w0 and w1, 2 and 3 from w2 and w3.

Layout. The normals of one (pair, parameter) are one stream, value 4 * block + i being the i-th of its block:
first A in row-major order [O, R], then B in row-major order [I, R]. So no value depends on chunking, on the
order of pairs, or on the other members or parameters of the same call.

A vector of O values, such as a bias, has an A and no B: its E is the sum of the columns of A over sqrt(r), standard
normal whatever the rank.

Twins (antithetic members 2p and 2p + 1) share A and B; a member's sign is applied to A later, which is exact.

Bits. Words come from integer arithmetic. Box-Muller uses only float32 multiplications and additions, each
rounded on its own, and polynomials (relative error below 4e-7). The square root is taken in float64, whose
error is too small to change the float32 it is rounded to. Library logarithms and sines differ from one
processor to another, and float32 `torch.sqrt` on CPU is not correctly rounded; these do not depend on either,
so that engines on different hardware agree on the noise.

Departure from the paper: A carries sigma / sqrt(r), so that A and B are each rounded once to the dtype that
the engine computes in. Evaluation and update call `served_factors_of`, that is, use the same rounded numbers.

Sources: EGGROLL, arXiv 2511.16652; Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

Shapes: K pair (member when not antithetic), N parameter, V value of a stream, W word of a block, O out
features, I in features, R rank.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PHILOX_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
PHILOX_KEY_INCREMENT = (0x9E3779B9, 0xBB67AE85)
PHILOX_ROUNDS = 10
WORD = 0xFFFFFFFF

SQRT_HALF_BITS = 0x3F3504F3
MANTISSA_BITS = 23
MANTISSA = (1 << MANTISSA_BITS) - 1
SIGN = -(1 << 31)

# Minimax fits, lowest power first: -2 ln(1 + z) / z for z from sqrt(1/2) - 1 to sqrt(2) - 1; with y = x^2
# from 0 to 1, sin(pi x / 2) / x and cos(pi x / 2). In the bits of all noise: a change of one digit is another
# run.
MINUS_TWO_LOG = (
    *(-1.9999999, 1.0000073, -0.6667012, 0.49939817),
    *(-0.3980033, 0.3450166, -0.32445157, 0.20213781),
)
SINE = (1.5707964, -0.6459638, 0.07968993, -0.0046741576, 0.00015167853)
COSINE = (0.99999994, -1.2336982, 0.25365075, -0.020810628, 0.00085819064)

# Blocks worked on at a time: temporaries stay in the cache, and on a GPU a kernel outweighs its launch.
TILE_BLOCKS_PER_CPU_THREAD = 1 << 16
TILE_BLOCKS_GPU = 1 << 22

KEPT_BYTES = 512 << 20  # factors of a step that an engine keeps, rather than make them again, at most

Shape = tuple[str, int, int]
"""Name, out features and in features of a parameter; 0 in features make it a vector."""

Offset = tuple[int, int]
"""Rows of a stream [O + I, R] where the rows of A and of B begin that are wanted: (0, O) where all are.

A device that has some rows or columns of a parameter makes the same part of its factors, and no more."""
Size = tuple[int, int, int, int]
"""Out features, in features and offset."""


@dataclass(frozen=True, kw_only=True)
class NoiseSpec:
    """All that noise depends on besides pair and parameter. Raises ValueError on values out of range."""

    seed: int
    """Seed of the run, 0 to 2^64 - 1: the key of the generator."""
    step: int
    """Step that the noise belongs to (when noise is reused, the step that it was first used in)."""
    rank: int
    """Columns of A and B."""
    sigma: float
    """Standard deviation of a weight's perturbation."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed = {self.seed}: must be from 0 to 2^64 - 1")
        if not 0 <= self.step <= WORD:
            raise ValueError(f"step = {self.step}: must be from 0 to 2^32 - 1")
        if self.rank < 1:
            raise ValueError(f"rank = {self.rank}: must be at least 1")
        if not (math.isfinite(self.sigma) and self.sigma > 0):
            raise ValueError(f"sigma = {self.sigma}: must be positive and finite")


def parameter_id(name: str) -> int:
    """Return the 32-bit id of a Hugging Face parameter name: its four-byte BLAKE2b, read as little-endian."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little")


def shape_of(name: str, size: Sequence[int]) -> Shape:
    """Return a parameter, a matrix or a vector of this size, as the generator takes it."""
    return (name, size[0], size[1] if len(size) == 2 else 0)


def check_parameter_ids(names: Iterable[str]) -> None:
    """Raise ValueError when two different names share an id, which would give them the same noise."""
    owner: dict[int, str] = {}
    for name in names:
        other = owner.setdefault(parameter_id(name), name)
        if other != name:
            raise ValueError(f"parameters {other!r} and {name!r} have the same noise id; rename one of them")


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Return four int64 tensors whose low 32 bits are the Philox4x32-10 words; the high bits are arbitrary.

    The counter words are int64 tensors with values below 2^32 that broadcast. Words that are equal along a
    dimension are best given with size 1 in it: the first rounds are then computed once for all. Products
    overflow int64, but only into the sign: bits 0-31 and, after a shift and a mask, 32-63 are those of the
    unsigned product.
    """
    c0, c1, c2, c3 = counter
    key0, key1 = key
    for _ in range(PHILOX_ROUNDS):
        product0 = c0 * PHILOX_MULTIPLIER[0]
        product2 = c2 * PHILOX_MULTIPLIER[1]
        c0 = ((product2 >> 32) ^ c1).bitwise_xor_(key0).bitwise_and_(WORD)
        c2 = ((product0 >> 32) ^ c3).bitwise_xor_(key1).bitwise_and_(WORD)
        c1, c3 = product2, product0
        key0 = (key0 + PHILOX_KEY_INCREMENT[0]) & WORD
        key1 = (key1 + PHILOX_KEY_INCREMENT[1]) & WORD
    return c0, c1, c2, c3


def _polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """Horner's rule, one rounding per operation (a fused multiply-add would differ between devices)."""
    value = x * coefficients[-1]
    for coefficient in coefficients[-2:0:-1]:
        value.add_(coefficient).mul_(x)
    return value.add_(coefficients[0])


def box_muller(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    """Return two float32 standard normals per pair of int32 words.

    u = (low 31 bits of the first word + 1) / 2^31, in (0, 1] and rounded to float32, gives the radius sqrt(-2
    ln u), up to 6.56. The second word gives an angle on half a circle (over 2^31, times pi/2), the first
    word's top bit picks the half.
    """
    # With u = m 2^e and m in [sqrt(1/2), sqrt(2)): -2 ln u = -2 e ln 2 - 2 ln m. Exponent and mantissa are
    # read off the bits of 2^31 u, the 31 being taken out of the exponent.
    uniform = (radius_word & 0x7FFFFFFF).to(torch.float32).add_(1.0)
    bits = uniform.view(torch.int32).sub_(SQRT_HALF_BITS + (31 << MANTISSA_BITS))
    exponent = bits >> MANTISSA_BITS
    z = bits.bitwise_and_(MANTISSA).add_(SQRT_HALF_BITS).view(torch.float32).sub_(1.0)
    square = _polynomial(z, MINUS_TWO_LOG).mul_(z).add_(exponent.to(torch.float32).mul_(-2 * math.log(2)))
    radius = square.to(torch.float64).sqrt_().to(torch.float32)
    radius.view(torch.int32).bitwise_or_(radius_word & SIGN)

    x = angle_word.to(torch.float32).mul_(2.0**-31)
    y = x * x
    return _polynomial(y, COSINE).mul_(radius), _polynomial(y, SINE).mul_(x).mul_(radius)


def _normals(noise: NoiseSpec, pairs_K: Tensor, ids_N: Tensor, first_block: int, blocks: int) -> Tensor:
    """Return the normals [N, K, V = 4 * blocks] of a range of blocks."""
    device = pairs_K.device
    step = torch.tensor([noise.step], dtype=torch.int64, device=device)
    block = torch.arange(first_block, first_block + blocks, dtype=torch.int64, device=device)
    key = (noise.seed & WORD, noise.seed >> 32)
    words = philox4x32((step, pairs_K[None, :, None], ids_N[:, None, None], block), key)
    shape = (len(ids_N), len(pairs_K), blocks)
    words_WNKV = torch.empty((4, *shape), dtype=torch.int32, device=device)
    for i, word in enumerate(words):
        words_WNKV[i] = word
    cosines, sines = box_muller(words_WNKV[0::2], words_WNKV[1::2])
    values = torch.empty((*shape, 2, 2), dtype=torch.float32, device=device)
    values[..., 0] = cosines.movedim(0, -1)
    values[..., 1] = sines.movedim(0, -1)
    return values.view(*shape[:2], 4 * blocks)


def _tiles(parameters: int, pairs: int, blocks: int, tile: int) -> Iterator[tuple[slice, slice, slice]]:
    """Cut [N, K, blocks] into pieces of about `tile` blocks, along the last dimensions last."""
    step_N = max(1, tile // (pairs * blocks))
    step_K = max(1, min(pairs, tile // blocks))
    step_V = min(blocks, tile)
    for n in range(0, parameters, step_N):
        for k in range(0, pairs, step_K):
            for v in range(0, blocks, step_V):
                yield slice(n, n + step_N), slice(k, k + step_K), slice(v, min(v + step_V, blocks))


def block_ranges(size: Size, rank: int) -> list[range]:
    """Return the blocks of a stream that hold A and B: one range where B follows A, else two."""
    out, inside, at_A, at_B = size
    rows = [(at_A, at_B + inside)] if at_B == at_A + out else [(at_A, at_A + out), (at_B, at_B + inside)]
    return [range(first * rank // 4, -(-end * rank // 4)) for first, end in rows]


def _factors(
    noise: NoiseSpec, pairs_K: Tensor, names: Sequence[str], size: Size, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return scale * A [N, K, O, R] and B [N, K, I, R] of parameters of one size, rounded to `dtype`."""
    device, pairs, (out, inside, *offset) = pairs_K.device, len(pairs_K), size
    ids_N = torch.tensor([parameter_id(name) for name in names], dtype=torch.int64, device=device)
    factors_NKV = [
        torch.empty((len(names), pairs, rows * noise.rank), dtype=dtype, device=device) for rows in (out, inside)
    ]
    tile = TILE_BLOCKS_GPU if device.type != "cpu" else TILE_BLOCKS_PER_CPU_THREAD * torch.get_num_threads()
    for blocks in block_ranges(size, noise.rank):
        for n, k, v in _tiles(len(names), pairs, len(blocks), tile):
            first = blocks.start + v.start
            values = _normals(noise, pairs_K[k], ids_N[n], first, v.stop - v.start)
            for to_NKV, row, factor in zip(factors_NKV, offset, (scale, 1.0), strict=True):
                begin = row * noise.rank
                start, stop = max(begin, 4 * first), min(begin + to_NKV.shape[2], 4 * (blocks.start + v.stop))
                if start < stop:
                    part = values[..., start - 4 * first : stop - 4 * first]
                    to_NKV[n, k, start - begin : stop - begin] = part if factor == 1.0 else part.mul_(factor)
    A_NKV, B_NKV = factors_NKV
    return A_NKV.unflatten(2, (out, noise.rank)), B_NKV.unflatten(2, (inside, noise.rank))


def served_factors(
    noise: NoiseSpec,
    pairs_K: Tensor,
    name: str,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> tuple[Tensor, Tensor]:
    """Return A_KOR = round(sigma / sqrt(r) * A) and B_KIR = round(B) in `dtype`: sigma * E_k = A_k B_k^T.

    Sampling and update both use these. `pairs_K` is an int64 tensor of pair numbers below 2^32, in any order.
    """
    return served_factors_of(noise, pairs_K, [(name, out_features, in_features)], dtype, device)[name]


def served_factors_of(
    noise: NoiseSpec,
    pairs_K: Tensor,
    shapes: Sequence[Shape],
    dtype: torch.dtype,
    device: torch.device | str,
    offsets: Sequence[Offset] = (),
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return `served_factors` of many parameters (name, out features, in features) by name, in one pass.

    With `offsets`, one for each, out and in features are those of a part, and so are the rows of A and B. The values
    are those of the calls one at a time, but parameters of equal size are computed together: several times faster for
    small ones.
    """
    pairs_K = pairs_K.to(device=device, dtype=torch.int64)
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for size, names in names_by_size(shapes, offsets).items():
        A_NKOR, B_NKIR = _factors(noise, pairs_K, names, size, noise.sigma / math.sqrt(noise.rank), dtype)
        factors |= {name: (A_NKOR[n], B_NKIR[n]) for n, name in enumerate(names)}
    return factors


def names_by_size(shapes: Sequence[Shape], offsets: Sequence[Offset]) -> dict[Size, list[str]]:
    """Group the names of parameters by out features, in features and offset, none meaning all rows."""
    names_of: dict[Size, list[str]] = {}
    for i, (name, out, inside) in enumerate(shapes):
        names_of.setdefault((out, inside, *(offsets[i] if offsets else (0, out))), []).append(name)
    return names_of
