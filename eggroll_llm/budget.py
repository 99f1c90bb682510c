"""What a configuration will cost, from its numbers alone: completions, tokens and memory. Nothing is started."""

from collections.abc import Sequence

from eggroll_llm.noise import KEPT_BYTES, Shape
from eggroll_llm.session import Prepared
from eggroll_llm.targets import trained_parameters

GIB = 2**30


def budget(prepared: Prepared) -> list[str]:
    """Return one sentence per quantity."""
    config = prepared.config
    es, sampling, engine = config.es, config.sampling, config.engine
    completions = es.population * sampling.prompts_per_step * sampling.samples_per_prompt
    prompt = sum(map(len, prepared.train.prompts)) / len(prepared.train.prompts)
    at_most = completions * sampling.max_tokens
    lines = [
        f"problems: {len(prepared.train.problems)} for training, {len(prepared.held_out.problems)} held out",
        f"per step: {completions} completions = {es.population} members x {sampling.prompts_per_step} prompts x "
        f"{sampling.samples_per_prompt} samples",
        f"per step: {completions * prompt:,.0f} prompt tokens ({prompt:.0f} each), at most {at_most:,} generated",
    ]
    if config.steps:
        lines.append(f"in all: {config.steps} steps, {config.steps * completions:,} completions")
    if config.minutes:
        lines.append(f"in all: at most {config.minutes:g} minutes of training")

    shapes = trained_parameters(prepared.model_dir)
    weights = sum(out * inside for _, out, inside in shapes)
    size = 4 if engine.dtype == "float32" else 2
    member = member_bytes(shapes, es.rank, size)
    parts = {
        "masters (float32)": 4 * weights,
        f"served weights ({engine.dtype})": size * weights,
        "slots": engine.slots * member,
        "noise of a step": kept_bytes(member, es.population // 2 if es.antithetic else es.population),
        "key-value cache": int(engine.kv_cache_gib * GIB),
    }
    if es.optimizer != "sgd":
        parts["optimizer"] = 4 * weights * (2 if es.optimizer == "adam" else 1)
    lines += [f"memory: {bytes_ / GIB:.2f} GiB for {name}" for name, bytes_ in parts.items()]
    lines.append(
        f"memory: {sum(parts.values()) / GIB:.2f} GiB for these together, besides Python, vLLM and the embeddings"
    )
    return lines


def member_bytes(shapes: Sequence[Shape], rank: int, size: int) -> int:
    """Return the memory of one member's factors, rank * (in + out) values of `size` bytes per weight."""
    return size * rank * sum(out + inside for _, out, inside in shapes)


def kept_bytes(member: int, directions: int) -> int:
    """Return the memory of a step's noise beside the slots: nothing where it is too much and is made again instead."""
    return directions * member if directions * member <= KEPT_BYTES else 0
