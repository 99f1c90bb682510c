"""The population through a compiled model, on CPU.

vLLM does not compile a model with adapters on CPU. Here it can be: the member term is an operator inside the graph, and
weights sit behind handles that the graph reads at every call, so that an update needs no new compilation.
"""

from typing import Any

import torch

# As vLLM sets them for its own compilation on CPU, and without guards: shapes are dynamic, nothing else changes.
OPTIONS: dict[str, Any] = {
    "dce": True,
    "size_asserts": False,
    "nan_asserts": False,
    "epilogue_fusion": True,
    "cpp.dynamic_threads": True,
    "guard_filter_fn": torch.compiler.skip_all_guards_unsafe,
}


def compile_model(model: torch.nn.Module) -> None:
    """Compile the transformer inside `model` at its first forward pass."""
    # Without guards, code compiled for an earlier engine of this process would be taken for this one's.
    torch._dynamo.reset()
    inner: Any = next(module for module in model.modules() if hasattr(module, "do_not_compile"))
    inner.forward = torch.compile(inner.forward, fullgraph=True, dynamic=True, backend="inductor", options=OPTIONS)
