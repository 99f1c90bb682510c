"""A recurrent language model of bytes in integers: int8 weights and activations, integer normalisation and loss.

Numbers are int8 in units of 1/16, from -127 to 127, and sums int32. With clip(v) into that range and v >> k = floor of
(v + 2^(k-1)) / 2^k, that is, v / 2^k rounded:

    linear(x)    clip((256 x W^T + (x B) A^T) >> 8 + 4 + log2(I) / 2)     I inputs: the variance of x is kept
    norm(x, w)   clip(x w [2^16 / mean |x|] >> 16)                        a table has the inverses
    gate         f = 127 + clip(linear(n) + linear(h) + b)                n = norm(x), f from 0 to 254
    state        c = clip(linear(n) + linear(f h >> 8) + b),  h = h + (f (c - h) >> 8),  x = clip(x + h)
    MLP          x = clip(x + linear(max(0, linear(norm(x)))))
    loss         log2 sum_v 2^(l_v / 16) - l / 16 of the next byte        in units of 1/256 bit, from two tables

x begins as a row of an embedding and l is linear(norm(x)). Noise of a member is rank 1, A and B int8 with standard
deviation 16, so that a weight's perturbation +-(A B^T / 256) has a deviation of 1, in units of a weight 1/16. That of a
vector is +-(A >> 4).

This file computes with torch, and defines every number: `native` has the same in C++, equal to the bit.

Shapes: M member, T byte of a text, D width, H width inside the MLP, O outputs, I inputs, V value of a row of noise.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from eggroll_llm.es.noise import Shape
from eggroll_llm.kernels.noise import RowLayout

WIDTH, INNER, BYTES = 64, 256, 256
ONE = 16
"""The integer that stands for 1."""
SHAPES: tuple[Shape, ...] = (
    ("embed", BYTES, WIDTH),
    ("norm", WIDTH, 0),
    ("forget_x", WIDTH, WIDTH),
    ("forget_h", WIDTH, WIDTH),
    ("forget_b", WIDTH, 0),
    ("new_x", WIDTH, WIDTH),
    ("new_h", WIDTH, WIDTH),
    ("new_b", WIDTH, 0),
    ("mlp_norm", WIDTH, 0),
    ("up", INNER, WIDTH),
    ("down", WIDTH, INNER),
    ("last_norm", WIDTH, 0),
    ("head", BYTES, WIDTH),
)
"""Parameters in the order in which C++ takes them."""
LAYOUT = RowLayout(SHAPES, 1)
PARAMETERS = sum(out * max(1, inside) for _, out, inside in SHAPES)

EXP2 = torch.tensor([round(2 ** (v % 16 / 16) * 128) << v // 16 for v in range(256)], dtype=torch.int32)
"""128 times 2^(v / 16); the sum of 256 fits into 32 bits without sign."""
LOG2 = torch.tensor([round(math.log2(1 + v / 256) * 256) for v in range(256)], dtype=torch.int32)
INVERSE = torch.tensor([65536 // max(1, v) for v in range(128)], dtype=torch.int32)

Weights = Mapping[str, Tensor]
"""int8 by name, matrices [O, I] and vectors [O]."""


def initial_weights(seed: int) -> dict[str, Tensor]:
    """Return weights to train from scratch: matrices of deviation 1, norms 1, biases 0."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, out, inside in SHAPES:
        if inside:
            normal = torch.randn(out, inside, generator=generator)
            weights[name] = (normal * ONE).round().clamp(-127, 127).to(torch.int8)
        else:
            weights[name] = torch.full((out,), ONE if name.endswith("norm") else 0, dtype=torch.int8)
    return weights


