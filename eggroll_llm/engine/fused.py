"""RMSNorm and SwiGLU of the served model in one pass each, on CPU without compilation.

vLLM composes both of torch operations there: at 128 sequences a seventh of a step of a 135M model. `fused.cpp` rounds
where those operations round, so that completions stay those of plain vLLM up to the order of one sum and the last bit
of an exponential. What cannot be built, or is called in another way than Llama and Qwen blocks do, is left to vLLM.
"""

import ctypes
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm

from eggroll_llm.engine import native
from eggroll_llm.engine.binding import by_dtype


def install(model: torch.nn.Module) -> None:
    """Replace the forward of every norm and activation that is covered, on the instances."""
    library = native.library()
    if library is None:
        return
    rms_norm, silu_and_mul = bind(library)
    module: Any
    for module in model.modules():
        if type(module) is RMSNorm and module.has_weight and module.variance_size_override is None:
            module._forward_method = partial(_norm, module, rms_norm)
        elif type(module) is SiluAndMul:
            module._forward_method = silu_and_mul


def _norm(module: Any, rms_norm: Callable[..., Tensor], x: Tensor, residual: Tensor | None = None) -> Any:
    covered = x.stride(-1) == 1 if residual is None else x.is_contiguous() and residual.is_contiguous()
    if not covered or x.ndim > 3 or module.weight.dtype != x.dtype:
        return module.forward_native(x, residual)
    y = rms_norm(x, residual, module.weight, module.variance_epsilon)
    return y if residual is None else (y, residual)


def bind(library: ctypes.CDLL) -> tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]]:
    """Return `rms_norm(x, residual or None, weight, epsilon)` and `silu_and_mul(x)` of a library.

    x is [rows, size] or [outer, inner, size] with contiguous rows. A residual is replaced by the sum.
    """
    norms = by_dtype(library, "rms_norm", [ctypes.c_void_p] * 4 + [ctypes.c_float] + [ctypes.c_int64] * 5)
    activations = by_dtype(library, "silu_and_mul", [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 2)

    def rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float) -> Tensor:
        y = torch.empty(x.shape, dtype=x.dtype)
        rows = (x.shape[0], 1, x.stride(0), 0) if x.ndim == 2 else (*x.shape[:2], *x.stride()[:2])
        norms[x.dtype](
            y.data_ptr(),
            x.data_ptr(),
            None if residual is None else residual.data_ptr(),
            weight.data_ptr(),
            epsilon,
            *rows,
            x.shape[-1],
        )
        return y

    def silu_and_mul(x: Tensor) -> Tensor:
        x = x.contiguous()
        size = x.shape[-1] // 2
        y = torch.empty((*x.shape[:-1], size), dtype=x.dtype)
        activations[x.dtype](y.data_ptr(), x.data_ptr(), y.numel() // size, size)
        return y

    return rms_norm, silu_and_mul
