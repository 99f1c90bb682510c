"""Norm and activation with the terms of their neighbours, in one launch: to rounding, what separate steps give."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from eggroll_llm.kernels import member_term_triton
from eggroll_llm.kernels.member_term import add_term_torch
from eggroll_llm.kernels.norms_triton import Factors, rms_norm, silu_and_mul
from eggroll_llm.kernels.rounding import DEVICE

# A gate far below zero is 0, by way of an infinite exponential, of which numpy warns in the interpreter.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")
TOKENS, SLOTS, EPSILON = 7, 300, 1e-5
SLOT_T = torch.tensor([0, -1, 299, 1, 1, SLOTS, 299], dtype=torch.int32)
"""One of the base model, and one whose slot does not exist, which is treated like it."""
ON_DEVICE = SLOT_T.to(DEVICE)
MEMBERS = torch.tensor([0, 2, 3, 4, 6])
DTYPES = [torch.float32, torch.bfloat16]


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed)).to(dtype)


def factors(slices: tuple[int, ...], inside: int, rank: int, dtype: torch.dtype) -> Factors:
    A_SV, B_SCRI = random(SLOTS, rank * sum(slices), dtype=dtype), random(SLOTS, len(slices), rank, inside, dtype=dtype)
    return Factors(A_SV.to(DEVICE), B_SCRI.to(DEVICE), ON_DEVICE, slices)


def h_of(layer: Factors, x_TI: Tensor) -> Tensor:
    """B^T x in float64 for members; elsewhere something that must not be used."""
    h_TCR = torch.full((TOKENS, *layer.B_SCRI.shape[1:3]), torch.nan)
    for t in MEMBERS.tolist():
        h_TCR[t] = torch.einsum("cri,i->cr", layer.B_SCRI[SLOT_T[t]].double().cpu(), x_TI[t].double().cpu()).float()
    return h_TCR


def with_term(y_TO: Tensor, layer: Factors, x_TI: Tensor) -> Tensor:
    y_TO = y_TO.clone()
    slots = torch.where(SLOT_T < SLOTS, SLOT_T, -1)
    add_term_torch(y_TO, x_TI, layer.A_SV.cpu(), layer.B_SCRI.cpu(), slots, layer.slices)
    return y_TO


def close(found: Tensor, expected: Tensor) -> None:
    """To float32's last digits; bfloat16 may now and then be rounded to the neighbour."""
    difference = (found.cpu().double() - expected.double()).abs()
    if expected.dtype == torch.bfloat16:
        assert (difference <= 2**-6 * expected.double().abs().clamp(min=0.1)).all()
        assert float((difference > 0).double().mean()) < 0.02
    else:
        assert (difference <= 1e-5 * expected.abs().max()).all()


def native_norm(y_TI: Tensor, residual_TI: Tensor | None, weight_I: Tensor) -> tuple[Tensor, Tensor]:
    s = y_TI.float() if residual_TI is None else y_TI.float() + residual_TI.float()
    normed = s * torch.rsqrt(s.square().mean(-1, keepdim=True) + EPSILON)
    return normed.to(y_TI.dtype) * weight_I, s.to(y_TI.dtype)


