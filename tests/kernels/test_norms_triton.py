"""Norm and activation with the terms of their neighbours, in one launch: to rounding, what separate steps give."""

from typing import Any

import pytest
import torch
from torch import Tensor

from eggroll_llm.kernels.member_term import add_term_torch
from eggroll_llm.kernels.norms_triton import Factors, rms_norm, silu_and_mul
from eggroll_llm.kernels.rounding import DEVICE

# A gate far below zero is 0, by way of an infinite exponential, of which numpy warns in the interpreter.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")
TOKENS, SLOTS, EPSILON = 7, 3, 1e-5
SLOT_T = torch.tensor([0, -1, 2, 1, 1, SLOTS, 2], dtype=torch.int32)
"""One of the base model, and one whose slot does not exist, which is treated like it."""
MEMBERS = torch.tensor([0, 2, 3, 4, 6])
DTYPES = [torch.float32, torch.bfloat16]


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed)).to(dtype)


def factors(out: int, inside: int, slices: int, rank: int, dtype: torch.dtype) -> Factors:
    A_SV, B_SCRI = random(SLOTS, rank * out, dtype=dtype), random(SLOTS, slices, rank, inside, dtype=dtype)
    return Factors(A_SV.to(DEVICE), B_SCRI.to(DEVICE), SLOT_T.to(DEVICE))


def h_of(layer: Factors, x_TI: Tensor) -> Tensor:
    """B^T x in float64 for members; elsewhere something that must not be used."""
    h_TCR = torch.full((TOKENS, *layer.B_SCRI.shape[1:3]), torch.nan)
    for t in MEMBERS.tolist():
        h_TCR[t] = torch.einsum("cri,i->cr", layer.B_SCRI[SLOT_T[t]].double().cpu(), x_TI[t].double().cpu()).float()
    return h_TCR


def with_term(y_TO: Tensor, layer: Factors, x_TI: Tensor, slices: tuple[int, ...]) -> Tensor:
    y_TO = y_TO.clone()
    slots = torch.where(SLOT_T < SLOTS, SLOT_T, -1)
    add_term_torch(y_TO, x_TI, layer.A_SV.cpu(), layer.B_SCRI.cpu(), slots, slices)
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
    ("before", "residual", "after"), [(0, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 2), (1, 1, 0), (3, 1, 2)]
)
def test_a_norm_finishes_the_layer_before_it_and_begins_the_one_after(
    dtype: torch.dtype, before: int, residual: int, after: int
) -> None:
    size, inside = 96, 40
    y_TI, weight_I = random(TOKENS, size, dtype=dtype), random(size, dtype=dtype).abs()
    residual_TI = random(TOKENS, size, dtype=dtype, seed=1) if residual else None
    term, finished = None, y_TI
    if before:
        layer, x_TI = factors(size, inside, 1, before, dtype), random(TOKENS, inside, dtype=dtype)
        term, finished = (layer, h_of(layer, x_TI).to(DEVICE)), with_term(y_TI, layer, x_TI, (size,))
    next_layer = factors(120, size, 3, after, dtype) if after else None
    expected, expected_sum = native_norm(finished, residual_TI, weight_I)
    summed = None if residual_TI is None else residual_TI.to(DEVICE)
    found, h_TCR = rms_norm(gpu(y_TI), summed, gpu(weight_I), EPSILON, term, next_layer)
    close(found, expected)
    if summed is not None:
        close(summed, expected_sum)
    if next_layer is None:
        assert h_TCR is None
    else:
        assert h_TCR is not None
        torch.testing.assert_close(h_TCR.cpu()[MEMBERS], h_of(next_layer, found)[MEMBERS], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("before", "after"), [(0, 0), (1, 1), (3, 0), (0, 3), (2, 5)])
def test_an_activation_does_too(dtype: torch.dtype, before: int, after: int) -> None:
    size, inside = 1100, 40  # more than one block, and no power of two
    y_TO = random(TOKENS, 2 * size, dtype=dtype)
    term, finished = None, y_TO
    if before:
        layer, x_TI = factors(2 * size, inside, 2, before, dtype), random(TOKENS, inside, dtype=dtype)
        term, finished = (layer, h_of(layer, x_TI).to(DEVICE)), with_term(y_TO, layer, x_TI, (size, size))
    next_layer = factors(64, size, 1, after, dtype) if after else None
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
    layer, after = factors(size, 40, 1, 2, dtype), factors(120, size, 3, 2, dtype)
    h_TCR = gpu(h_of(layer, random(TOKENS, 40, dtype=dtype)))
    plain_sum, member_sum = residual_TI.clone(), residual_TI.clone()
    plain, _ = rms_norm(y_TI, plain_sum, weight_I, EPSILON)
    found, _ = rms_norm(y_TI, member_sum, weight_I, EPSILON, (layer, h_TCR), after)
    assert torch.equal(found[base], plain[base])
    assert torch.equal(member_sum[base], plain_sum[base])
    assert (found != plain).any(dim=1).sum() == len(MEMBERS)


def test_a_row_has_the_same_bits_in_any_batch() -> None:
    size = 1100
    before, after = factors(2 * size, 40, 2, 2, torch.bfloat16), factors(64, size, 1, 2, torch.bfloat16)
    y_TO, x_TI = random(TOKENS, 2 * size, dtype=torch.bfloat16), random(TOKENS, 40, dtype=torch.bfloat16)
    h_TCR = h_of(before, x_TI)
    together, h_together = silu_and_mul(gpu(y_TO), (before, gpu(h_TCR)), after)
    for t in MEMBERS.tolist():
        slot = gpu(SLOT_T[t : t + 1])
        alone, h_alone = silu_and_mul(
            gpu(y_TO[t : t + 1]),
            (Factors(before.A_SV, before.B_SCRI, slot), gpu(h_TCR[t : t + 1])),
            Factors(after.A_SV, after.B_SCRI, slot),
        )
        assert torch.equal(alone[0], together[t])
        assert h_alone is not None
        assert h_together is not None
        assert torch.equal(h_alone[0], h_together[t])


@pytest.mark.parametrize("dtype", DTYPES)
def test_not_a_number_stays_one(dtype: torch.dtype) -> None:
    y_TO = random(2, 64, dtype=dtype)
    y_TO[0, 3] = torch.nan
    for found in (rms_norm(gpu(y_TO), None, gpu(torch.ones(64, dtype=dtype)), EPSILON)[0], silu_and_mul(gpu(y_TO))[0]):
        assert found[0].isnan().any()
        assert found[1].isfinite().all()
