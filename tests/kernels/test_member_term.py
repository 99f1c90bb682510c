"""The member term against its definition, compiled, in torch and in Triton, at every rank and in any batch."""

from typing import Any

import pytest
import torch
from torch import Tensor

from eggroll_llm.kernels import build, member_term, member_term_triton
from eggroll_llm.kernels.rounding import DEVICE

SLICES, INSIDE, SLOTS = (48, 16, 16), 64, 5


def on_gpu(y_TO: Tensor, *inputs: Any) -> None:
    """Triton's kernels where they run: on a GPU, or in the interpreter."""
    y = y_TO.to(DEVICE)
    member_term.add_term_triton(y, *(value.to(DEVICE) if isinstance(value, Tensor) else value for value in inputs))
    y_TO.copy_(y)


def implementations() -> list[member_term.AddTerm]:
    library = build.library()
    return [member_term.add_term_torch, on_gpu] + ([member_term.bind(library)] if library else [])


def inputs(tokens: int, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens + rank)
    shapes = (
        (tokens, sum(SLICES)),
        (tokens, INSIDE),
        (SLOTS, rank * sum(SLICES)),
        (SLOTS, len(SLICES), rank, INSIDE),
    )
    y_TO, x_TI, A_SV, B_SCRI = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    slot_T = torch.randint(-1, SLOTS, (tokens,), generator=generator, dtype=torch.int32)
    return y_TO, x_TI, A_SV, B_SCRI, slot_T


def dense(y_TO: Tensor, x_TI: Tensor, A_SV: Tensor, B_SCRI: Tensor, slot_T: Tensor) -> Tensor:
    """x (W + sigma E)^T - x W^T with sigma E = A B^T formed densely, in float64."""
    result = y_TO.double().clone()
    for t, slot in enumerate(slot_T.tolist()):
        if slot >= 0:
            row = 0
            for c, size in enumerate(SLICES):
                rank = B_SCRI.shape[2]
                A_RO = A_SV[slot, rank * row : rank * (row + size)].view(rank, size)
                E_OI = A_RO.double().T @ B_SCRI[slot, c].double()
                result[t, row : row + size] += E_OI @ x_TI[t].double()
                row += size
    return result


@pytest.mark.parametrize("add_term", implementations(), ids=lambda function: function.__name__)
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 8, 16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_term_is_the_dense_product(add_term: member_term.AddTerm, rank: int, dtype: torch.dtype) -> None:
    y_TO, x_TI, A_SV, B_SCRI, slot_T = inputs(12, rank, dtype)
    expected = dense(y_TO, x_TI, A_SV, B_SCRI, slot_T)
    add_term(y_TO, x_TI, A_SV, B_SCRI, slot_T, SLICES)
    # One rounding to the dtype of y, besides the float32 sums.
    tolerance = 1e-5 * expected.abs().max() if dtype == torch.float32 else 2**-8 * expected.abs().clamp(min=1)
    assert ((y_TO.double() - expected).abs() <= tolerance).all()


@pytest.mark.parametrize("add_term", implementations(), ids=lambda function: function.__name__)
def test_tokens_of_the_base_model_keep_their_bits(add_term: member_term.AddTerm) -> None:
    y_TO, x_TI, A_SV, B_SCRI, slot_T = inputs(37, 2, torch.bfloat16)
    before = y_TO.clone()
    add_term(y_TO, x_TI, A_SV, B_SCRI, slot_T, SLICES)
    base = slot_T < 0
    assert base.any()
    assert torch.equal(y_TO[base], before[base])
    assert (y_TO[~base] != before[~base]).any(dim=1).all()


