"""A block's norm and activation on the GPU, with the member terms of the layers before and after them on the way.

    rms_norm      y <- round(y + A h),  s = y + residual,  x = round(s / sqrt(mean(s^2) + eps)) * weight,  h' = B^T x
    silu_and_mul  g <- round(g + A h),  u <- round(u + A h),  x = round(g / (1 + exp(-g))) * u,  h' = B^T x

y, or [g | u], is what the layer before returned without its term, and h what `shrink` made of its input; h' is what the
layer after needs for its own. Each is one launch, as without members, and each part with h can be left out. They round
where vLLM's operations in PyTorch and the separate kernels do; vLLM's CUDA kernel rounds s before it takes the mean.
Programs compute one token after the other, as in `member_term_triton`, and rows do not depend on the batch.

Shapes: T token, C slice of a fused layer, R rank, I in features of the layer after.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from eggroll_llm.kernels.binding import array_error, check_array
from eggroll_llm.kernels.member_term import check_factors
from eggroll_llm.kernels.member_term_triton import grid_of, member_slot, tokens_of_program
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
    """Slot of each token, int32, -1 for the base model. May be longer than T."""
    slices: tuple[int, ...]
    """Out features of each slice."""

    def __post_init__(self) -> None:
        """Raise ValueError for tensors that do not fit each other."""
        slices, out = len(self.slices), sum(self.slices)
        check_factors(self.A_SV, self.B_SCRI, self.slot_T, slices, out, self.A_SV.dtype, self.A_SV.device)


@triton.jit
def _with_term(y, A_of_slice, h_of_slice, mask, size, R: tl.constexpr, dtype: tl.constexpr):
    """Return float32 y + A h, rounded to `dtype`."""
    for r in tl.range(R, loop_unroll_factor=min(R, 8)):
        y += tl.load(h_of_slice + r) * tl.load(A_of_slice + r * size, mask=mask, other=0.0).to(tl.float32)
    return rounded(y, dtype).to(tl.float32)


@triton.jit(do_not_specialize=["tokens", "per_program", "slots"])
def _rms_norm(
    x_TI, y_TI, residual_TI, weight_I, epsilon, tokens, per_program, slot_T, slots, h_TR, A_SV, slot_A, after_TCR,
    B_SCRI, slot_B, SIZE: tl.constexpr, R: tl.constexpr, AFTER: tl.constexpr, ROWS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, BLOCK)
    mask = i < SIZE
    dtype: tl.constexpr = x_TI.dtype.element_ty
    weight = tl.load(weight_I + i, mask=mask, other=0.0).to(tl.float32)
    first_t, many = tokens_of_program(tokens, per_program)
    for n in range(many):
        t = first_t + n
        slot = member_slot(slot_T, t, slots) if R + AFTER > 0 else t
        s = tl.load(y_TI + t * SIZE + i, mask=mask, other=0.0).to(tl.float32)
        if R > 0:
            if slot >= 0:
                s = _with_term(s, A_SV + slot * slot_A + i, h_TR + t * R, mask, SIZE, R, dtype)
        if HAS_RESIDUAL:
            at = residual_TI + t * SIZE + i
            s += tl.load(at, mask=mask, other=0.0).to(tl.float32)
            tl.store(at, rounded(s, dtype), mask=mask)
        scale = 1.0 / tl.sqrt_rn(tl.sum(s * s, axis=0) / SIZE + epsilon)
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


@triton.jit(do_not_specialize=["tokens", "per_program", "slots"])
def _silu_and_mul(
    x_TI, y_TO, tokens, per_program, slot_T, slots, h_TCR, A_SV, slot_A, after_TCR, B_SCRI, slot_B,
    SIZE: tl.constexpr, R: tl.constexpr, AFTER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, ROWS)
    dtype: tl.constexpr = x_TI.dtype.element_ty
    first_t, many = tokens_of_program(tokens, per_program)
    for n in range(many):
        t = first_t + n
        slot = member_slot(slot_T, t, slots) if R + AFTER > 0 else t
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
    Raises ValueError for tensors of other shapes, that are not contiguous, or not of one format and on one device.
    """
    tokens, size = y_TI.shape
    check_array("the weight", weight_I, (size,), y_TI.dtype, y_TI.device)
    if residual_TI is not None:
        check_array("the residual", residual_TI, (tokens, size), y_TI.dtype, y_TI.device)
    x_TI, terms = torch.empty_like(y_TI), _Terms(y_TI, (size,), size, before, after)
    if tokens:
        block = triton.next_power_of_2(size)
        _rms_norm[(terms.programs,)](
            x_TI, y_TI, x_TI if residual_TI is None else residual_TI, weight_I, epsilon, *terms.arguments, size,
            terms.rank, terms.rows, min(ROWS_AT_ONCE, _power_of_2(terms.rows)), residual_TI is not None, block,
            num_warps=_warps(block), enable_fp_fusion=True,
        )  # fmt: skip
    return x_TI, terms.after_TCR


