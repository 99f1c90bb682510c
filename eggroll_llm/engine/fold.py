"""`update.Fold` for the CPU: products, their sum with a weight and its rounding in one pass over it (`fold.cpp`)."""

import ctypes

import torch
from torch import Tensor

from eggroll_llm.engine import native
from eggroll_llm.engine.binding import by_dtype
from eggroll_llm.update import Fold, Products, fold_with_torch


def fold_for(device: torch.device) -> Fold:
    """Return the fold of a device; engine and replay have to use the same, as their bits differ in the last place."""
    library = native.library() if device.type == "cpu" else None
    return fold_with_torch if library is None else bind(library)


def bind(library: ctypes.CDLL) -> Fold:
    """Return the fold of a library."""
    functions = by_dtype(library, "fold", [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 3)

    def fold(to_OI: Tensor, products: Products, served_OI: Tensor | None) -> None:
        for i, (columns_A, columns_B) in enumerate(products):
            served = served_OI if i == len(products) - 1 else None
            columns_A, columns_B = columns_A.contiguous(), columns_B.contiguous()
            assert to_OI.is_contiguous()
            assert served is None or served.is_contiguous()
            functions[torch.float32 if served is None else served.dtype](
                to_OI.data_ptr(),
                None if served is None else served.data_ptr(),
                columns_A.data_ptr(),
                columns_B.data_ptr(),
                len(columns_A),
                *to_OI.shape,
            )

    return fold
