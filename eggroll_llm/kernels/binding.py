"""Functions of the compiled library by the number format of their tensors, and what tensors they may be given.

C++ and Triton get bare addresses and sizes: a tensor that is not what the sizes say is memory of something else.
"""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

CPU = torch.device("cpu")
SUFFIXES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def by_dtype(
    library: ctypes.CDLL, name: str, argtypes: Sequence[Any], restype: Any = None
) -> dict[torch.dtype, Callable[..., Any]]:
    """Return `eggroll_<name>_<format>` of the library for each format, with these arguments and result."""
    functions = {}
    for dtype, suffix in SUFFIXES.items():
        function = getattr(library, f"eggroll_{name}_{suffix}")
        function.argtypes, function.restype = list(argtypes), restype
        functions[dtype] = function
    return functions


def check_array(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device = CPU
) -> None:
    """Raise ValueError unless `tensor` lies in the device's memory in one piece, with this shape and number format."""
    fits = tensor.shape == shape and tensor.dtype is dtype and tensor.device == device
    if not fits or not tensor.is_contiguous():
        raise array_error(name, tensor, f"contiguous {dtype} {list(shape)} on {device}")


def check_format(name: str, tensor: Tensor) -> None:
    """Raise ValueError for a tensor of a number format that the library does not compute with."""
    if tensor.dtype not in SUFFIXES:
        raise array_error(name, tensor, f"one of {', '.join(map(str, SUFFIXES))}")


def array_error(name: str, tensor: Tensor, expected: str) -> ValueError:
    """Return the error for an argument that is not as expected."""
    return ValueError(
        f"{name} is {tensor.dtype} {list(tensor.shape)} with strides {list(tensor.stride())} on {tensor.device}, and "
        f"must be {expected}"
    )
