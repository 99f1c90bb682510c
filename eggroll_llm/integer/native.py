"""The model and the sum of an update as compiled, with the bits of `model` and `update`, or these themselves."""

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from eggroll_llm.integer import model, update
from eggroll_llm.integer.model import LAYOUT, SHAPES, WIDTH, Weights
from eggroll_llm.kernels import build
from eggroll_llm.kernels.binding import check_array

Forward = Callable[[Weights, Tensor, Tensor, Tensor | None], Tensor]
"""`model.forward_with_torch`, or the same."""
AddPairs = Callable[[dict[str, Tensor], Tensor, Tensor], None]
"""`update.add_pairs_with_torch`, or the same."""


@cache
def functions() -> tuple[Forward, AddPairs]:
    """Return the fastest that this machine has."""
    library = build.library()
    if library is None:
        return model.forward_with_torch, update.add_pairs_with_torch
    return bind(library)


def bind(library: ctypes.CDLL) -> tuple[Forward, AddPairs]:
    """Return the functions of a library. They raise ValueError for tensors that C++ must not be given."""
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    run: Any = library.eggroll_integer_forward
    add: Any = library.eggroll_integer_sum
    run.argtypes, run.restype = [*[pointer] * 4, number, number, pointer, pointer, number, *[pointer] * 3], None
    add.argtypes, add.restype = [*[pointer] * 4, *[number] * 4], None
    starts = LAYOUT.starts()
    starts_P2 = (ctypes.c_int64 * (2 * len(SHAPES)))(*(start for name, _, _ in SHAPES for start in starts[name]))

    def forward(weights: Weights, text_MT: Tensor, state_MD: Tensor, rows_KV: Tensor | None) -> Tensor:
        members = len(text_MT)
        for name, out, inside in SHAPES:
            check_array(name, weights[name], (out, inside) if inside else (out,), torch.int8)
        check_array("the text", text_MT, (members, text_MT.shape[1]), torch.uint8)
        check_array("the state", state_MD, (members, WIDTH), torch.int8)
        if rows_KV is not None:
            check_array("the noise", rows_KV, (-(-members // 2), LAYOUT.width), torch.int8)
        loss_M = torch.zeros(members, dtype=torch.int64)
        run(
            (ctypes.c_void_p * len(SHAPES))(*(weights[name].data_ptr() for name, _, _ in SHAPES)),
            *(table.data_ptr() for table in (model.EXP2, model.LOG2, model.INVERSE)),
            members,
            text_MT.shape[1] - 1,
            text_MT.data_ptr(),
            None if rows_KV is None else rows_KV.data_ptr(),
            LAYOUT.width,
            starts_P2,
            state_MD.data_ptr(),
            loss_M.data_ptr(),
        )
        return loss_M

    def add_pairs(sums: dict[str, Tensor], rows_KV: Tensor, coefficient_K: Tensor) -> None:
        pairs = len(coefficient_K)
        check_array("the noise", rows_KV, (pairs, LAYOUT.width), torch.int8)
        check_array("the coefficients", coefficient_K, (pairs,), torch.int32)
        for name, out, inside in SHAPES:
            check_array(name, sums[name], (out, inside) if inside else (out,), torch.int64)
            at_A, at_B = (rows_KV.data_ptr() + start for start in starts[name])
            B = at_B if inside else None
            add(sums[name].data_ptr(), at_A, B, coefficient_K.data_ptr(), LAYOUT.width, pairs, out, inside)

    return forward, add_pairs
