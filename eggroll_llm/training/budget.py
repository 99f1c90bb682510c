"""What a configuration will cost, from its numbers alone: completions, tokens and memory. Nothing is started."""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from eggroll_llm.config.schema import EngineConfig
from eggroll_llm.errors import ConfigError
from eggroll_llm.es.noise import KEPT_BYTES, Shape
from eggroll_llm.models.files import tensor_shapes
from eggroll_llm.models.targets import trained_parameters
from eggroll_llm.system.hardware import available_memory, serves_on_cpu

if TYPE_CHECKING:
    from eggroll_llm.training.prepare import Prepared

GIB = 2**30


def budget(prepared: "Prepared") -> list[str]:
    """Return one sentence per quantity."""
    config = prepared.config
    es, sampling = config.es, config.sampling
    answers = sampling.prompts_per_step * sampling.samples_per_prompt
    members = f"{es.population} members x " if config.method == "es" else ""
    completions = es.population * answers if config.method == "es" else answers
    prompt = sum(map(len, prepared.train.prompts)) / len(prepared.train.prompts)
    at_most = completions * sampling.max_tokens
    lines = [
        f"problems: {len(prepared.train.problems)} for training, {len(prepared.held_out.problems)} held out",
        f"per step: {completions} completions = {members}{sampling.prompts_per_step} prompts x "
        f"{sampling.samples_per_prompt} samples",
        f"per step: {completions * prompt:,.0f} prompt tokens ({prompt:.0f} each), at most {at_most:,} generated",
    ]
    if config.steps:
        lines.append(f"in all: {config.steps} steps, {config.steps * completions:,} completions")
    if config.minutes:
        lines.append(f"in all: at most {config.minutes:g} minutes of training")

    parts = _memory(prepared)
    lines += [f"memory: {bytes_ / GIB:.2f} GiB for {name}" for name, bytes_ in parts.items()]
    rest = "the embeddings"
    if config.method == "grpo":
        longest = max(map(len, prepared.train.prompts)) + sampling.max_tokens
        rest = f"the activations of {config.grpo.micro_batch} completions of at most {longest} tokens"
    lines.append(f"memory: {sum(parts.values()) / GIB:.2f} GiB for these together, besides Python, vLLM and {rest}")
    if (engines := engines_here(config.engine)) > 1:
        total = sum(parts.values()) + (engines - 1) * sum(_of_each_engine(parts, config.method).values())
        lines.append(f"memory: {total / GIB:.2f} GiB for {engines} engines on this machine")
    elif config.engine.replicas != 1:
        number = f"{config.engine.replicas} engines" if config.engine.replicas else "as many engines as there are GPUs"
        lines.append(f"memory: for each of {number}")
    return lines


def engines_here(engine: EngineConfig) -> int:
    """Return how many engines are sure to share the memory of this machine."""
    elsewhere = engine.ray_address or os.environ.get("RAY_ADDRESS")
    return max(1, engine.replicas) if serves_on_cpu() and not elsewhere else 1


def _of_each_engine(parts: Mapping[str, int], method: str) -> dict[str, int]:
    """Return what every engine has for itself: with GRPO, the trainer has the rest."""
    served = ("served weights", "key-value cache")
    return {name: size for name, size in parts.items() if method == "es" or name.startswith(served)}


def check_memory(prepared: "Prepared") -> None:
    """Raise ConfigError when a run needs more memory than there is, with the settings to lower and how far.

    Of a GPU only what lies beside vLLM's share is counted.
    """
    parts = _memory(prepared)
    if not serves_on_cpu():
        _check_gpu(prepared, sum(size for name, size in parts.items() if not name.startswith(_VLLM_SHARE)))
        return
    engines = engines_here(prepared.config.engine)
    of_each = sum(_of_each_engine(parts, prepared.config.method).values())
    available, needed = available_memory(), sum(parts.values()) + (engines - 1) * of_each
    if available is None or needed <= available:
        return
    missing = needed - available
    listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    knobs = [dataclasses.replace(knob, saved=engines * knob.saved) for knob in _knobs(prepared)]
    if engines > 1:
        listed = f"for each of {engines} engines: {listed}"
        knobs.insert(0, _Knob(key="engine.replicas", value=engines, least=1, step=1, saved=of_each))
    remedy = _how_to_save(knobs, missing)
    if prepared.config.method == "grpo":
        listed += "; and what passes over grpo.micro_batch completions take"
        if not prepared.config.grpo.lora_rank:
            remedy += ", or train adapters, such as with grpo.lora_rank = 16"
    raise ConfigError(
        f"the run needs {needed / GIB:.2f} GiB of memory ({listed}) besides Python and vLLM, and {available / GIB:.2f} "
        f"GiB are available: {remedy}"
    )


_VLLM_SHARE = ("served weights", "slots", "key-value cache")


