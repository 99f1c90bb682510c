"""The factors of many pairs and parameters on the GPU, to the bits of `eggroll_llm/es/noise.py`, which defines them.

A program makes a few blocks of one (parameter, pair), Philox4x32-10 and Box-Muller, and rounds them into a row of
memory, as A [R, O] and B [R, I]. Contraction of a * b + c is switched off: every float32 operation rounds on its own.

Shapes: K pair, N parameter, S row, V value of a row, R rank, O out features, I in features.
"""

import math
from collections.abc import Mapping

import numpy as np
import triton
import triton.language as tl
from torch import Tensor

from eggroll_llm.es.noise import NoiseSpec, Size, block_ranges
from eggroll_llm.kernels.rounding import rounded

BLOCKS = 512
"""Blocks of four values that a program makes."""


@triton.jit
def _polynomial(x, table, first: tl.constexpr, size: tl.constexpr):
    value = x * tl.load(table + first + size - 1)
    for j in tl.static_range(size - 2, 0, -1):
        value = (value + tl.load(table + first + j)) * x
    return value + tl.load(table + first)


@triton.jit
def _box_muller(radius_word, angle_word, table):
    uniform = (radius_word & 0x7FFFFFFF).to(tl.int32).to(tl.float32) + 1.0
    bits = uniform.to(tl.int32, bitcast=True) - 0x3F3504F3 - (31 << 23)
    exponent = (bits >> 23).to(tl.float32)
    z = ((bits & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    square = _polynomial(z, table, 0, 8) * z + exponent * tl.load(table + 18)
    magnitude = tl.sqrt_rn(square).to(tl.uint32, bitcast=True)
    radius = (magnitude | (radius_word & 0x80000000)).to(tl.float32, bitcast=True)
    x = angle_word.to(tl.int32, bitcast=True).to(tl.float32) * 4.656612873077393e-10  # 2^-31
    y = x * x
    return _polynomial(y, table, 13, 5) * radius, _polynomial(y, table, 8, 5) * x * radius


# One variant for the usual sizes and any number of pairs, so that none is compiled in the middle of a step.
@triton.jit(
    do_not_specialize=["pairs", "scale", "step", "seed_low", "seed_high", "first_block", "first_A", "first_B"],
    do_not_specialize_on_alignment=["row_K", "negative_K", "pair_K", "id_N", "at_A_N", "at_B_N"],
)
def _place(
    rows_SV, width, row_K, negative_K, pair_K, id_N, at_A_N, at_B_N, pairs, scale, step, seed_low, seed_high, table,
    out, inside, first_block, first_A, first_B, R: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    k, n = tl.program_id(0) % pairs, tl.program_id(0) // pairs
    first_block += tl.program_id(1) * BLOCKS
    block = first_block + tl.arange(0, BLOCKS)
    zero = tl.zeros([BLOCKS], tl.uint32)
    seed = (seed_high.to(tl.uint64) << 32) | seed_low.to(tl.uint32).to(tl.uint64)
    w0, w1, w2, w3 = tl.philox(
        seed, zero + step.to(tl.uint32), zero + tl.load(pair_K + k).to(tl.uint32),
        zero + tl.load(id_N + n).to(tl.uint32), block.to(tl.uint32),
    )  # fmt: skip
    v0, v1 = _box_muller(w0, w1, table)
    v2, v3 = _box_muller(w2, w3, table)
    value = tl.interleave(tl.interleave(v0, v2), tl.interleave(v1, v3))
    v = first_block * 4 + tl.arange(0, 4 * BLOCKS)
    row = rows_SV + tl.load(row_K + k) * width
    a, b = v - first_A, v - first_B
    sign = tl.where(tl.load(negative_K + k) != 0, -1.0, 1.0)
    to_A = tl.load(at_A_N + n) + (a % R) * out + a // R
    tl.store(row + to_A, rounded(value * scale * sign, rows_SV.dtype.element_ty), mask=(a >= 0) & (a < out * R))
    to_B = tl.load(at_B_N + n) + (b % R) * inside + b // R
    tl.store(row + to_B, rounded(value, rows_SV.dtype.element_ty), mask=(b >= 0) & (b < inside * R))


def place_triton(
    rows_SV: Tensor,
    where_3K: Tensor,
    noise: NoiseSpec,
    sizes: Mapping[Size, tuple[Tensor, Tensor, Tensor]],
    tables: Tensor,
) -> None:
    """Compute `noise.place` of checked arguments: row, pair and whether A is negated, int64 [3, K].

    `sizes` are, by size, the parameters' noise ids and where their A and B begin in a row, int64 [N]; `tables` are the
    digits of the definition, float32.
    """
    if rows_SV.is_cuda:  # without waiting for the GPU
        where_3K = where_3K.pin_memory().to(rows_SV.device, non_blocking=True)
    (row, pair, negative), pairs = where_3K, where_3K.shape[1]
    seed_low, seed_high = np.array([noise.seed], "<u8").view("<i4").tolist()  # of one type, whatever the seed
    for size, (ids, at_A, at_B) in sizes.items():
        out, inside, first_A, first_B = size
        for blocks in block_ranges(size, noise.rank):
            _place[len(ids) * pairs, triton.cdiv(len(blocks), BLOCKS)](
                rows_SV, rows_SV.stride(0), row, negative, pair, ids, at_A, at_B, pairs,
                noise.sigma / math.sqrt(noise.rank), noise.step, seed_low, seed_high, tables, out, inside,
                blocks.start, first_A * noise.rank, first_B * noise.rank, noise.rank, BLOCKS, enable_fp_fusion=False,
            )  # fmt: skip
