"""The weights that vLLM serves: read at the start, rewritten in place from the float32 masters after an update.

CPU: vLLM packs each weight for its matrix product and drops the original, so `keep_linear_weights` must have run before
the model loads, and a rewrite packs anew. CUDA: `copy_` into the weight, whose address the captured graphs keep.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers import utils as vllm_layer_utils

from eggroll_llm.engine.layers import Layer
from eggroll_llm.update import MasterWeights

_pack = vllm_layer_utils.dispatch_cpu_unquantized_gemm


def keep_linear_weights() -> None:
    """Make vLLM's CPU packing leave a reference to the weight that it drops, for `initial_weights` to collect."""

    def pack_and_keep(layer: torch.nn.Module, remove_weight: bool) -> None:
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
    for module in model.modules():
        vars(module).pop("es_loaded_weight", None)
    return weights


def _loaded(base_layer: Any) -> Tensor:
    return getattr(base_layer, "es_loaded_weight", base_layer.weight.data)


@torch.no_grad()
def serve(masters: MasterWeights, layers: Sequence[Layer], device: torch.device) -> None:
    """Make vLLM compute with the rounded masters from the next forward pass on."""
    for layer in layers:
        base_layer = layer.module.base_layer
        if device.type == "cpu":
            fused = torch.empty(sum(layer.sizes), layer.in_features, dtype=masters.served_dtype)
            base_layer.weight = torch.nn.Parameter(fused, requires_grad=False)
        for parameter, begin, end in layer.slices():
            masters.write_served(parameter, base_layer.weight[begin:end])
        if device.type == "cpu":
            _pack(base_layer, remove_weight=True)
