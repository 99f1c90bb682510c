"""The population inside vLLM's worker. Knows vLLM 0.32's internals.

vLLM mixes `EsWorkerExtension` into its worker class; `es_call` reaches the methods of the `Population`, which exists as
soon as the model is loaded: before vLLM measures how much memory is left, and before it captures CUDA graphs. What is
replaced, on instances only: how members become resident and tokens get their slots (nothing is loaded from disk), and
the linear layers' adapter arithmetic with the norms and activations around it (`blocks`, `norms`). With
`stock`, a reference, vLLM's own arithmetic stays: on CPU it is slow and applies the last slot's adapter to tokens
without one, on CUDA most of its grid is empty.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

from eggroll_llm.engine.interface import UpdateTimes
from eggroll_llm.engine.token_tree import TokenTree
from eggroll_llm.engine.vllm import norms
from eggroll_llm.engine.vllm.arguments import POPULATION
from eggroll_llm.engine.vllm.failures import REFUSALS, Refused
from eggroll_llm.engine.vllm.layers import Layer, find_layers, parameter_parts
from eggroll_llm.engine.vllm.ranks import Ranks
from eggroll_llm.engine.vllm.scoring import Scorer
from eggroll_llm.engine.vllm.slots import (
    FactorBank,
    GpuRowBuffers,
    MemberSlots,
    PaddedBuffers,
    RowBuffers,
    SlotOfTokens,
)
from eggroll_llm.engine.vllm.weights import (
    ServedWeights,
    initial_weights,
    is_quantised,
    keep_linear_weights,
    keep_quantised_weights,
    leave_experts_alone,
)
from eggroll_llm.engine.vllm.whole_model import WholeModel, count_ranks_uncompiled
from eggroll_llm.es.estimate import UpdateSpec
from eggroll_llm.es.masters import MasterWeights, checksum_of
from eggroll_llm.es.noise import NoiseSpec
from eggroll_llm.es.settings import EsSettings
from eggroll_llm.kernels.fold import fold_for
from eggroll_llm.kernels.member_term import AddTerm, graph_operator, implementation
from eggroll_llm.system.hardware import cxx_compiler

log = logging.getLogger(__name__)

# As vLLM sets them for its own compilation on CPU, and without guards: shapes are dynamic, nothing else changes.
_COMPILATION: dict[str, Any] = {
    "dce": True,
    "size_asserts": False,
    "nan_asserts": False,
    "epilogue_fusion": True,
    "cpp.dynamic_threads": True,
    "guard_filter_fn": torch.compiler.skip_all_guards_unsafe,
}


class EsWorkerExtension:
    """Methods added to vLLM's worker; the prefix keeps them from clashing with its own."""

    def es_call(self, method: str, *args: Any) -> Any:
        """Call a method of the population. What it refuses is returned as `Refused`."""
        try:
            return getattr(self.model_runner.es_population, method)(*args)  # type: ignore[attr-defined]
        except REFUSALS as error:
            return Refused(error)


def _populate_loaded_models() -> None:
    """Make every model runner whose configuration asks for it build its `Population` when the model is loaded."""
    load = LoRAModelRunnerMixin.load_lora_model

    def load_and_populate(self: Any, model: Any, vllm_config: Any, device: torch.device) -> Any:
        model = load(self, model, vllm_config, device)
        if settings := vllm_config.additional_config.get(POPULATION):
            self.es_population = Population(self, model, **settings)
        return model

    LoRAModelRunnerMixin.load_lora_model = load_and_populate


# vLLM imports this module before it loads the model.
_populate_loaded_models()
keep_quantised_weights()
leave_experts_alone()
if current_platform.is_cpu():
    keep_linear_weights()
count_ranks_uncompiled()


def runs_triton(device: torch.device) -> bool:
    """Return whether the population computes with Triton's kernels there; else with those in C++."""
    return device.type == "cuda"


@dataclass(frozen=True, kw_only=True)
class Started:
    """What a population says when it is there."""

    shapes: dict[str, tuple[int, int]]
    """Out and in features of every trained parameter, by name, of the whole where ranks have parts."""
    own_sampler: bool
    """Whether `sampler` draws the tokens."""


