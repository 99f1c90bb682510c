"""The weights that vLLM serves: read at the start, rewritten in place from the float32 masters after an update.

CPU: vLLM packs each weight for its matrix product and drops the original, so `keep_linear_weights` must have run before
the model loads, and a rewrite packs anew. CUDA: `copy_` into the weight, whose address the captured graphs keep.

FP8: vLLM quantises each row of a weight as it loads it, with a scale of its own. A rewrite does the same to the row's
new rounding, in place, so what is served is what vLLM would load from the exported model.

On CPU the product also gets a second row where there is only one: for a single row oneDNN adds up more than 1024
features in another order, and the last sequence of a batch to finish would be answered differently.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers import utils as vllm_layer_utils
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.quantization.online import fp8 as vllm_fp8
from vllm.platforms import current_platform

from eggroll_llm.engine.vllm.layers import Layer
from eggroll_llm.errors import ModelError

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


def keep_quantised_weights() -> None:
    """Leave a copy of each weight that vLLM quantises for `initial_weights`, in the host's memory."""
    quantise = vllm_fp8.Fp8PtpcOnlineLinearMethod.process_weights_after_loading

    def quantise_and_keep(method: Any, layer: Any) -> None:
        weight = layer.weight.data
        quantise(method, layer)
        if not is_quantised(weight):  # else it was called again
            layer.es_loaded_weight = weight.cpu()  # on a GPU the key-value cache would get so much less

    vllm_fp8.Fp8PtpcOnlineLinearMethod.process_weights_after_loading = quantise_and_keep


def is_quantised(weight: Tensor) -> bool:
    """Return whether a weight of a linear layer is in FP8."""
    return weight.dtype is torch.float8_e4m3fn


def keep_linear_weights() -> None:
    """Make vLLM pack as this module does, and leave a reference to the weight that it drops for `initial_weights`."""

    def pack_and_keep(layer: Any, remove_weight: bool) -> None:
        weight = layer.weight.data
        _pack(layer, remove_weight=remove_weight)
        if remove_weight:
            layer.es_loaded_weight = weight

    vllm_layer_utils.dispatch_cpu_unquantized_gemm = pack_and_keep


def leave_experts_alone() -> None:
    """Make vLLM compute the experts of a mixture as it does without adapters: members have no factors for them.

    With adapters it takes a Triton kernel on every device, and a CPU has no Triton.
    """
    complete = FusedMoEConfig.__post_init__

    def without_adapters(config: Any) -> None:
        config.is_lora_enabled = False
        complete(config)

    FusedMoEConfig.__post_init__ = without_adapters


def initial_weights(model: torch.nn.Module, layers: Sequence[Layer]) -> dict[str, Tensor]:
    """Return views of the loaded weight of every slice and forget the references that the functions above made.

    Raises ModelError when vLLM keeps a quantised weight otherwise than `quantise_rows` would rewrite it.
    """
    weights = {}
    for layer in layers:
        fused = _loaded(layer.module.base_layer)
        if fused.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise TypeError(f"layer {layer.name!r} holds {fused.dtype}: only unquantised models can be trained")
        base_layer = layer.module.base_layer
        if is_quantised(base_layer.weight):
            right = quantise_rows(fused.to(base_layer.weight.device), base_layer)
            kept = quantised_rows(base_layer)
            if not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(kept, right, strict=True)):
                raise ModelError(
                    f"layer {layer.name!r}: vLLM keeps its FP8 weights in a form of their own here, which an update "
                    'cannot rewrite: set engine.quantization to "none"'
                )
        for parameter, begin, end in layer.slices():
            weights[parameter] = fused[begin:end]
    forget_linear_weights(model)
    return weights


def forget_linear_weights(model: torch.nn.Module) -> None:
    """Drop the references to loaded weights."""
    for module in model.modules():
        vars(module).pop("es_loaded_weight", None)


def _loaded(base_layer: Any) -> Tensor:
    return getattr(base_layer, "es_loaded_weight", base_layer.weight.data)


def quantise_rows(weight: Tensor, base_layer: Any) -> tuple[Tensor, Tensor]:
    """Return FP8 values [O, I] and float32 scales [O, 1] of a layer's weight, or some rows of it, to vLLM's bits.

    Where ranks have parts of each row, all must call it: a row's scale is that of the whole row.
    """
    largest = vllm_fp8.amax_for_tp_weight_quant(
        weight.abs().amax(dim=-1, keepdim=True), vllm_fp8._is_tp_sharded(base_layer, reduces_output_dim=False)
    )
    scale = vllm_fp8._fp8_channel_scale(largest)
    return vllm_fp8._fp8_quant_per_channel(weight, scale), scale


def quantised_rows(base_layer: Any) -> tuple[Tensor, Tensor]:
    """Return the values and scales that a linear layer computes with, in memory that it shares."""
    return base_layer.weight.data.t(), base_layer.weight_scale.data


class ServedWeights:
    """Where the masters' roundings go (`update.Served`). A layer is served once the last of its slices is there."""

    def __init__(self, layers: Sequence[Layer], device: torch.device, dtype: torch.dtype) -> None:
        self.dtype, self._device = dtype, device
        self._place = {name: (layer, begin, end) for layer in layers for name, begin, end in layer.slices()}
        self._last = {layer.parameters[-1] for layer in layers}
        self._memory = torch.empty(0, dtype=dtype, device=device)
        self._fused: Tensor | None = None
        self.seconds = 0.0
        """Spent on packing so far."""

    def room(self, name: str) -> Tensor:
        """Return the rows of this parameter in its layer's weight, or where they wait to be packed or quantised."""
        layer, begin, end = self._place[name]
        weight: Tensor = layer.module.base_layer.weight
        if is_quantised(weight):
            return self._scratch(end - begin, layer.in_features)
        if self._device.type != "cpu":
            return weight[begin:end]
        if self._fused is None:
            self._fused = self._scratch(sum(layer.sizes), layer.in_features)
        return self._fused[begin:end]

    def written(self, name: str) -> None:
        """Serve the rows, or the layer if this was its last slice."""
        start = time.perf_counter()
        layer, begin, end = self._place[name]
        base_layer = layer.module.base_layer
        if is_quantised(base_layer.weight):
            rows = quantise_rows(self._scratch(end - begin, layer.in_features), base_layer)
            for kept, new in zip(quantised_rows(base_layer), rows, strict=True):
                kept[begin:end].copy_(new)
        elif self._fused is not None and name in self._last:
            repack(base_layer, self._fused)
            if base_layer.weight.numel() or current_platform.is_zen_cpu():
                self._memory = self._memory[:0]  # the layer computes with it; else there is a packed copy
            self._fused = None
        self.seconds += time.perf_counter() - start

    def _scratch(self, rows: int, columns: int) -> Tensor:
        if len(self._memory) < rows * columns:
            self._memory = torch.empty(rows * columns, dtype=self.dtype, device=self._device)
        return self._memory[: rows * columns].view(rows, columns)


def repack(base_layer: Any, weight: Tensor) -> None:
    """Make a linear layer on CPU compute with `weight` [out features, in features], which is not kept."""
    base_layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    _pack(base_layer, remove_weight=True)
