"""Functions of the compiled library by the number format of their tensors."""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch

SUFFIXES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def by_dtype(library: ctypes.CDLL, name: str, argtypes: Sequence[Any]) -> dict[torch.dtype, Callable[..., None]]:
    """Return `eggroll_<name>_<format>` of the library for each format, with these arguments and no result."""
    functions = {}
    for dtype, suffix in SUFFIXES.items():
        function = getattr(library, f"eggroll_{name}_{suffix}")
        function.argtypes, function.restype = list(argtypes), None
        functions[dtype] = function
    return functions
