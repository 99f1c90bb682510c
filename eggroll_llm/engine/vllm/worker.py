"""The extension of vLLM's worker: installs the population into a loaded model. Knows vLLM 0.32's internals.

vLLM mixes `EsWorkerExtension` into its worker class; `es_start` builds a `Population`, `es_call` reaches its methods.
What is replaced, on instances only: how the adapter manager makes adapters resident (members are placed, nothing is
loaded from disk), and on CPU the linear layers' adapter arithmetic (`member_term`), whose stock version is slow and
applies the last slot's adapter to tokens without one, and the model's norms and activations (`fused`, or `compiled`).
"""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform

from eggroll_llm.engine.interface import UpdateTimes
from eggroll_llm.engine.vllm import norms
from eggroll_llm.engine.vllm.compiled import compile_model
from eggroll_llm.engine.vllm.layers import Layer, find_layers
from eggroll_llm.engine.vllm.slots import FactorBank, MemberSlots, PaddedBuffers, RowBuffers
from eggroll_llm.engine.vllm.weights import (
    ServedWeights,
    initial_weights,
    is_quantised,
    keep_linear_weights,
    keep_quantised_weights,
)
from eggroll_llm.engine.vllm.whole_model import WholeModel, count_ranks_uncompiled
from eggroll_llm.es.estimate import UpdateSpec
from eggroll_llm.es.masters import MasterWeights
from eggroll_llm.es.noise import NoiseSpec
from eggroll_llm.es.settings import EsSettings
from eggroll_llm.kernels.fold import fold_for
from eggroll_llm.kernels.member_term import AddTerm, graph_operator, implementation
from eggroll_llm.system.hardware import cxx_compiler

log = logging.getLogger(__name__)

keep_quantised_weights()  # vLLM imports this module before it loads the model
if current_platform.is_cpu():
    keep_linear_weights()
    count_ranks_uncompiled()


class EsWorkerExtension:
    """Methods added to vLLM's worker; the prefix keeps them from clashing with its own."""

    def es_start(self, **settings: Any) -> dict[str, tuple[int, int]]:
        """Install a `Population` of these settings; return the (out, in) shape of every trained parameter."""
        self.es_population = Population(self.model_runner, **settings)  # type: ignore[attr-defined]
        return {name: (out, inside) for name, out, inside in self.es_population.bank.shapes}

    def es_call(self, method: str, *args: Any) -> Any:
        """Call a method of the population."""
        return getattr(self.es_population, method)(*args)


