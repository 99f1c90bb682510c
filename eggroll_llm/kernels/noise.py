"""The factors of a pair as one row of memory, all parameters one after another: all A, then all B.

Within a row A is [R, O] and B [R, I] for each parameter. On a CPU rows are filled by `noise.cpp`, to the bits of
`noise.served_factors_of`, or by that where it cannot be built, and a member is placed by copying one row and changing
the sign of its front. On a GPU `noise_triton` makes the same bits where they are needed.

Shapes: K pair, V value of a row, R rank, O out features, I in features.
"""

import ctypes
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from eggroll_llm.es import noise as definition
from eggroll_llm.es.noise import NoiseSpec, Offset, Shape, Size, names_by_size, parameter_id
from eggroll_llm.kernels import build
from eggroll_llm.kernels.binding import CPU, by_dtype, check_array, check_format

# The digits of the definition; C++ has no copy of them.
TABLES = (*definition.MINUS_TWO_LOG, *definition.SINE, *definition.COSINE, -2 * math.log(2))


@dataclass(frozen=True)
class RowLayout:
    """Where each parameter (name, out features, in features) lies in a row of factors of one rank."""

    shapes: tuple[Shape, ...]
    rank: int
    offsets: tuple[Offset, ...] = ()
    """Which part of its stream each parameter is, where it is not all."""

    @property
    def a_width(self) -> int:
        """Return values of all A, which come first."""
        return self.rank * sum(out for _, out, _ in self.shapes)

    @property
    def width(self) -> int:
        """Return values of a row."""
        return self.a_width + self.rank * sum(inside for _, _, inside in self.shapes)

    def starts(self) -> dict[str, tuple[int, int]]:
        """Return where A and B of each parameter begin."""
        starts, at_A, at_B = {}, 0, self.a_width
        for name, out, inside in self.shapes:
            starts[name] = at_A, at_B
            at_A, at_B = at_A + self.rank * out, at_B + self.rank * inside
        return starts

    def factors(self, rows_KV: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Return views A_KOR and B_KIR of the rows, by name."""
        starts = self.starts()
        return {
            name: (self._view(rows_KV, starts[name][0], out), self._view(rows_KV, starts[name][1], inside))
            for name, out, inside in self.shapes
        }

    def _view(self, rows_KV: Tensor, start: int, features: int) -> Tensor:
        return rows_KV[:, start : start + self.rank * features].unflatten(1, (self.rank, features)).transpose(1, 2)


def served_rows(
    noise: NoiseSpec, pairs_K: Tensor, layout: RowLayout, dtype: torch.dtype, device: torch.device = CPU
) -> Tensor:
    """Return the rows of pairs [K, V]: see `noise.served_factors_of`."""
    rows_KV = torch.empty(len(pairs_K), layout.width, dtype=dtype, device=device)
    fill(rows_KV, noise, pairs_K, layout)
    return rows_KV


def fill(rows_KV: Tensor, noise: NoiseSpec, pairs_K: Tensor, layout: RowLayout) -> None:
    """Write the rows of pairs into `rows_KV` [K, V], contiguous, on a CPU or GPU. Raises ValueError for others."""
    check_rows(rows_KV, noise, pairs_K, layout)
    if rows_KV.is_cuda:
        place(rows_KV, torch.arange(len(pairs_K)), noise, pairs_K, torch.zeros_like(pairs_K), layout)
        return
    library = build.library()
    if library is not None:
        fill_native(library, rows_KV, noise, pairs_K, layout)
        return
    made = definition.served_factors_of(noise, pairs_K, layout.shapes, rows_KV.dtype, "cpu", layout.offsets)
    for name, (A_KOR, B_KIR) in layout.factors(rows_KV).items():
        A_KOR.copy_(made[name][0])
        B_KIR.copy_(made[name][1])


def place(
    rows_SV: Tensor, row_K: Tensor, noise: NoiseSpec, pairs_K: Tensor, negative_K: Tensor, layout: RowLayout
) -> None:
    """Write pair k into row row_K[k] of `rows_SV` on a GPU, with A negated where `negative_K`; other rows stay.

    Rows are contiguous in themselves; the three vectors of K are on the CPU. Raises ValueError for noise of another
    rank than the rows', and for rows that do not exist.
    """
    from eggroll_llm.kernels.noise_triton import place_triton

    check_format("rows", rows_SV)
    if noise.rank != layout.rank or rows_SV.shape[1:] != (layout.width,) or rows_SV.stride(1) != 1:
        raise ValueError(f"noise of rank {noise.rank} does not fit rows {[*rows_SV.shape]} of rank {layout.rank}")
    if len(row_K):
        if not 0 <= int(row_K.min()) <= int(row_K.max()) < len(rows_SV):
            raise ValueError(f"a row is none of the {len(rows_SV)} that there are")
        where_3K = torch.stack([row_K, pairs_K, negative_K.long()])
        place_triton(rows_SV, where_3K, noise, *_on_gpu(layout, rows_SV.device))


@cache
def _on_gpu(layout: RowLayout, device: torch.device) -> tuple[dict[Size, tuple[Tensor, Tensor, Tensor]], Tensor]:
    """Return noise ids and starts of A and B of the parameters of each size, and the tables."""
    starts = layout.starts()
    sizes = {
        size: (
            torch.tensor([parameter_id(name) for name in names], device=device),
            torch.tensor([starts[name][0] for name in names], device=device),
            torch.tensor([starts[name][1] for name in names], device=device),
        )
        for size, names in names_by_size(layout.shapes, layout.offsets).items()
    }
    return sizes, torch.tensor(TABLES, dtype=torch.float32, device=device)


def check_rows(rows_KV: Tensor, noise: NoiseSpec, pairs_K: Tensor, layout: RowLayout) -> None:
    """Raise ValueError for what `fill` does not take."""
    if noise.rank != layout.rank:
        raise ValueError(f"noise of rank {noise.rank} does not fit rows of rank {layout.rank}")
    check_format("rows", rows_KV)
    device = rows_KV.device if rows_KV.is_cuda else CPU
    check_array("rows", rows_KV, (len(pairs_K), layout.width), rows_KV.dtype, device)


def fill_native(library: ctypes.CDLL, rows_KV: Tensor, noise: NoiseSpec, pairs_K: Tensor, layout: RowLayout) -> None:
    """Write the rows of pairs as `library` computes them."""
    pairs_K = pairs_K.to(device="cpu", dtype=torch.int64).contiguous()
    starts, function = layout.starts(), _functions(library)[rows_KV.dtype]
    for size, names in names_by_size(layout.shapes, layout.offsets).items():
        function(
            rows_KV.data_ptr(),
            layout.width,
            (ctypes.c_int64 * len(names))(*(starts[name][0] for name in names)),
            (ctypes.c_int64 * len(names))(*(starts[name][1] for name in names)),
            pairs_K.data_ptr(),
            (ctypes.c_uint32 * len(names))(*map(parameter_id, names)),
            len(pairs_K),
            len(names),
            *size,
            noise.rank,
            noise.sigma / math.sqrt(noise.rank),
            noise.step,
            noise.seed,
            (ctypes.c_float * len(TABLES))(*TABLES),
        )


def served_factors_of(
    noise: NoiseSpec,
    pairs_K: Tensor,
    shapes: Sequence[Shape],
    dtype: torch.dtype,
    device: torch.device | str,
    offsets: Sequence[Offset] = (),
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A_KOR and B_KIR by name like `noise.served_factors_of`, as views of rows."""
    device = torch.device(device)
    if device.type == "cpu" and build.library() is None:
        return definition.served_factors_of(noise, pairs_K, shapes, dtype, device, offsets)
    layout = RowLayout(tuple(shapes), noise.rank, tuple(offsets))
    return layout.factors(served_rows(noise, pairs_K, layout, dtype, device))


@cache
def _functions(library: ctypes.CDLL) -> dict[torch.dtype, Callable[..., None]]:
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    rows_and_sizes = (pointer, number, *[pointer] * 4, *[number] * 7)
    noise = (ctypes.c_float, ctypes.c_uint32, ctypes.c_uint64, pointer)
    return by_dtype(library, "factors", (*rows_and_sizes, *noise))