def silu_and_mul(
    y_TO: Tensor, before: tuple[Factors, Tensor] | None = None, after: Factors | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return x [T, I] of y = [gate | up] and h' [T, 1, R]. `before` has two slices and h [T, 2, R], `after` one.

    Raises ValueError as `rms_norm` does.
    """
    tokens, size = len(y_TO), y_TO.shape[1] // 2
    x_TI, terms = y_TO.new_empty(tokens, size), _Terms(y_TO, (size, size), size, before, after)
    if tokens:
        block_rows = _power_of_2(terms.rows)
        block = min(1024, TILE // block_rows, triton.next_power_of_2(size))
        _silu_and_mul[(terms.programs,)](
            x_TI, y_TO, *terms.arguments, size, terms.rank, terms.rows, block_rows, block, num_warps=8,
            enable_fp_fusion=True,
        )  # fmt: skip
    return x_TI, terms.after_TCR


class _Terms:
    """What both kernels are given of the layers before and after, checked."""

    def __init__(
        self,
        y_TO: Tensor,
        slices: tuple[int, ...],
        size: int,
        before: tuple[Factors, Tensor] | None,
        after: Factors | None,
    ) -> None:
        """Take what stands around y of such slices, of which x of `size` features is made. Raises ValueError."""
        tokens, dtype, device = len(y_TO), y_TO.dtype, y_TO.device
        check_array("y", y_TO, (tokens, sum(slices)), dtype, device)
        self.programs, per_program = grid_of(tokens)
        self.rank, self.rows, self.after_TCR = 0, 0, None
        slot_T, slots = y_TO, 0
        with_h: tuple[Any, ...] = (None, None, 0)
        with_B: tuple[Any, ...] = (None, None, 0)
        if before is not None:
            factors, h_TCR = before
            slot_T, slots = _slots(factors, tokens, dtype, device)
            _, C, self.rank, _ = factors.B_SCRI.shape
            check_array("h", h_TCR, (tokens, C, self.rank), torch.float32, device)
            if factors.slices != slices:
                raise array_error("A", factors.A_SV, f"of slices {slices} instead of {factors.slices}")
            with_h = h_TCR, factors.A_SV, factors.A_SV.stride(0)
        if after is not None:
            if before is not None and (after.slot_T is not slot_T or len(after.A_SV) != slots):
                raise array_error("slot", after.slot_T, f"that of the layer before, of {slots} slots")
            slot_T, slots = _slots(after, tokens, dtype, device)
            _, C, R, inside = after.B_SCRI.shape
            if inside != size:
                raise array_error("B", after.B_SCRI, f"of {size} in features")
            self.rows = C * R
            self.after_TCR = torch.empty((tokens, C, R), dtype=torch.float32, device=device)
            with_B = self.after_TCR, after.B_SCRI, after.B_SCRI.stride(0)
        self.arguments = tokens, per_program, slot_T, slots, *with_h, *with_B


def _slots(factors: Factors, tokens: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, int]:
    if factors.A_SV.dtype is not dtype or factors.A_SV.device != device:
        raise array_error("A", factors.A_SV, f"{dtype} on {device}")
    if len(factors.slot_T) < tokens:
        raise array_error("slot", factors.slot_T, f"of {tokens} tokens at least")
    return factors.slot_T, len(factors.A_SV)


def _power_of_2(rows: int) -> int:
    return int(triton.next_power_of_2(max(1, rows)))


def _warps(block: int) -> int:
    return min(16, max(4, block // 512))