class Population:
    """Slots, factors and master weights inside a vLLM worker."""

    def __init__(
        self, model_runner: Any, *, rank: int, es: EsSettings | None, offload: bool, compiled: bool, stock: bool
    ) -> None:
        """Without `es` there are no masters. `stock` leaves vLLM's arithmetic as it is on CPU too."""
        lora_manager = model_runner.lora_manager
        self._adapters = adapters = lora_manager._adapter_manager
        adapters.remove_all_adapters()
        self.device, self.dtype = model_runner.device, model_runner.model_config.dtype
        self._model = model_runner.model
        self.layers = find_layers(adapters.modules, adapters.packed_modules_mapping)
        self.bank = FactorBank(self.layers, rank, self.dtype, self.device)
        ours = self.device.type == "cpu" and not stock
        buffers = RowBuffers if ours else PaddedBuffers
        self.slots = MemberSlots(buffers(self.layers, self.bank, adapters.lora_slots), adapters.lora_slots)
        weights = initial_weights(model_runner.model, self.layers)
        if es is not None:
            offload = offload and self.device.type != "cpu"  # a CPU's masters are in the host's memory anyway
            fold = fold_for(self.device)
            self.masters = MasterWeights(weights, es, self.dtype, fold, device=self.device, offload=offload)
        lora_manager._apply_adapters = self._place
        lora_manager._load_adapter = _refuse_to_load
        if ours:
            if compiled and cxx_compiler() is None:
                log.warning(
                    "engine.enforce_eager = false: no C++ compiler, which the CPU needs for it; running eagerly"
                )
                compiled = False
            self._install_on_cpu(model_runner, compiled)

    def begin(self, noise: NoiseSpec, population: int, antithetic: bool) -> float:
        """Take the noise of a step; return the seconds it took."""
        start = time.perf_counter()
        self.bank.begin(noise, population // 2 if antithetic else population)
        self.slots.begin(antithetic=antithetic)
        if self.device.type != "cpu":
            torch.accelerator.synchronize()  # kernels run on after the call that asks for them
        return time.perf_counter() - start

    def update(self, spec: UpdateSpec) -> UpdateTimes:
        """Apply an update to the masters and serve the result."""
        start = time.perf_counter()
        served = ServedWeights(self.layers, self.device, self.dtype)
        report = self.masters.apply(spec, self.bank.factors_of, served)
        return UpdateTimes(report=report, update=time.perf_counter() - start - served.seconds, serve=served.seconds)

    def serve(self) -> None:
        """Make vLLM compute with the masters."""
        self.masters.serve(ServedWeights(self.layers, self.device, self.dtype))

    def replay(self, specs: list[UpdateSpec]) -> None:
        """Apply recorded updates, then serve once."""
        for spec in specs:
            self.masters.apply(spec, self.bank.factors_of)
        self.serve()

    def served_weights(self) -> dict[str, Tensor]:
        """Return the served weights by Hugging Face name, on CPU."""
        return {name: self.masters.served(name).cpu() for name, _, _ in self.bank.shapes}

    def checksum(self) -> str:
        """Return a short hash of the served weights."""
        return self.masters.checksum()

    def state(self) -> dict[str, Tensor]:
        """Return masters and optimizer state."""
        return {name: tensor.cpu() for name, tensor in self.masters.state().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore masters and optimizer state exactly, and serve them."""
        self.masters.load_state(state)
        self.serve()

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Serve all of these weights, by their names in the checkpoint."""
        WholeModel(self._model, self.layers).load(weights, ServedWeights(self.layers, self.device, self.dtype))

    def _place(self, requests: set[LoRARequest]) -> None:
        """Adapter ids are member + 1. Called by vLLM before each forward pass with the requests' adapters."""
        if self.slots.place({request.lora_int_id - 1 for request in requests}):
            self._adapters.lora_index_to_id = [
                None if member is None else member + 1 for member in self.slots.member_in
            ]

    def _install_on_cpu(self, model_runner: Any, compiled: bool) -> None:
        tokens = SlotOfTokens(model_runner.max_num_tokens, model_runner.max_num_tokens, self.device)
        # The first use on a machine compiles C++, which must not fall into the first step.
        add_term = graph_operator() if compiled else implementation()
        for layer in self.layers:
            layer.module.apply = _linear_with_term(layer, tokens.slot_T, add_term)
        for name in self._adapters.punica_wrapper_mapping:
            self._adapters.punica_wrapper_mapping[name] = tokens
        self._adapters._last_mapping = None
        if compiled:
            compile_model(model_runner.model)
        else:
            norms.install(model_runner.model)


class SlotOfTokens(PunicaWrapperCPU):
    """Where vLLM says which adapter each token belongs to, once per forward pass."""

    def __init__(self, max_num_batched_tokens: int, max_batches: int, device: torch.device) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device)
        self.slot_T = torch.full((max_num_batched_tokens,), -1, dtype=torch.int32)

    def update_metadata(
        self, mapping: LoRAMapping, lora_index_to_id: list[int | None], *args: Any, **kwargs: Any
    ) -> None:
        """Turn the adapter id of every token into its slot."""
        id_T = np.asarray(mapping.index_mapping, dtype=np.int64)
        slot_of_id = np.full(max(id_T.max(initial=0), *(i or 0 for i in lora_index_to_id)) + 1, -1, dtype=np.int32)
        for slot, adapter_id in enumerate(lora_index_to_id):
            if adapter_id is not None:
                slot_of_id[adapter_id] = slot
        self.slot_T.fill_(-1)
        self.slot_T[: len(id_T)] = torch.from_numpy(slot_of_id[id_T])


def _linear_with_term(layer: Layer, slot_T: Tensor, add_term: AddTerm) -> Callable[..., Tensor]:
    """Return the layer's x -> x W^T + A_s (B_s^T x); vLLM's A is our B, and the scale is in A already.

    x is [T, I], or [1, T, I] where vLLM serves a model of transformers through its Transformers backend.
    """
    base_layer, slices = layer.module.base_layer, list(layer.sizes)
    (B_SCRI,), (A_SV,) = layer.module.lora_a_stacked, layer.module.lora_b_stacked
    quantised = is_quantised(base_layer.weight)

    def apply(x: Tensor, bias: Tensor | None = None) -> Tensor:
        y: Tensor = (
            base_layer.quant_method.apply(base_layer, x, bias)
            if quantised
            else base_layer.cpu_linear(x, base_layer.weight, bias)
        )
        x_TI = x.reshape(-1, x.shape[-1]).contiguous()
        add_term(y.view(-1, y.shape[-1]), x_TI, A_SV, B_SCRI, slot_T, slices)
        return y

    return apply


def _refuse_to_load(request: LoRARequest) -> None:
    raise AssertionError(f"adapter {request.lora_name!r} would be read from disk; members never are")