def _check_gpu(prepared: "Prepared", beside: int) -> None:
    import torch

    if not torch.cuda.is_available():
        return  # vLLM says what is wrong
    free, total = torch.cuda.mem_get_info()
    share = prepared.config.engine.gpu_memory_utilization
    if share * total + beside > free:
        raise ConfigError(
            f"engine.gpu_memory_utilization = {share:g}: {share * total / GIB:.2f} GiB, and {beside / GIB:.2f} GiB for "
            f"weights and noise in training beside it, but {free / GIB:.2f} GiB of the GPU are free: lower it to "
            f"{max(0.0, math.floor(100 * (free - beside) / total) / 100):g}, or use a smaller model"
        )


@dataclass(frozen=True, kw_only=True)
class _Knob:
    """A setting that saves memory when it is lowered, in steps."""

    key: str
    value: float
    least: float
    step: float
    saved: int
    """Bytes, of each step."""

    def lowered(self, missing: int) -> float:
        """Return the value that saves `missing` bytes, which may be below the least."""
        return round(self.value - math.ceil(missing / self.saved) * self.step, 2)


def _knobs(prepared: "Prepared") -> list[_Knob]:
    config = prepared.config
    es, grpo, engine = config.es, config.grpo, config.engine
    knobs = [_Knob(key="engine.kv_cache_gib", value=engine.kv_cache_gib, least=0.05, step=0.01, saved=GIB // 100)]
    if config.method == "es":
        member = member_bytes(trained_parameters(prepared.model_dir), es.rank, 4 if engine.dtype == "float32" else 2)
        knobs.append(_Knob(key="engine.slots", value=engine.slots, least=1, step=1, saved=member))
        each = 2 if es.antithetic else 1
        if kept_bytes(member, es.population // each):
            knobs.append(_Knob(key="es.population", value=es.population, least=2, step=each, saved=member))
    elif grpo.beta and not grpo.lora_rank:
        copy = _grpo_memory(prepared)["copy of the base model"]
        knobs.append(_Knob(key="grpo.beta", value=grpo.beta, least=0, step=grpo.beta, saved=copy))
    return knobs


def _how_to_save(knobs: Sequence[_Knob], missing: int) -> str:
    alone = [knob for knob in knobs if knob.lowered(missing) >= knob.least]
    if alone:
        return "lower " + ", or ".join(f"{k.key} from {k.value:g} to {k.lowered(missing):g}" for k in alone)
    each = ", ".join(f"{k.key} = {k.value:g} (each {k.step:g} is {k.saved / GIB:.2g} GiB)" for k in knobs)
    return f"{missing / GIB:.2f} GiB too much, which none of these saves alone: {each}; or use a smaller model"


def _memory(prepared: "Prepared") -> dict[str, int]:
    config = prepared.config
    parts = _es_memory(prepared) if config.method == "es" else _grpo_memory(prepared)
    return {**parts, "key-value cache": int(config.engine.kv_cache_gib * GIB)}


def _es_memory(prepared: "Prepared") -> dict[str, int]:
    es, engine = prepared.config.es, prepared.config.engine
    shapes = trained_parameters(prepared.model_dir)
    weights = sum(out * inside for _, out, inside in shapes)
    size = 4 if engine.dtype == "float32" else 2
    member = member_bytes(shapes, es.rank, size)
    parts = {
        "masters (float32)": 4 * weights,
        f"served weights ({engine.dtype})": size * weights,
        "slots": engine.slots * member,
        "noise of a step": kept_bytes(member, es.population // 2 if es.antithetic else es.population),
    }
    if es.optimizer != "sgd":
        parts["optimizer"] = 4 * weights * (2 if es.optimizer == "adam" else 1)
    return parts


def _grpo_memory(prepared: "Prepared") -> dict[str, int]:
    grpo, engine = prepared.config.grpo, prepared.config.engine
    weights = sum(math.prod(shape) for shape in tensor_shapes(prepared.model_dir).values())
    trained = weights
    if grpo.lora_rank:
        trained = grpo.lora_rank * sum(out + inside for _, out, inside in trained_parameters(prepared.model_dir))
    parts = {
        "weights in training (float32)": 4 * weights + (4 * trained if grpo.lora_rank else 0),
        "gradients": 4 * trained,
        "optimizer": 8 * trained,
        f"served weights ({engine.dtype})": (4 if engine.dtype == "float32" else 2) * weights,
    }
    if grpo.beta and not grpo.lora_rank:
        parts["copy of the base model"] = 4 * weights
    return parts


def member_bytes(shapes: Sequence[Shape], rank: int, size: int) -> int:
    """Return the memory of one member's factors, rank * (in + out) values of `size` bytes per weight."""
    return size * rank * sum(out + inside for _, out, inside in shapes)


def kept_bytes(member: int, directions: int) -> int:
    """Return the memory of a step's noise beside the slots: nothing where it is too much and is made again instead."""
    return directions * member if directions * member <= KEPT_BYTES else 0
