"""What a configuration will cost, from its numbers alone: completions, tokens and memory. Nothing is started."""

import math
from collections.abc import Sequence

from eggroll_llm.model_files import tensor_shapes
from eggroll_llm.noise import KEPT_BYTES, Shape
from eggroll_llm.session import Prepared
from eggroll_llm.targets import trained_parameters

GIB = 2**30


def budget(prepared: Prepared) -> list[str]:
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

    parts = _es_memory(prepared) if config.method == "es" else _grpo_memory(prepared)
    parts["key-value cache"] = int(config.engine.kv_cache_gib * GIB)
    lines += [f"memory: {bytes_ / GIB:.2f} GiB for {name}" for name, bytes_ in parts.items()]
    rest = "the embeddings"
    if config.method == "grpo":
        longest = max(map(len, prepared.train.prompts)) + sampling.max_tokens
        rest = f"the activations of {config.grpo.micro_batch} completions of at most {longest} tokens"
    lines.append(f"memory: {sum(parts.values()) / GIB:.2f} GiB for these together, besides Python, vLLM and {rest}")
    return lines


def _es_memory(prepared: Prepared) -> dict[str, int]:
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


def _grpo_memory(prepared: Prepared) -> dict[str, int]:
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