def gpu(value: Any) -> Any:
    return value.to(DEVICE) if isinstance(value, Tensor) else value


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("before", "residual", "after", "size"),
    [
        *[(0, 0, 0, 96), (0, 1, 0, 96), (0, 0, 1, 96), (0, 1, 2, 96), (1, 1, 0, 96), (3, 1, 2, 96)],
        *[(1, 1, 1, 1536), (16, 1, 16, 96), (64, 1, 64, 48)],
    ],
)
def test_a_norm_finishes_the_layer_before_it_and_begins_the_one_after(
    dtype: torch.dtype, before: int, residual: int, after: int, size: int
) -> None:
    inside = 40
    y_TI, weight_I = random(TOKENS, size, dtype=dtype), random(size, dtype=dtype).abs()
    residual_TI = random(TOKENS, size, dtype=dtype, seed=1) if residual else None
    term, finished = None, y_TI
    if before:
        layer, x_TI = factors((size,), inside, before, dtype), random(TOKENS, inside, dtype=dtype)
        term, finished = (layer, h_of(layer, x_TI).to(DEVICE)), with_term(y_TI, layer, x_TI)
    next_layer = factors((8, 4, 4), size, after, dtype) if after else None
    expected, expected_sum = native_norm(finished, residual_TI, weight_I)
    summed = None if residual_TI is None else residual_TI.to(DEVICE)
    found, h_TCR = rms_norm(gpu(y_TI), summed, gpu(weight_I), EPSILON, term, next_layer)
    close(found, expected)
    if summed is not None:
        close(summed, expected_sum)
        assert before or torch.equal(summed.cpu(), expected_sum)
    if next_layer is None:
        assert h_TCR is None
    else:
        assert h_TCR is not None
        torch.testing.assert_close(h_TCR.cpu()[MEMBERS], h_of(next_layer, found)[MEMBERS], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("before", "after", "size"),  # of more than one block, and no power of two
    [(0, 0, 1100), (1, 1, 1100), (3, 0, 1100), (0, 3, 1100), (2, 5, 1100), (64, 64, 136)],
)
def test_an_activation_does_too(dtype: torch.dtype, before: int, after: int, size: int) -> None:
    inside = 40
    y_TO = random(TOKENS, 2 * size, dtype=dtype)
    term, finished = None, y_TO
    if before:
        layer, x_TI = factors((size, size), inside, before, dtype), random(TOKENS, inside, dtype=dtype)
        term, finished = (layer, h_of(layer, x_TI).to(DEVICE)), with_term(y_TO, layer, x_TI)
    next_layer = factors((16,), size, after, dtype) if after else None
    gate, up = finished.chunk(2, dim=1)
    found, h_TCR = silu_and_mul(gpu(y_TO), term, next_layer)
    close(found, torch.nn.functional.silu(gate.float()).to(dtype) * up)
    if next_layer is not None:
        assert h_TCR is not None
        torch.testing.assert_close(h_TCR.cpu()[MEMBERS], h_of(next_layer, found)[MEMBERS], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_the_base_model_are_what_they_are_without_members(dtype: torch.dtype) -> None:
    size, base = 96, [1, 5]
    y_TI, residual_TI, weight_I = (
        gpu(random(*shape, dtype=dtype)) for shape in ((TOKENS, size), (TOKENS, size), (size,))
    )
    layer, after = factors((size,), 40, 2, dtype), factors((8, 4, 4), size, 2, dtype)
    h_TCR = gpu(h_of(layer, random(TOKENS, 40, dtype=dtype)))
    plain_sum, member_sum = residual_TI.clone(), residual_TI.clone()
    plain, _ = rms_norm(y_TI, plain_sum, weight_I, EPSILON)
    found, _ = rms_norm(y_TI, member_sum, weight_I, EPSILON, (layer, h_TCR), after)
    assert torch.equal(found[base], plain[base])
    assert torch.equal(member_sum[base], plain_sum[base])
    assert (found != plain).any(dim=1).sum() == len(MEMBERS)


Kernel = Callable[[slice], tuple[Tensor, ...]]


def norm_of_rows() -> Kernel:
    """A norm with a term before it and one after, of some tokens; its result, the residual and h."""
    size, dtype = 96, torch.bfloat16
    y_TI, residual_TI, weight_I = (gpu(random(*shape, dtype=dtype)) for shape in ((TOKENS, size),) * 2 + ((size,),))
    before, after = factors((size,), 40, 2, dtype), factors((8, 4, 4), size, 2, dtype)
    h_TCR = gpu(h_of(before, random(TOKENS, 40, dtype=dtype)))

    def norm(rows: slice) -> tuple[Tensor, ...]:
        summed, slot_T = residual_TI[rows].clone(), before.slot_T[rows]
        around = (with_slots(before, slot_T), h_TCR[rows]), with_slots(after, slot_T)
        x, h = rms_norm(y_TI[rows], summed, weight_I, EPSILON, *around)
        assert h is not None
        return x, summed, h

    return norm


def activation_of_rows() -> Kernel:
    """The same of an activation."""
    size, dtype = 1100, torch.bfloat16
    y_TO = gpu(random(TOKENS, 2 * size, dtype=dtype))
    before, after = factors((size, size), 40, 2, dtype), factors((64,), size, 2, dtype)
    h_TCR = gpu(h_of(before, random(TOKENS, 40, dtype=dtype)))

    def activation(rows: slice) -> tuple[Tensor, ...]:
        slot_T = before.slot_T[rows]
        x, h = silu_and_mul(y_TO[rows], (with_slots(before, slot_T), h_TCR[rows]), with_slots(after, slot_T))
        assert h is not None
        return x, h

    return activation


def with_slots(layer: Factors, slot_T: Tensor) -> Factors:
    return Factors(layer.A_SV, layer.B_SCRI, slot_T, layer.slices)


@pytest.mark.parametrize("make", [norm_of_rows, activation_of_rows])
def test_a_row_has_the_same_bits_in_any_batch(make: Callable[[], Kernel], monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = make()
    together = kernel(slice(TOKENS))
    monkeypatch.setattr(member_term_triton, "PROGRAMS", 2)  # which have four and three tokens
    for found, expected in zip(kernel(slice(TOKENS)), together, strict=True):
        assert torch.equal(found[gpu(MEMBERS)], expected[gpu(MEMBERS)])
    for t in MEMBERS.tolist():
        for found, expected in zip(kernel(slice(t, t + 1)), together, strict=True):
            assert torch.equal(found[0], expected[t])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gate_may_be_anything(dtype: torch.dtype) -> None:
    gate = torch.tensor([[0.0, -0.0, 1e-30, -1e-30, 100.0, -100.0, 3e38, -3e38]]).to(dtype)
    found, _ = silu_and_mul(gpu(torch.cat([gate, torch.full_like(gate, 0.5)], dim=1)))
    expected = (torch.nn.functional.silu(gate.float()).to(dtype) * 0.5).double()
    assert torch.allclose(found.cpu().double(), expected, rtol=1e-2, atol=1e-30)


@pytest.mark.parametrize("dtype", DTYPES)
def test_not_a_number_stays_one(dtype: torch.dtype) -> None:
    y_TO = random(2, 64, dtype=dtype)
    y_TO[0, 3] = torch.nan
    for found in (rms_norm(gpu(y_TO), None, gpu(torch.ones(64, dtype=dtype)), EPSILON)[0], silu_and_mul(gpu(y_TO))[0]):
        assert found[0].isnan().any()
        assert found[1].isfinite().all()
