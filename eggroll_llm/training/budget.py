"""What a configuration will cost, from its numbers alone: completions, tokens and memory. Nothing is started."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from eggroll_llm.config.schema import EngineConfig
from eggroll_llm.engine.memory import SIZE, ModelShape, Part, es_parts, kept_bytes, member_bytes
from eggroll_llm.engine.start import in_this_process
from eggroll_llm.errors import ConfigError
from eggroll_llm.models.files import read_config, tensor_shapes
from eggroll_llm.models.targets import trained_parameters
from eggroll_llm.system.hardware import GIB, available_memory, serves_on_cpu

if TYPE_CHECKING:
    from eggroll_llm.training.prepare import Prepared

BASE_COPY = "copy of the base model"


def budget(prepared: "Prepared") -> list[str]:
    """Return one sentence per quantity."""
    config = prepared.config
    es, sampling = config.es, config.sampling
    answers = sampling.prompts_per_step * sampling.samples_per_prompt
    answering = config.answering
    own = " of each pair" if config.problems_per_step > sampling.prompts_per_step else ""
    members = f"{answering} members x " if answering > 1 else ""
    completions = answering * answers
    prompt = sum(map(len, prepared.train.prompts)) / len(prepared.train.prompts)
    at_most = completions * sampling.max_tokens
    lines = [
        f"problems: {len(prepared.train.problems)} for training, {len(prepared.held_out.problems)} held out",
        f"per step: {completions} completions = {members}{sampling.prompts_per_step} prompts{own} x "
        f"{sampling.samples_per_prompt} samples",
        f"per step: {completions * prompt:,.0f} prompt tokens ({prompt:.0f} each), at most {at_most:,} generated",
    ]
    drawings, least = config.steps, ""
    if config.method == "es" and answering == 1:
        again = ""
        if es.answer_reuse > 1:
            again = f", the same completions for up to {es.answer_reuse} steps"
            drawings, least = -(-config.steps // es.answer_reuse), "at least "
        lines.append(
            f"per step: {es.population} members score them, a pass of each over prompts and completions that generates "
            f"nothing{again}"
        )
    if config.steps:
        lines.append(f"in all: {config.steps} steps, {least}{drawings * completions:,} completions")
    if config.minutes:
        lines.append(f"in all: at most {config.minutes:g} minute{'' if config.minutes == 1 else 's'} of training")

    lines += _memory_lines(prepared)
    return lines


def _memory_lines(prepared: "Prepared") -> list[str]:
    config, parts, on_cpu = prepared.config, _parts(prepared), serves_on_cpu()
    besides = "Python and vLLM" if on_cpu else "Python, vLLM and CUDA"
    if config.method == "grpo" and (on_cpu or not _activation_bytes(prepared)):
        besides += f" and {_activations(prepared)}"
    if on_cpu:
        lines = [f"memory: {part.size / GIB:.2f} GiB for {part.name}" for part in parts]
        lines.append(f"memory: {_sum(parts) / GIB:.2f} GiB for these together, besides {besides}")
        return lines + _engines_lines(prepared, parts)
    where = {"share": "of the GPU, in vLLM's share", "beside": "of the GPU, beside that share", "host": "of the host"}
    lines = [f"memory {where[part.place]}: {part.size / GIB:.2f} GiB for {part.name}" for part in parts]
    inside, beside = _sum(parts, "share"), _sum(parts, "beside")
    together = f"{inside / GIB:.2f} GiB in vLLM's share and {beside / GIB:.2f} GiB beside it, besides {besides}"
    lines.append(
        f"memory of the GPU: {together}; the key-value cache takes the rest of the share{_cache(prepared, inside)}"
    )
    return lines + _engines_lines(prepared, parts)


def _activations(prepared: "Prepared") -> str:
    """Return what GRPO's passes keep until they go back, and how much that is where it is not checkpointed."""
    of_what = (
        f"the activations of {prepared.config.grpo.micro_batch} completions of at most {_longest(prepared)} tokens"
    )
    size = _activation_bytes(prepared)
    return f"{of_what}, up to {size / GIB:.2f} GiB" if size else of_what


def _activation_bytes(prepared: "Prepared") -> int:
    """Return the most that GRPO's passes keep until they go back; 0 where that is not known.

    The bytes of a token in a decoder block are what autograd saves of SmolLM2-135M and Qwen2.5-0.5B, to 2 %.
    """
    grpo, model = prepared.config.grpo, _shape(prepared)
    if grpo.gradient_checkpointing or not (model.hidden and model.intermediate and model.blocks):
        return 0
    of_hidden, of_intermediate = (32, 8) if grpo.dtype == "bfloat16" else (36, 16)
    each = of_hidden * model.hidden + of_intermediate * model.intermediate
    return grpo.micro_batch * _longest(prepared) * model.blocks * each


def _longest(prepared: "Prepared") -> int:
    return max(map(len, prepared.train.prompts)) + prepared.config.sampling.max_tokens


