"""The member term in Triton: `shrink` makes h = B^T x, `expand` adds A h to y, two launches a layer.

The rank is not padded, and the grid has no slots or slices in it: a program has one token, so that all programs have
work, and ends at once for a token of the base model. Sizes of blocks depend on the layer and never on the batch, so a
row's bits do not depend on what else is in the batch. Next to a norm or an activation, `norms_triton` does `expand` or
`shrink` on its way.

Shapes: T token, S slot, C slice of a fused layer, R rank, O out features of all slices, I in features, V values of all
A of a slot. A token whose slot does not exist is left alone like one of the base model: a GPU cannot raise.
"""

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from eggroll_llm.kernels.rounding import rounded

TILE = 4096
"""Values of B in registers at a time: 32 for each of 128 threads."""
BLOCK_O = 1024


@triton.jit(do_not_specialize=["slots"])
def _shrink(
    h_TCR, x_TI, B_SCRI, slot_T, slots, x_stride, slot_B, INSIDE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    t, row = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    slot = tl.load(slot_T + t).to(tl.int64)
    if (slot < 0) | (slot >= slots):
        return
    total = tl.zeros([BLOCK_ROWS, BLOCK_I], tl.float32)
    for first in range(0, INSIDE, BLOCK_I):
        i = first + tl.arange(0, BLOCK_I)
        x = tl.load(x_TI + t * x_stride + i, mask=i < INSIDE, other=0.0).to(tl.float32)
        at = B_SCRI + slot * slot_B + row[:, None] * INSIDE + i[None, :]
        B = tl.load(at, mask=(row < ROWS)[:, None] & (i < INSIDE)[None, :], other=0.0).to(tl.float32)
        total += B * x[None, :]
    tl.store(h_TCR + t * ROWS + row, tl.sum(total, axis=1), mask=row < ROWS)


@triton.jit(do_not_specialize=["slots"])
def _expand(
    y_TO, h_TCR, A_SV, slot_T, ends_C, slots, y_stride, slot_A, OUT: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    t, o = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slot_T + t).to(tl.int64)
    if (slot < 0) | (slot >= slots):
        return
    begin, size, c = tl.zeros([BLOCK], tl.int32), tl.full([BLOCK], OUT, tl.int32), tl.zeros([BLOCK], tl.int32)
    if C > 1:
        before = 0
        for each in tl.static_range(C):
            end = tl.load(ends_C + each)
            inside = (o >= before) & (o < end)
            begin = tl.where(inside, before, begin)
            size = tl.where(inside, end - before, size)
            c = tl.where(inside, each, c)
            before = end
    mask = o < OUT
    y = tl.load(y_TO + t * y_stride + o, mask=mask, other=0.0).to(tl.float32)
    A_of_slice = A_SV + slot * slot_A + R * begin + (o - begin)
    for r in range(R):
        h = tl.load(h_TCR + (t * C + c) * R + r)
        y += h * tl.load(A_of_slice + r * size, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_TO + t * y_stride + o, rounded(y, y_TO.dtype.element_ty), mask=mask)


def shrink(x_TI: Tensor, B_SCRI: Tensor, slot_T: Tensor) -> Tensor:
    """Return h_TCR = B^T x, float32. Rows of tokens of the base model are not written."""
    tokens, inside = x_TI.shape
    slots, C, R, _ = B_SCRI.shape
    h_TCR = torch.empty((tokens, C, R), dtype=torch.float32, device=x_TI.device)
    if tokens:
        rows, block_I = _tile(C * R, inside)
        grid = (tokens, triton.cdiv(C * R, rows))
        _shrink[grid](
            h_TCR, x_TI, B_SCRI, slot_T, slots, x_TI.stride(0), B_SCRI.stride(0), inside, C * R, rows, block_I,
            enable_fp_fusion=True,
        )  # fmt: skip
    return h_TCR


def expand(y_TO: Tensor, h_TCR: Tensor, A_SV: Tensor, slot_T: Tensor, slices: Sequence[int]) -> None:
    """Add A h to the rows of `y_TO` that belong to members, in place."""
    (tokens, out), (_, C, R) = y_TO.shape, h_TCR.shape
    block = min(BLOCK_O, triton.next_power_of_2(out))
    if tokens:
        _expand[tokens, triton.cdiv(out, block)](
            y_TO, h_TCR, A_SV, slot_T, _ends(tuple(slices), y_TO.device), len(A_SV), y_TO.stride(0), A_SV.stride(0),
            out, C, R, block, enable_fp_fusion=True,
        )  # fmt: skip


def _tile(rows: int, inside: int) -> tuple[int, int]:
    """Return how many rows of B and how many of their values a program takes at a time."""
    block_rows = min(16, triton.next_power_of_2(rows))
    return block_rows, min(TILE // block_rows, triton.next_power_of_2(inside))


@cache
def _ends(slices: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(slices, device=device).cumsum(0).to(torch.int32)