@pytest.mark.parametrize("add_term", implementations(), ids=lambda function: function.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_in_any_batch(
    add_term: member_term.AddTerm, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    y_TO, x_TI, A_SV, B_SCRI, slot_T = inputs(40, 4, dtype)
    together = y_TO.clone()
    add_term(together, x_TI, A_SV, B_SCRI, slot_T, SLICES)
    monkeypatch.setattr(member_term_triton, "PROGRAMS", 3)  # which have several tokens each
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    for rows in order.split(7):
        alone = y_TO[rows].contiguous()
        add_term(alone, x_TI[rows].contiguous(), A_SV, B_SCRI, slot_T[rows].contiguous(), SLICES)
        assert torch.equal(alone, together[rows])


def test_neighbours_of_one_member_and_odd_sizes() -> None:
    """Runs of one to nine tokens of a member, which the kernel takes by fours, and sizes that fill no vector."""
    slices, inside, rank = (37, 9, 5), 100, 3
    slot_T = torch.tensor([s for s, run in enumerate((1, 2, 3, 4, 5, 9)) for _ in range(run)] + [-1, -1, 0, -1, 0, 0])
    slot_T = slot_T.to(torch.int32)
    generator = torch.Generator().manual_seed(1)
    y_TO, x_TI, A_SV, B_SCRI = (
        torch.randn(shape, generator=generator)
        for shape in ((len(slot_T), 51), (len(slot_T), inside), (6, rank * 51), (6, 3, rank, inside))
    )
    expected = y_TO.double()
    for t, slot in enumerate(slot_T.tolist()):
        for c, begin in enumerate((0, 37, 46) if slot >= 0 else ()):
            rows = slice(begin, begin + slices[c])
            A_RO = A_SV[slot, rank * begin : rank * (begin + slices[c])].view(rank, -1)
            expected[t, rows] += A_RO.double().T @ (B_SCRI[slot, c].double() @ x_TI[t].double())
    results = []
    for add_term in implementations():
        results.append(y_TO.clone())
        add_term(results[-1], x_TI, A_SV, B_SCRI, slot_T, slices)
        assert (results[-1] - expected).abs().max() < 1e-4
    for t in range(len(slot_T)):
        alone = y_TO[t : t + 1].clone()
        member_term.add_term(alone, x_TI[t : t + 1].clone(), A_SV, B_SCRI, slot_T[t : t + 1].clone(), slices)
        assert torch.equal(alone[0], results[-1][t])


@pytest.mark.parametrize("add_term", implementations(), ids=lambda function: function.__name__)
def test_many_slots_and_wide_layers(add_term: member_term.AddTerm) -> None:
    """More slots than tokens, and more features than one block of any kernel has."""
    slices, inside, slots = (2100, 70), 4200, 300
    generator = torch.Generator().manual_seed(2)
    y_TO, x_TI, A_SV, B_SCRI = (
        torch.randn(shape, generator=generator)
        for shape in ((3, 2170), (3, inside), (slots, 2170), (slots, 2, 1, inside))
    )
    slot_T, expected = torch.tensor([299, 257, 0], dtype=torch.int32), y_TO.double()
    for t, slot in enumerate(slot_T.tolist()):
        h = B_SCRI[slot, :, 0].double() @ x_TI[t].double()
        expected[t] += A_SV[slot].double() * h.repeat_interleave(torch.tensor(slices))
    add_term(y_TO, x_TI, A_SV, B_SCRI, slot_T, slices)
    assert (y_TO - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("add_term", implementations(), ids=lambda function: function.__name__)
def test_twins_terms_are_exact_negatives(add_term: member_term.AddTerm) -> None:
    """y = 0, so that only the term is left; A of slot 1 is minus A of slot 0."""
    _, x_TI, A_SV, B_SCRI, _ = inputs(2, 2, torch.float32)
    A_SV[1], B_SCRI[1], x_TI[1] = -A_SV[0], B_SCRI[0], x_TI[0]
    y_TO = torch.zeros(2, sum(SLICES))
    add_term(y_TO, x_TI, A_SV, B_SCRI, torch.tensor([0, 1], dtype=torch.int32), SLICES)
    assert y_TO[0].abs().min() > 0
    assert torch.equal(y_TO[0], -y_TO[1])
