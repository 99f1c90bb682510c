"""A block's norm and activation on the GPU, with the member terms of the layers before and after them on the way.

    rms_norm      y <- round(y + A h),  s = y + residual,  x = round(s / sqrt(mean(s^2) + eps)) * weight,  h' = B^T x
    silu_and_mul  g <- round(g + A h),  u <- round(u + A h),  x = round(g / (1 + exp(-g))) * u,  h' = B^T x

y, or [g | u], is what the layer before returned without its term, and h what `shrink` made of its input; h' is what the
layer after needs for its own. Each is one launch, as without members, and each part with h can be left out. They round
where vLLM's eager operations and the separate kernels do. A program has one token, so rows do not depend on the batch.

Shapes: T token, C slice of a fused layer, R rank, I in features of the layer after.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from eggroll_llm.kernels.binding import check_array
from eggroll_llm.kernels.rounding import rounded

TILE = 8192
"""Values of B in registers at a time, of an activation."""
ROWS_AT_ONCE = 4
"""Rows of B in registers at a time, of a norm."""


@dataclass(frozen=True)
class Factors:
    """Where the members' factors of a linear layer are: A_SV and B_SCRI of `member_term`."""

    A_SV: Tensor
    B_SCRI: Tensor
    slot_T: Tensor
    """Slot of each token, int32, -1 for the base model."""


@triton.jit
def _member_slot(slot_T, t, slots):
    """Return the slot of a token as int64, -1 where it has none that exists."""
    slot = tl.load(slot_T + t).to(tl.int64)
    return tl.where(slot < slots, slot, -1)


@triton.jit
def _with_term(y, A_of_slice, h_of_slice, mask, size, R: tl.constexpr, dtype: tl.constexpr):
    """Return float32 y + A h, rounded to `dtype`."""
    for r in range(R):
        y += tl.load(h_of_slice + r) * tl.load(A_of_slice + r * size, mask=mask, other=0.0).to(tl.float32)
    return rounded(y, dtype).to(tl.float32)


