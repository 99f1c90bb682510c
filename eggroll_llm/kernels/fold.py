"""`es.estimate.Fold` of a device: products, their sum with a weight and its rounding in one pass over it.

On a CPU that is `fold.cpp`, or torch operations where it cannot be built; on a GPU `fold_triton`.
"""

import ctypes

import torch
from torch import Tensor

from eggroll_llm.es.estimate import Fold, Products, fold_with_torch, marking_the_last
from eggroll_llm.kernels import build
from eggroll_llm.kernels.binding import by_dtype, check_array, check_format


def fold_for(device: torch.device) -> Fold:
    """Return the fold of a device; engine and replay have to use the same, as their bits differ in the last place."""
    if device.type == "cuda":
        from eggroll_llm.kernels.fold_triton import fold_triton

        return fold_triton
    library = build.library()
    return fold_with_torch if library is None else bind(library)


def bind(library: ctypes.CDLL) -> Fold:
    """Return the fold of a library. It raises ValueError for tensors that C++ must not be given."""
    functions = by_dtype(library, "fold", [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 3)

    def fold(to_OI: Tensor, products: Products, served_OI: Tensor | None) -> None:
        out, inside = len(to_OI), to_OI.shape[-1]
        check_array("the weight", to_OI, (out, inside), torch.float32)
        if served_OI is not None:
            check_format("the served weight", served_OI)
            check_array("the served weight", served_OI, (out, inside), served_OI.dtype)
        for columns_A, columns_B, last in marking_the_last(products):
            served = served_OI if last else None
            columns_A, columns_B = columns_A.contiguous(), columns_B.contiguous()
            terms = len(columns_A)
            check_array("columns of A", columns_A, (terms, out), torch.float32)
            check_array("columns of B", columns_B, (terms, inside), torch.float32)
            functions[torch.float32 if served is None else served.dtype](
                to_OI.data_ptr(),
                None if served is None else served.data_ptr(),
                columns_A.data_ptr(),
                columns_B.data_ptr(),
                terms,
                out,
                inside,
            )

    return fold
