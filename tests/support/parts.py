"""Parts of a parameter's factors, as the devices of one engine make them, against those of the whole."""

from collections.abc import Callable

import torch

from eggroll_llm.es.noise import NoiseSpec, served_factors


def assert_parts_are_rows(
    factors_of: Callable[..., dict[str, tuple[torch.Tensor, torch.Tensor]]],
    rank: int,
    dtype: torch.dtype,
    size: tuple[int, int],
) -> None:
    """Two parameters at once, cut at rows where no block of the stream begins."""
    (out, inside), pairs_K = size, torch.tensor([0, 5, 2**32 - 1])
    noise = NoiseSpec(seed=2**40 + 3, step=7, rank=rank, sigma=0.1)
    for first, rows, column, columns in ((0, 3, 0, inside), (3, 18, 0, inside), (0, out, 5, 90), (9, 1, 100, 1)):
        names = ("a.weight", "b.weight")
        shapes, offsets = [(name, rows, columns) for name in names], [(first, out + column)] * 2
        found = factors_of(noise, pairs_K, shapes, dtype, "cpu", offsets)
        for name in names:
            A_KOR, B_KIR = served_factors(noise, pairs_K, name, out, inside, dtype, "cpu")
            assert torch.equal(found[name][0], A_KOR[:, first : first + rows])
            assert torch.equal(found[name][1], B_KIR[:, column : column + columns])
