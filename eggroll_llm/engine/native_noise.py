"""`noise.served_factors_of` for the CPU, to the same bits, several times faster where C++ can be compiled."""

import ctypes
import math
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from eggroll_llm import noise as definition
from eggroll_llm.engine import native
from eggroll_llm.noise import NoiseSpec, Shape, parameter_id

CODE = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
# The digits of the definition; C++ has no copy of them.
TABLES = (*definition.MINUS_TWO_LOG, *definition.SINE, *definition.COSINE, -2 * math.log(2))


def served_factors_of(
    noise: NoiseSpec, pairs_K: Tensor, shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device | str
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A_KOR and B_KIR by parameter name: see `noise.served_factors_of`."""
    library = native.library() if torch.device(device).type == "cpu" else None
    if library is None:
        return definition.served_factors_of(noise, pairs_K, shapes, dtype, device)
    return served_factors_native(library, noise, pairs_K, shapes, dtype)


def served_factors_native(
    library: ctypes.CDLL, noise: NoiseSpec, pairs_K: Tensor, shapes: Sequence[Shape], dtype: torch.dtype
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the factors on the CPU, computed by `library`."""
    pairs_K = pairs_K.to(device="cpu", dtype=torch.int64).contiguous()
    names_of: dict[tuple[int, int], list[str]] = {}
    for name, out_features, in_features in shapes:
        names_of.setdefault((out_features, in_features), []).append(name)
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for (out_features, in_features), names in names_of.items():
        A_NKOR = torch.empty((len(names), len(pairs_K), out_features, noise.rank), dtype=dtype)
        B_NKIR = torch.empty((len(names), len(pairs_K), in_features, noise.rank), dtype=dtype)
        _function(library, dtype)(
            A_NKOR.data_ptr(),
            B_NKIR.data_ptr(),
            pairs_K.data_ptr(),
            (ctypes.c_uint32 * len(names))(*map(parameter_id, names)),
            len(pairs_K),
            len(names),
            out_features * noise.rank,
            in_features * noise.rank,
            noise.sigma / math.sqrt(noise.rank),
            noise.step,
            noise.seed,
            (ctypes.c_float * len(TABLES))(*TABLES),
        )
        factors |= {name: (A_NKOR[n], B_NKIR[n]) for n, name in enumerate(names)}
    return factors


@cache
def _function(library: ctypes.CDLL, dtype: torch.dtype) -> Callable[..., None]:
    function = getattr(library, f"eggroll_factors_{CODE[dtype]}")
    function.argtypes = (
        [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 4 + [ctypes.c_float, ctypes.c_uint32, ctypes.c_uint64]
    ) + [ctypes.c_void_p]
    function.restype = None
    return function
