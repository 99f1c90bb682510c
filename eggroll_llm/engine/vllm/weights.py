"""The weights that vLLM serves: read at the start, rewritten in place from the float32 masters after an update.

CPU: vLLM packs each weight for its matrix product and drops the original, so `keep_linear_weights` must have run before
the model loads, and a rewrite packs anew. CUDA: `copy_` into the weight, whose address the captured graphs keep.

On CPU the product also gets a second row where there is only one: for a single row oneDNN adds up more than 1024
features in another order, and the last sequence of a batch to finish would be answered differently.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers import utils as vllm_layer_utils
from vllm.platforms import current_platform

from eggroll_llm.engine.vllm.layers import Layer

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""x [..., in features], weight (unused where packed), bias -> [..., out features]."""

_pack_as_vllm = vllm_layer_utils.dispatch_cpu_unquantized_gemm


def _pack(layer: Any, *, remove_weight: bool) -> None:
    _pack_as_vllm(layer, remove_weight=remove_weight)
    if hasattr(layer, "cpu_linear"):  # a convolution or a stack of experts has none
        layer.cpu_linear = _never_one_row(layer.cpu_linear)


def _never_one_row(linear: Linear) -> Linear:
    def apply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if x.numel() != x.shape[-1]:
            return linear(x, weight, bias)
        return linear(torch.cat((x, x)), weight, bias)[:1]

    return apply


def keep_linear_weights() -> None:
    """Make vLLM pack as this module does, and leave a reference to the weight that it drops for `initial_weights`."""

    def pack_and_keep(layer: Any, remove_weight: bool) -> None:
        weight = layer.weight.data
        _pack(layer, remove_weight=remove_weight)
        if remove_weight:
            layer.es_loaded_weight = weight

    vllm_layer_utils.dispatch_cpu_unquantized_gemm = pack_and_keep


def initial_weights(model: torch.nn.Module, layers: Sequence[Layer]) -> dict[str, Tensor]:
    """Return views of the loaded weight of every slice and forget the references that `keep_linear_weights` made."""
    weights = {}
    for layer in layers:
        fused = _loaded(layer.module.base_layer)
        if fused.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise TypeError(f"layer {layer.name!r} holds {fused.dtype}: only unquantised models can be trained")
        for parameter, begin, end in layer.slices():
            weights[parameter] = fused[begin:end]
    forget_linear_weights(model)
    return weights


def forget_linear_weights(model: torch.nn.Module) -> None:
    """Drop the references that `keep_linear_weights` made."""
    for module in model.modules():
        vars(module).pop("es_loaded_weight", None)


def _loaded(base_layer: Any) -> Tensor:
    return getattr(base_layer, "es_loaded_weight", base_layer.weight.data)


class ServedWeights:
    """Where the masters' roundings go (`update.Served`). A layer is served once the last of its slices is there."""

    def __init__(self, layers: Sequence[Layer], device: torch.device, dtype: torch.dtype) -> None:
        self.dtype, self._packs = dtype, device.type == "cpu"
        self._place = {name: (layer, begin, end) for layer in layers for name, begin, end in layer.slices()}
        self._last = {layer.parameters[-1] for layer in layers}
        self._memory = torch.empty(0, dtype=dtype)
        self._fused: Tensor | None = None
        self.seconds = 0.0
        """Spent on packing so far."""

    def room(self, name: str) -> Tensor:
        """Return the rows of this parameter in the weight of its layer."""
        layer, begin, end = self._place[name]
        if not self._packs:
            weight: Tensor = layer.module.base_layer.weight
            return weight[begin:end]
        if self._fused is None:
            rows, columns = sum(layer.sizes), layer.in_features
            if len(self._memory) < rows * columns:
                self._memory = torch.empty(rows * columns, dtype=self.dtype)
            self._fused = self._memory[: rows * columns].view(rows, columns)
        return self._fused[begin:end]

    def written(self, name: str) -> None:
        """Serve the layer if this was its last slice."""
        if self._fused is not None and name in self._last:
            start = time.perf_counter()
            base_layer = self._place[name][0].module.base_layer
            repack(base_layer, self._fused)
            if base_layer.weight.numel() or current_platform.is_zen_cpu():
                self._memory = self._memory[:0]  # the layer computes with it; else there is a packed copy
            self._fused = None
            self.seconds += time.perf_counter() - start


def repack(base_layer: Any, weight: Tensor) -> None:
    """Make a linear layer on CPU compute with `weight` [out features, in features], which is not kept."""
    base_layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    _pack(base_layer, remove_weight=True)