class Population:
    """Slots, factors and master weights inside a vLLM worker."""

    def __init__(
        self,
        runner: Any,
        model: Any,
        *,
        es: Mapping[str, Any] | None,
        offload: bool,
        compiled: bool,
        stock: bool,
    ) -> None:
        """Install it around a loaded model. `es` are fields of EsSettings; without them there are no masters."""
        settings = EsSettings(**es or {})
        self._adapters = adapters = runner.lora_manager._adapter_manager
        self._manager, self._stock = runner.lora_manager, stock
        self.device, self.dtype = runner.device, runner.model_config.dtype
        self._model = model
        self.layers = find_layers(adapters.modules, adapters.packed_modules_mapping)
        self._parts = parameter_parts(self.layers)
        self._ranks = Ranks(self._parts, self.device)
        self._arrived: dict[str, Tensor] = {}  # of a state that is being loaded
        self.bank = FactorBank(self.layers, settings.rank, self.dtype, self.device)
        buffers = PaddedBuffers if stock else GpuRowBuffers if runs_triton(self.device) else RowBuffers
        self.slots = MemberSlots(buffers(self.layers, self.bank, adapters.lora_slots), adapters.lora_slots)
        weights = initial_weights(model, self.layers)
        if es is not None:
            offload = offload and self.device.type != "cpu"  # a CPU's masters are in the host's memory anyway
            fold = fold_for(self.device)
            self.masters = MasterWeights(weights, settings, self.dtype, fold, device=self.device, offload=offload)
        if not stock:
            self._scorer = Scorer(model, runner.vllm_config, settings.layers[0] if settings.layers else 0)
            if settings.fitness_from == "probabilities":
                self._scorer.check()
            self._tokens = SlotOfTokens(runner.max_num_tokens, self.device)
            self._take_over(runner)
            if runs_triton(self.device):
                from eggroll_llm.engine.vllm import blocks, sampler

                blocks.install(model, self.layers, self._tokens.slot_T)
                sampler.install(runner)
            else:
                self._install_on_cpu(model, compiled)

    def start(self) -> "Started":
        """Take requests from now on; return what the engine has to know."""
        if self._stock:  # until now vLLM has warmed up with adapters of its own
            self._adapters.remove_all_adapters()
            self._manager._apply_adapters = self._place
            self._manager._load_adapter = _refuse_to_load
        elif runs_triton(self.device):
            self._compile_kernels()
        shapes = {name: part.shape for name, part in self._parts.items()}
        return Started(shapes=shapes, own_sampler=not self._stock and runs_triton(self.device))

    def _compile_kernels(self) -> None:
        """Those that serving has not needed yet: noise, in a slot that is free, and the fold."""
        self.bank.begin(NoiseSpec(seed=0, step=0, rank=self.bank.layout.rank, sigma=1.0), 1)
        self.slots.place({0})
        self.slots.begin(antithetic=True)
        weight = torch.zeros(64, 64, device=self.device)
        for served in (None, weight.to(self.dtype)):
            fold_for(self.device)(weight, [(torch.zeros_like(weight), torch.zeros_like(weight))], served)

    def release(self) -> None:
        """Let go of all memory; vLLM's runner, which outlives its model, would hold on to it."""
        vars(self).clear()

    def begin(self, noise: NoiseSpec, population: int, antithetic: bool) -> float:
        """Take the noise of a step; return the seconds it took."""
        start = time.perf_counter()
        self.bank.begin(noise, population // 2 if antithetic else population)
        self.slots.begin(antithetic=antithetic)
        return time.perf_counter() - start

    def time_noise(self, population: int) -> float:
        """Return the seconds in which all members of the step are placed anew, which a GPU does while they answer."""
        wait: Callable[[], None] = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        self.slots.begin(antithetic=self.slots.antithetic)
        wait()
        start = time.perf_counter()
        for first in range(0, population, len(self.slots.member_in)):
            self.slots.place(range(first, min(first + len(self.slots.member_in), population)))
        wait()
        return time.perf_counter() - start

    def score(self, tree: TokenTree, members: list[int], temperature: float) -> Tensor:
        """Return the log-probabilities [M, N] of a tree's targets under members of this step, -1 the base model.

        It is one pass: there must be a slot for each of the others.
        """
        member_M = np.array(members)
        self._tokens.write(self.slots.slots_of(member_M), np.full_like(member_M, len(tree)))
        return self._scorer.logprobs(tree, len(members), temperature).cpu()

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

    def served_weights(self, names: Collection[str]) -> dict[str, Tensor]:
        """Return served weights by Hugging Face name, on CPU; on ranks but the first, nothing."""
        return self._on_first({name: (name, self.masters.served(name)) for name in names})

    def checksum(self) -> str:
        """Return a short hash of the served weights; on ranks but the first, one of nothing."""
        gathered = ((name, self._ranks.whole(name, self.masters.served(name))) for name in sorted(self._parts))
        return checksum_of((name, whole) for name, whole in gathered if whole is not None)

    def state(self, names: Collection[str]) -> dict[str, Tensor]:
        """Return masters and optimizer state of some weights; on ranks but the first, nothing."""
        return self._on_first({key: (_name_in(key), value) for key, value in self.masters.state(names).items()})

    def _on_first(self, mine: Mapping[str, tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Return the wholes of this rank's parts, each with the name of its parameter."""
        whole = {key: self._ranks.whole(name, tensor) for key, (name, tensor) in mine.items()}
        return {key: tensor.cpu() for key, tensor in whole.items() if tensor is not None}

    def take_state(self, state: Mapping[str, Tensor]) -> None:
        """Take a share of a state that `load_state` will restore."""
        self._arrived |= {key: self._ranks.part(_name_in(key), tensor) for key, tensor in state.items()}

    def load_state(self) -> None:
        """Restore the masters and optimizer state that have arrived exactly, and serve them."""
        state, self._arrived = self._arrived, {}
        self.masters.load_state(state)
        self.serve()

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Serve all of these weights, by their names in the checkpoint."""
        WholeModel(self._model, self.layers).load(weights, ServedWeights(self.layers, self.device, self.dtype))

    def _take_over(self, runner: Any) -> None:
        """Place members and tokens instead of vLLM's adapters, with no work for each request in Python.

        An adapter's id is its member + 1, and 0 is the base model.
        """

        def set_active_loras(batch: Any, tokens_Q: np.ndarray, *args: Any, **kwargs: Any) -> None:
            member_Q = batch.request_lora_mapping[: batch.num_reqs] - 1
            self._tokens.write(self.slots.slots_of(member_Q), tokens_Q)

        def set_dummies(sampled: Any, adapter_T: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
            slot_T = np.asarray(adapter_T, np.int32) - 1  # whose factors are zero or of a step that is over
            self._tokens.write(slot_T, np.ones_like(slot_T))

        runner.set_active_loras, runner._set_active_loras = set_active_loras, set_dummies
        runner.maybe_setup_dummy_loras = lambda *args, **kwargs: contextlib.nullcontext()
        # A captured graph reads the slots from memory: the one that vLLM captures without adapters serves any mixture.
        dispatcher = runner.cudagraph_dispatcher
        dispatcher._get_lora_cases = lambda: [0]
        dispatcher.dispatch = partial(_dispatch_without_adapters, dispatcher.dispatch)

    def _place(self, requests: set[LoRARequest]) -> None:
        """Called by vLLM before each forward pass with the requests' adapters, where its own arithmetic is used."""
        if self.slots.place({request.lora_int_id - 1 for request in requests}):
            self._adapters.lora_index_to_id = [
                None if member is None else member + 1 for member in self.slots.member_in
            ]

    def _install_on_cpu(self, model: Any, compiled: bool) -> None:
        if compiled and cxx_compiler() is None:
            log.warning("engine.compile = true: no C++ compiler, which the CPU needs for it; running eagerly")
            compiled = False
        # The first use on a machine compiles C++, which must not fall into the first step.
        add_term = graph_operator() if compiled else implementation()
        for layer in self.layers:
            layer.module.apply = _linear_with_term(layer, self._tokens.slot_T, add_term)
        if compiled:
            _compile(model)
        else:
            norms.install(model)


def _compile(model: torch.nn.Module) -> None:
    """Compile the transformer inside `model` at its first forward pass, which vLLM does not do with adapters on CPU.

    The member term is an operator inside the graph, and weights sit behind handles that the graph reads at every call,
    so that an update needs no new compilation.
    """
    # Without guards, code compiled for an earlier engine of this process would be taken for this one's.
    torch._dynamo.reset()
    inner: Any = next(module for module in model.modules() if hasattr(module, "do_not_compile"))
    inner.forward = torch.compile(inner.forward, fullgraph=True, dynamic=True, backend="inductor", options=_COMPILATION)


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


def _name_in(key: str) -> str:
    """Return the parameter of a key of a state, "master/<name>" or "optimizer/<name>/<key>"."""
    return key.split("/")[1] if "/" in key else ""


def _dispatch_without_adapters(dispatch: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return dispatch(*args, **kwargs | {"has_lora": False, "num_active_loras": 0})


def _refuse_to_load(request: LoRARequest) -> None:
    raise AssertionError(f"adapter {request.lora_name!r} would be read from disk; members never are")
