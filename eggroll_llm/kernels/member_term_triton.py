"""The member term in Triton: `shrink` makes h = B^T x, `expand` adds A h to y, two launches a layer.

The rank is not padded, and the grid has no slots in it, so that all programs have work. A program computes one token
after the other, mostly of one member where prompts are read, whose factors are then in the processor's own cache. Every
token is computed alone, in blocks whose sizes depend on the layer, so a row's bits do not depend on what else is in the
batch. Next to a norm or an activation, `norms_triton` does `expand` or `shrink` on its way.

Shapes: T token, S slot, C slice of a fused layer, R rank, O out features of all slices, I in features, V values of all
A of a slot. A token whose slot does not exist is left alone like one of the base model: a GPU cannot raise.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from eggroll_llm.kernels.binding import check_array
from eggroll_llm.kernels.rounding import rounded

PROGRAMS = 1024
"""Programs that keep a GPU busy: with twice as many tokens, a program computes two."""
TILE = 4096
"""Values of B in registers at a time: 32 for each of 128 threads."""
BLOCKS_O = 256, 1024
"""Out features of a program, least and most: 8 for each of 32 threads or more."""


@triton.jit
def tokens_of_program(tokens, per_program):
    """Return a program's first token as int64, and how many it has."""
    first = tl.program_id(0) * per_program
    return first.to(tl.int64), tl.minimum(per_program, tokens - first)


@triton.jit
def member_slot(slot_T, t, slots):
    """Return the slot of token t as int64, -1 where it has none that exists."""
    slot = tl.load(slot_T + t).to(tl.int64)
    return tl.where(slot < slots, slot, -1)


@triton.jit(do_not_specialize=["tokens", "per_program", "slots"])
def _shrink(
    h_TCR, x_TI, B_SCRI, slot_T, tokens, per_program, slots, x_stride, slot_B, INSIDE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    first_t, many = tokens_of_program(tokens, per_program)
    for n in range(many):
        t = first_t + n
        slot = member_slot(slot_T, t, slots)
        if slot >= 0:
            total = tl.zeros([BLOCK_ROWS, BLOCK_I], tl.float32)
            for first in range(0, INSIDE, BLOCK_I):
                i = first + tl.arange(0, BLOCK_I)
                x = tl.load(x_TI + t * x_stride + i, mask=i < INSIDE, other=0.0).to(tl.float32)
                at = B_SCRI + slot * slot_B + row[:, None] * INSIDE + i[None, :]
                B = tl.load(at, mask=(row < ROWS)[:, None] & (i < INSIDE)[None, :], other=0.0).to(tl.float32)
                total += B * x[None, :]
            tl.store(h_TCR + t * ROWS + row, tl.sum(total, axis=1), mask=row < ROWS)


@triton.jit(do_not_specialize=["tokens", "per_program", "slots"])
def _expand(
    y_TO, h_TCR, A_SV, slot_T, tokens, per_program, slots, y_stride, slot_A, SLICES: tl.constexpr, R: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = len(SLICES)
    block = tl.program_id(1)
    begin, size, c, first = 0, SLICES[0], 0, block  # of the slice that the block is in, and where it is there
    o_before, blocks_before = 0, 0
    for each in tl.static_range(C):
        if block >= blocks_before:
            begin, size, c, first = o_before, SLICES[each], each, block - blocks_before
        o_before += SLICES[each]
        blocks_before += tl.cdiv(SLICES[each], BLOCK)
    i = first * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    first_t, many = tokens_of_program(tokens, per_program)
    for n in range(many):
        t = first_t + n
        slot = member_slot(slot_T, t, slots)
        if slot >= 0:
            at = y_TO + t * y_stride + begin + i
            y = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            A_of_slice = A_SV + slot * slot_A + R * begin + i
            for r in tl.range(R, loop_unroll_factor=min(R, 8)):
                A = tl.load(A_of_slice + r * size, mask=mask, other=0.0)
                y += tl.load(h_TCR + (t * C + c) * R + r) * A.to(tl.float32)
            tl.store(at, rounded(y, y_TO.dtype.element_ty), mask=mask)


def shrink(x_TI: Tensor, B_SCRI: Tensor, slot_T: Tensor) -> Tensor:
    """Return h_TCR = B^T x, float32. Rows of the base model are not written. Raises ValueError for other x."""
    slots, C, R, inside = B_SCRI.shape
    tokens = len(x_TI)
    check_array("x", x_TI, (tokens, inside), B_SCRI.dtype, B_SCRI.device)
    h_TCR = torch.empty((tokens, C, R), dtype=torch.float32, device=x_TI.device)
    if tokens:
        rows, block_I = _tile(C * R, inside)
        programs, per_program = grid_of(tokens)
        _shrink[programs, triton.cdiv(C * R, rows)](
            h_TCR, x_TI, B_SCRI, slot_T, tokens, per_program, slots, x_TI.stride(0), B_SCRI.stride(0), inside, C * R,
            rows, block_I, enable_fp_fusion=True,
        )  # fmt: skip
    return h_TCR


def expand(y_TO: Tensor, h_TCR: Tensor, A_SV: Tensor, slot_T: Tensor, slices: Sequence[int]) -> None:
    """Add A h to the rows of `y_TO` that belong to members, in place. Raises ValueError for other y and h."""
    tokens, out, R = len(y_TO), sum(slices), h_TCR.shape[-1]
    check_array("y", y_TO, (tokens, out), A_SV.dtype, A_SV.device)
    check_array("h", h_TCR, (tokens, len(slices), A_SV.shape[1] // out), torch.float32, A_SV.device)
    least, most = BLOCKS_O
    block = min(most, max(least, triton.next_power_of_2(min(slices))))
    if tokens:
        programs, per_program = grid_of(tokens)
        _expand[programs, sum(triton.cdiv(size, block) for size in slices)](
            y_TO, h_TCR, A_SV, slot_T, tokens, per_program, len(A_SV), y_TO.stride(0), A_SV.stride(0), tuple(slices), R,
            block, num_warps=block // least, enable_fp_fusion=True,
        )  # fmt: skip


def grid_of(tokens: int) -> tuple[int, int]:
    """Return how many programs have tokens, and how many each has at most."""
    per_program = max(1, tokens // PROGRAMS)
    return triton.cdiv(tokens, per_program), per_program


def _tile(rows: int, inside: int) -> tuple[int, int]:
    """Return how many rows of B and how many of their values a program takes at a time."""
    block_rows = min(16, triton.next_power_of_2(rows))
    return block_rows, min(TILE // block_rows, triton.next_power_of_2(inside))
