"""RMSNorm and SwiGLU of the served model in one pass each, on CPU without compilation.

vLLM composes both of torch operations there: at 128 sequences a seventh of a step of a 135M model. `norms.cpp` rounds
where those operations round, so that completions stay those of plain vLLM up to the order of one sum and the last bit
of an exponential. What cannot be built, or is called in another way than Llama and Qwen blocks do, is left to vLLM.
"""

import copy
import ctypes
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm

from eggroll_llm.kernels import build
from eggroll_llm.kernels.binding import SUFFIXES, array_error, by_dtype, check_array, check_format


def install(model: torch.nn.Module) -> None:
    """Replace the forward of every norm and activation inside `model` that is covered, on the instances."""
    library = build.library()
    if library is None:
        return
    rms_norm, silu_and_mul = bind(library)
    module: Any
    for name, module in [*model.named_modules(remove_duplicate=False)]:
        if type(module) is RMSNorm and module.has_weight and module.variance_size_override is None:
            module._forward_method = partial(_norm, module, rms_norm)
        elif type(module) is SiluAndMul:
            # The Transformers backend takes the one activation of a registry for all models of the process.
            activation = copy.copy(module)
            activation._forward_method = silu_and_mul
            model.set_submodule(name, activation)


def _norm(module: Any, rms_norm: Callable[..., Tensor], x: Tensor, residual: Tensor | None = None) -> Any:
    covered = x.ndim in (2, 3) and x.stride(-1) == 1 and x.dtype == module.weight.dtype and x.dtype in SUFFIXES
    if residual is not None:
        covered &= residual.shape == x.shape and residual.dtype == x.dtype and residual.is_contiguous()
    if not covered:
        return module.forward_native(x, residual)
    y = rms_norm(x, residual, module.weight, module.variance_epsilon)
    return y if residual is None else (y, residual)


def bind(library: ctypes.CDLL) -> tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]]:
    """Return `rms_norm(x, residual or None, weight, epsilon)` and `silu_and_mul(x)` of a library.

    For the norm x is [rows, size] or [outer, inner, size] with contiguous rows, and a residual, contiguous, is replaced
    by the sum. Both raise ValueError for tensors that C++ must not be given.
    """
    norms = by_dtype(library, "rms_norm", [ctypes.c_void_p] * 4 + [ctypes.c_float] + [ctypes.c_int64] * 5)
    activations = by_dtype(library, "silu_and_mul", [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 2)

    def rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float) -> Tensor:
        check_format("x", x)
        if x.ndim not in (2, 3) or x.stride(-1) != 1 or not x.is_cpu:
            raise array_error("x", x, "two or three-dimensional with contiguous rows on the CPU")
        size = x.shape[-1]
        check_array("the norm's weight", weight, (size,), x.dtype)
        if residual is not None:
            check_array("the residual", residual, x.shape, x.dtype)
        y = torch.empty(x.shape, dtype=x.dtype)
        rows = (x.shape[0], 1, x.stride(0), 0) if x.ndim == 2 else (*x.shape[:2], *x.stride()[:2])
        norms[x.dtype](
            y.data_ptr(),
            x.data_ptr(),
            None if residual is None else residual.data_ptr(),
            weight.data_ptr(),
            epsilon,
            *rows,
            size,
        )
        return y

    def silu_and_mul(x: Tensor) -> Tensor:
        check_format("x", x)
        if x.ndim == 0 or x.shape[-1] % 2 or not x.is_cpu:
            raise array_error("x", x, "gate and up of one size in its last dimension, on the CPU")
        x = x.contiguous()
        size = x.shape[-1] // 2
        y = torch.empty((*x.shape[:-1], size), dtype=x.dtype)
        activations[x.dtype](y.data_ptr(), x.data_ptr(), x.shape[:-1].numel(), size)
        return y

    return rms_norm, silu_and_mul