def forward_with_torch(weights: Weights, text_MT: Tensor, state_MD: Tensor, rows_KV: Tensor | None) -> Tensor:
    """Return the loss of each member on its text, int64 [M] in units of 1/256 bit, and leave the state after it.

    `text_MT` is uint8: all bytes but the first are predicted. Members 2k and 2k + 1 are twins with the noise of row k,
    int8; without rows all have the weights themselves.
    """
    noise = _Noise(rows_KV, len(text_MT))
    vector_MD = {name: noise.vector(name, weights[name]) for name, _, inside in SHAPES if not inside}
    text_MT, loss_M = text_MT.int(), torch.zeros(len(text_MT), dtype=torch.int64)
    h_MD = state_MD.int()

    def linear(name: str, x_MI: Tensor) -> Tensor:
        return noise.linear(name, weights[name], x_MI)

    def norm(name: str, x_MD: Tensor) -> Tensor:
        inverse_M = INVERSE[x_MD.abs().sum(1) // WIDTH]
        return _clip(_shifted(x_MD * vector_MD[name] * inverse_M[:, None], 16))

    for byte_M, next_M in zip(text_MT.T, text_MT.T[1:], strict=False):
        x_MD = noise.embedding(weights["embed"], byte_M)
        n_MD = norm("norm", x_MD)
        f_MD = 127 + _clip(linear("forget_x", n_MD) + linear("forget_h", h_MD) + vector_MD["forget_b"])
        gated_MD = _shifted(f_MD * h_MD, 8)
        new_MD = _clip(linear("new_x", n_MD) + linear("new_h", gated_MD) + vector_MD["new_b"])
        h_MD = h_MD + _shifted(f_MD * (new_MD - h_MD), 8)
        x_MD = _clip(x_MD + h_MD)
        x_MD = _clip(x_MD + linear("down", linear("up", norm("mlp_norm", x_MD)).clamp(min=0)))
        loss_M += _loss(linear("head", norm("last_norm", x_MD)), next_M)
    state_MD.copy_(h_MD)
    return loss_M


def _shifted(v: Tensor, bits: int) -> Tensor:
    return (v + (1 << bits - 1)) >> bits


def _clip(v: Tensor) -> Tensor:
    return v.clamp(-127, 127)


def _loss(logits_MO: Tensor, byte_M: Tensor) -> Tensor:
    up_MO = logits_MO + 128
    sum_M = EXP2[up_MO].sum(1)  # int64
    whole_M = (sum_M[:, None] >> torch.arange(1, 33)).clamp(max=1).sum(1)  # its bits but the first
    fraction_M = (sum_M << (31 - whole_M)) >> 23 & 255
    return (whole_M - 7) * 256 + LOG2[fraction_M] - up_MO.gather(1, byte_M[:, None].long())[:, 0] * 16


class _Noise:
    """The noise of members, or none."""

    def __init__(self, rows_KV: Tensor | None, members: int) -> None:
        member_M = torch.arange(members)
        self._sign_M1 = (1 - 2 * (member_M % 2)).int()[:, None]
        self._factors = {} if rows_KV is None else LAYOUT.factors(rows_KV[member_M // 2].int())

    def vector(self, name: str, weight_D: Tensor) -> Tensor:
        if not self._factors:
            return weight_D.int()
        return _clip(weight_D + self._sign_M1 * _shifted(self._factors[name][0][:, :, 0], 4))

    def embedding(self, weight_OI: Tensor, byte_M: Tensor) -> Tensor:
        x_MD = weight_OI[byte_M].int()
        if not self._factors:
            return x_MD
        A_MOR, B_MIR = self._factors["embed"]
        scale_M1 = self._sign_M1 * A_MOR[:, :, 0].gather(1, byte_M[:, None].long())
        return _clip(x_MD + _shifted(scale_M1 * B_MIR[:, :, 0], 8))

    def linear(self, name: str, weight_OI: Tensor, x_MI: Tensor) -> Tensor:
        sum_MO = 256 * (x_MI @ weight_OI.int().T)
        if self._factors:
            A_MOR, B_MIR = self._factors[name]
            sum_MO += self._sign_M1 * (x_MI * B_MIR[:, :, 0]).sum(1, dtype=torch.int32)[:, None] * A_MOR[:, :, 0]
        return _clip(_shifted(sum_MO, 12 + (x_MI.shape[1].bit_length() - 1) // 2))