def _engines_lines(prepared: "Prepared", parts: Sequence[Part]) -> list[str]:
    engine = prepared.config.engine
    lines = []
    if engine.tensor_parallel > 1 and not serves_on_cpu():
        lines.append(f"memory of the GPU: of each of {engine.tensor_parallel} that an engine has")
    if (engines := engines_here(engine)) > 1:
        total = _sum(parts) + (engines - 1) * _sum(_of_each_engine(prepared, parts))
        lines.append(f"memory: {total / GIB:.2f} GiB for {engines} engines on this machine")
    elif engine.replicas != 1:
        number = f"{engine.replicas} engines" if engine.replicas else "as many engines as the GPUs allow"
        lines.append(f"memory: for each of {number}")
    return lines


def engines_here(engine: EngineConfig) -> int:
    """Return how many engines are sure to share the memory of this machine."""
    elsewhere = engine.ray_address or os.environ.get("RAY_ADDRESS")
    return max(1, engine.replicas) if serves_on_cpu() and not elsewhere else 1


def _of_each_engine(prepared: "Prepared", parts: Sequence[Part]) -> list[Part]:
    """Return what every engine has for itself: with GRPO, the trainer has the rest."""
    served = ("served weights", "key-value cache")
    return [part for part in parts if prepared.config.method == "es" or part.name.startswith(served)]


def _cache(prepared: "Prepared", inside: int) -> str:
    """Return what the GPU here has left for the key-value cache beside `inside` bytes; empty where there is none."""
    engine = prepared.config.engine
    memory = _gpu_memory(prepared)
    if memory is None:
        return ""
    left = max(0.0, engine.gpu_memory_utilization * memory.total - inside)
    token = SIZE[engine.dtype] * _shape(prepared).on_each(engine.tensor_parallel).cached
    return f", {left / GIB:.2f} GiB here" + (f": {left / token:,.0f} tokens" if token else "")


def check_memory(prepared: "Prepared") -> None:
    """Raise ConfigError when a run needs more memory than there is, with the settings to lower and how far.

    Of a GPU vLLM's share must hold what is there from the start, and what comes later must be free beside it.
    """
    parts, on_cpu = _parts(prepared), serves_on_cpu()
    if not on_cpu:
        _check_gpu(prepared, _sum(parts, "share"), _sum(parts, "beside"))
        parts = [part for part in parts if part.place == "host"]
    engines, of_each = engines_here(prepared.config.engine), _sum(_of_each_engine(prepared, parts))
    available, needed = available_memory(), _sum(parts) + (engines - 1) * of_each
    if available is None or needed <= available:
        return
    missing = needed - available
    listed = ", ".join(f"{part.name} {part.size / GIB:.2f}" for part in parts)
    if not on_cpu:
        raise ConfigError(
            f"the run needs {needed / GIB:.2f} GiB of the host's memory ({listed}), and {available / GIB:.2f} GiB are "
            "available: set engine.offload_masters to false, or use a smaller model"
        )
    knobs = _knobs(prepared, engines)
    if engines > 1:
        listed = f"for each of {engines} engines: {listed}" if prepared.config.method == "es" else listed
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


class _Memory(NamedTuple):
    total: int
    free: int | None
    """None where nobody asks."""


