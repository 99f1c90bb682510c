"""The kernel that makes noise on a GPU, in Triton's interpreter where there is none: the bits of the definition."""

from typing import Any

import pytest
import torch
from parts import assert_parts_are_rows
from torch import Tensor

from eggroll_llm.es.noise import NoiseSpec, served_factors_of
from eggroll_llm.kernels import noise as rows
from eggroll_llm.kernels.rounding import DEVICE

SHAPES = (("a.weight", 37, 101), ("b.weight", 37, 101), ("c.weight", 64, 1100), ("c.bias", 37, 0))
PAIRS = torch.tensor([0, 5, 2**32 - 1, 9])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("seed", [0, 2**40 + 3, 2**64 - 1])
def test_members_are_placed_to_the_bits_of_the_definition(rank: int, dtype: torch.dtype, seed: int) -> None:
    noise, layout = NoiseSpec(seed=seed, step=2**31 + 7, rank=rank, sigma=1e-3), rows.RowLayout(SHAPES, rank)
    memory = torch.full((6, layout.width), 7.0, dtype=dtype, device=DEVICE)
    slots, negative = torch.tensor([5, 0, 2, 3]), torch.tensor([False, True, True, False])
    rows.place(memory, slots, noise, PAIRS, negative, layout)
    placed = layout.factors(memory.cpu()[slots])
    sign_K = torch.where(negative, -1.0, 1.0).to(dtype)
    for name, (A_KOR, B_KIR) in served_factors_of(noise, PAIRS, SHAPES, dtype, "cpu").items():
        assert torch.equal(placed[name][0], A_KOR * sign_K[:, None, None])
        assert torch.equal(placed[name][1], B_KIR)
    assert (memory[[1, 4]] == 7.0).all()


@pytest.mark.parametrize(("rank", "dtype"), [(1, torch.bfloat16), (3, torch.float32)])
def test_parts_have_the_rows_of_the_whole(rank: int, dtype: torch.dtype) -> None:
    """Of a parameter with more blocks than a program makes, so that A and B are made by several."""

    def place(
        noise: NoiseSpec, pairs_K: Tensor, shapes: Any, dtype: torch.dtype, _: str, offsets: Any
    ) -> dict[str, tuple[Tensor, Tensor]]:
        layout = rows.RowLayout(tuple(shapes), noise.rank, tuple(offsets))
        memory = torch.full((len(pairs_K), layout.width), 7.0, dtype=dtype, device=DEVICE)
        rows.place(memory, torch.arange(len(pairs_K)), noise, pairs_K, torch.zeros_like(pairs_K), layout)
        return layout.factors(memory.cpu())

    assert_parts_are_rows(place, rank, dtype, (3000, 101))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise": NoiseSpec(seed=1, step=1, rank=3, sigma=0.1)}, "does not fit rows"),
        ({"width": 1}, "does not fit rows"),
        ({"dtype": torch.float64}, "must be one of"),
        ({"row_K": torch.tensor([0, 1, 2, 4])}, "none of the 4 that there are"),
        ({"row_K": torch.tensor([0, 1, 2, -1])}, "none of the 4 that there are"),
    ],
)
def test_noise_that_does_not_fit_the_rows_is_refused(change: dict[str, Any], message: str) -> None:
    layout = rows.RowLayout(SHAPES, 2)
    memory = torch.zeros(4, layout.width + change.get("width", 0), device=DEVICE, dtype=change.get("dtype"))
    noise = change.get("noise", NoiseSpec(seed=1, step=1, rank=2, sigma=0.1))
    with pytest.raises(ValueError, match=message):
        rows.place(memory, change.get("row_K", torch.arange(4)), noise, PAIRS, torch.zeros(4), layout)
    assert not memory.any()