@triton.jit(do_not_specialize=["slots"])
def _rms_norm(
    x_TI, y_TI, residual_TI, weight_I, epsilon, slot_T, slots, h_TR, A_SV, slot_A, after_TCR, B_SCRI, slot_B,
    SIZE: tl.constexpr, R: tl.constexpr, AFTER: tl.constexpr, ROWS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    t, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    mask = i < SIZE
    dtype: tl.constexpr = x_TI.dtype.element_ty
    slot = _member_slot(slot_T, t, slots) if R + AFTER > 0 else t
    s = tl.load(y_TI + t * SIZE + i, mask=mask, other=0.0).to(tl.float32)
    if R > 0:
        if slot >= 0:
            s = _with_term(s, A_SV + slot * slot_A + i, h_TR + t * R, mask, SIZE, R, dtype)
    if HAS_RESIDUAL:
        at = residual_TI + t * SIZE + i
        s += tl.load(at, mask=mask, other=0.0).to(tl.float32)
        tl.store(at, rounded(s, dtype), mask=mask)
    scale = 1.0 / tl.sqrt_rn(tl.sum(s * s, axis=0) / SIZE + epsilon)
    weight = tl.load(weight_I + i, mask=mask, other=0.0).to(tl.float32)
    x = rounded(rounded(s * scale, dtype).to(tl.float32) * weight, dtype)
    tl.store(x_TI + t * SIZE + i, x, mask=mask)
    if AFTER > 0:
        if slot >= 0:
            for first in range(0, AFTER, ROWS):  # one at a time, each would wait for its load and sum
                row = first + tl.arange(0, ROWS)
                B_at = B_SCRI + slot * slot_B + row[:, None] * SIZE + i[None, :]
                B = tl.load(B_at, mask=(row < AFTER)[:, None] & mask[None, :], other=0.0).to(tl.float32)
                h = tl.sum(B * x.to(tl.float32)[None, :], axis=1)
                tl.store(after_TCR + t * AFTER + row, h, mask=row < AFTER)


@triton.jit(do_not_specialize=["slots"])
def _silu_and_mul(
    x_TI, y_TO, slot_T, slots, h_TCR, A_SV, slot_A, after_TCR, B_SCRI, slot_B, SIZE: tl.constexpr, R: tl.constexpr,
    AFTER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t, row = tl.program_id(0).to(tl.int64), tl.arange(0, ROWS)
    dtype: tl.constexpr = x_TI.dtype.element_ty
    slot = _member_slot(slot_T, t, slots) if R + AFTER > 0 else t
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, SIZE, BLOCK):
        i = first + tl.arange(0, BLOCK)
        mask = i < SIZE
        gate = tl.load(y_TO + 2 * t * SIZE + i, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(y_TO + (2 * t + 1) * SIZE + i, mask=mask, other=0.0).to(tl.float32)
        if R > 0:
            if slot >= 0:
                A, h = A_SV + slot * slot_A + i, h_TCR + 2 * t * R
                gate = _with_term(gate, A, h, mask, SIZE, R, dtype)
                up = _with_term(up, A + R * SIZE, h + R, mask, SIZE, R, dtype)
        x = rounded(rounded(gate / (1.0 + tl.exp(-gate)), dtype).to(tl.float32) * up, dtype)
        tl.store(x_TI + t * SIZE + i, x, mask=mask)
        if AFTER > 0:
            if slot >= 0:
                at = B_SCRI + slot * slot_B + row[:, None] * SIZE + i[None, :]
                B = tl.load(at, mask=(row < AFTER)[:, None] & mask[None, :], other=0.0).to(tl.float32)
                total += B * x.to(tl.float32)[None, :]
    if AFTER > 0:
        if slot >= 0:
            tl.store(after_TCR + t * AFTER + row, tl.sum(total, axis=1), mask=row < AFTER)


def rms_norm(
    y_TI: Tensor,
    residual_TI: Tensor | None,
    weight_I: Tensor,
    epsilon: float,
    before: tuple[Factors, Tensor] | None = None,
    after: Factors | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return x [T, I] and h' [T, C, R]; the residual, if any, is replaced by the sum.

    `before` is the layer that returned y, of one slice, with h [T, 1, R] of its input; `after` the layer that takes x.
    Raises ValueError for y and residual that are not contiguous, of one format and on one device.
    """
    tokens, size = y_TI.shape
    check_array("y", y_TI, (tokens, size), weight_I.dtype, weight_I.device)
    if residual_TI is not None:
        check_array("the residual", residual_TI, (tokens, size), y_TI.dtype, y_TI.device)
    x_TI = torch.empty_like(y_TI)
    rank, with_h = _before(before)
    rows, after_TCR, with_B = _after(after, x_TI)
    slot_T, slots = _slots(before[0] if before else after, x_TI)
    block = triton.next_power_of_2(size)
    if tokens:
        _rms_norm[(tokens,)](
            x_TI, y_TI, x_TI if residual_TI is None else residual_TI, weight_I, epsilon, slot_T, slots, *with_h,
            *with_B, size, rank, rows, min(ROWS_AT_ONCE, _power_of_2(rows)), residual_TI is not None, block,
            num_warps=_warps(block), enable_fp_fusion=True,
        )  # fmt: skip
    return x_TI, after_TCR


def silu_and_mul(
    y_TO: Tensor, before: tuple[Factors, Tensor] | None = None, after: Factors | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return x [T, I] of y = [gate | up] and h' [T, 1, R]. `before` has two slices and h [T, 2, R], `after` one.

    Raises ValueError for y that is not contiguous.
    """
    tokens, size = len(y_TO), y_TO.shape[1] // 2
    check_array("y", y_TO, (tokens, 2 * size), y_TO.dtype, y_TO.device)
    x_TI = y_TO.new_empty(tokens, size)
    rank, with_h = _before(before)
    rows, after_TCR, with_B = _after(after, x_TI)
    slot_T, slots = _slots(before[0] if before else after, x_TI)
    block_rows = _power_of_2(rows)
    block = min(1024, TILE // block_rows, triton.next_power_of_2(size))
    if tokens:
        _silu_and_mul[(tokens,)](
            x_TI, y_TO, slot_T, slots, *with_h, *with_B, size, rank, rows, block_rows, block, num_warps=8,
            enable_fp_fusion=True,
        )  # fmt: skip
    return x_TI, after_TCR


def _before(before: tuple[Factors, Tensor] | None) -> tuple[int, tuple[Any, ...]]:
    if before is None:
        return 0, (None, None, 0)
    factors, h_TCR = before
    return h_TCR.shape[2], (h_TCR, factors.A_SV, factors.A_SV.stride(0))


def _after(after: Factors | None, x_TI: Tensor) -> tuple[int, Tensor | None, tuple[Any, ...]]:
    if after is None:
        return 0, None, (None, None, 0)
    _, C, R, _ = after.B_SCRI.shape
    h_TCR = torch.empty((len(x_TI), C, R), dtype=torch.float32, device=x_TI.device)
    return C * R, h_TCR, (h_TCR, after.B_SCRI, after.B_SCRI.stride(0))


def _slots(factors: Factors | None, x_TI: Tensor) -> tuple[Tensor, int]:
    return (x_TI, 0) if factors is None else (factors.slot_T, len(factors.A_SV))


def _power_of_2(rows: int) -> int:
    return int(triton.next_power_of_2(max(1, rows)))


def _warps(block: int) -> int:
    return min(16, max(4, block // 512))