def _gpu_memory(prepared: "Prepared") -> _Memory | None:
    """Return the bytes of the GPU here; None where there is none.

    Where other processes have it to themselves nobody asks what is free: it would take half a GiB as long as this one
    lives, or, in exclusive mode, the GPU itself.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    config = prepared.config
    if config.method == "grpo" or (in_this_process(config.engine) and config.engine.tensor_parallel == 1):
        free, total = torch.cuda.mem_get_info()
        return _Memory(total, free)
    return _Memory(torch.cuda.get_device_properties(0).total_memory, None)


def _check_gpu(prepared: "Prepared", inside: int, beside: int) -> None:
    memory = _gpu_memory(prepared)
    if memory is None:
        return  # vLLM says what is wrong
    total, free = memory
    share = prepared.config.engine.gpu_memory_utilization
    if inside >= share * total:
        higher = math.ceil(100 * inside / total + 1) / 100
        remedies = [f"raise it to {higher:g}"] if higher <= 0.95 else []
        remedies += [f"set {setting} ({saved / GIB:.2f} GiB less)" for setting, saved in _other_masters(prepared)]
        raise ConfigError(
            f"engine.gpu_memory_utilization = {share:g}: {share * total / GIB:.2f} GiB, but weights, masters, slots "
            f"and activations take {inside / GIB:.2f} GiB: {', or '.join([*remedies, 'use a smaller model'])}"
        )
    left = total if free is None else free
    if share * total + beside <= left:
        return
    remedies = []
    if (lower := math.floor(100 * (left - beside) / total) / 100) * total > inside:
        remedies.append(f"lower it to {lower:g}")
    remedies += [f"set {setting} ({saved / GIB:.2f} GiB less)" for setting, saved in _other_masters(prepared)]
    if prepared.config.method == "grpo" and (size := _activation_bytes(prepared)):
        remedies.append(f"set grpo.gradient_checkpointing to true (up to {size / GIB:.2f} GiB less)")
    raise ConfigError(
        f"engine.gpu_memory_utilization = {share:g}: {share * total / GIB:.2f} GiB, and {beside / GIB:.2f} GiB for "
        f"updates beside it, but {left / GIB:.2f} GiB of the GPU are {'there' if free is None else 'free'}: "
        f"{', or '.join([*remedies, 'use a smaller model'])}"
    )


def _other_masters(prepared: "Prepared") -> list[tuple[str, int]]:
    """Return what else masters could be, and the bytes of the GPU that it saves."""
    config = prepared.config
    if config.method != "es":
        return []
    ways = {
        'es.masters to "split"': replace(config, es=replace(config.es, masters="split")),
        "engine.offload_masters to true": replace(config, engine=replace(config.engine, offload_masters=True)),
    }

    def on_gpu(prepared: "Prepared") -> int:
        return _sum([part for part in _parts(prepared) if part.place != "host"])

    saved = {way: on_gpu(prepared) - on_gpu(replace(prepared, config=other)) for way, other in ways.items()}
    return [(way, size) for way, size in saved.items() if size > 0]


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


def _knobs(prepared: "Prepared", engines: int) -> list[_Knob]:
    """Return the settings that save memory where there are so many engines; of what a trainer has there is one."""
    config = prepared.config
    es, grpo, engine = config.es, config.grpo, config.engine
    ranks = engine.tensor_parallel
    cache = engines * (ranks * GIB // 100)
    knobs = [_Knob(key="engine.kv_cache_gib", value=engine.kv_cache_gib, least=0.05, step=0.01, saved=cache)]
    if config.method == "es":
        member = ranks * member_bytes(_shape(prepared).on_each(ranks).trained, es.rank, SIZE[engine.dtype])
        knobs.append(_Knob(key="engine.slots", value=engine.slots, least=1, step=1, saved=engines * member))
        each = 2 if es.antithetic else 1
        if kept_bytes(member // ranks, es.population // each):
            saved = engines * member
            knobs.append(_Knob(key="es.population", value=es.population, least=2, step=each, saved=saved))
    elif grpo.beta and not grpo.lora_rank:
        copy = next(part.size for part in _grpo_parts(prepared) if part.name == BASE_COPY)
        knobs.append(_Knob(key="grpo.beta", value=grpo.beta, least=0, step=grpo.beta, saved=copy))
    return knobs


def _how_to_save(knobs: Sequence[_Knob], missing: int) -> str:
    alone = [knob for knob in knobs if knob.lowered(missing) >= knob.least]
    if alone:
        return "lower " + ", or ".join(f"{k.key} from {k.value:g} to {k.lowered(missing):g}" for k in alone)
    each = ", ".join(f"{k.key} = {k.value:g} (each {k.step:g} is {k.saved / GIB:.2g} GiB)" for k in knobs)
    return f"{missing / GIB:.2f} GiB too much, which none of these saves alone: {each}; or use a smaller model"


def _sum(parts: Sequence[Part], place: str = "") -> int:
    return sum(part.size for part in parts if place in ("", part.place))


def _shape(prepared: "Prepared") -> ModelShape:
    return ModelShape.of(read_config(prepared.model_dir), tensor_shapes(prepared.model_dir), prepared.config.es.layers)


def _parts(prepared: "Prepared") -> list[Part]:
    config, on_cpu = prepared.config, serves_on_cpu()
    parts = (
        es_parts(_shape(prepared), config.es, config.engine, on_cpu=on_cpu)
        if config.method == "es"
        else _grpo_parts(prepared)
    )
    if on_cpu:  # on a GPU it is what is left of vLLM's share
        cache = config.engine.tensor_parallel * int(config.engine.kv_cache_gib * GIB)
        parts.append(Part(name="key-value cache", size=cache, place="share"))
    return parts


def _grpo_parts(prepared: "Prepared") -> list[Part]:
    grpo, engine = prepared.config.grpo, prepared.config.engine
    weights = sum(math.prod(shape) for shape in tensor_shapes(prepared.model_dir).values())
    trained, adapted = weights, 0
    if grpo.lora_rank:
        layers = trained_parameters(prepared.model_dir)
        trained = grpo.lora_rank * sum(out + inside for _, out, inside in layers)
        adapted = sum(out * inside for _, out, inside in layers)
    beneath = 2 if grpo.dtype == "bfloat16" else 4  # bytes of a weight beneath an adapter, if it is a bfloat16 number
    beside = {
        "weights in training (float32)": 4 * (weights - adapted) + beneath * adapted + (4 * trained if adapted else 0),
        "weights with their adapters (float32)": 4 * adapted,  # of all layers at once, to be served
        "gradients": 4 * trained,
        "optimizer": 8 * trained,
    }
    if grpo.beta and not grpo.lora_rank:
        beside[BASE_COPY] = 4 * weights
    if not serves_on_cpu():  # where it must be free beside vLLM's share
        beside["activations"] = _activation_bytes(prepared)
    return [
        *(Part(name=name, size=size, place="beside") for name, size in beside.items() if size),
        Part(name=f"served weights ({engine.dtype})", size=SIZE[engine.dtype] * weights, place="share"),
    ]
