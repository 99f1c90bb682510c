"""Estimate how long a step will take, from a short measurement and the sizes of model and recipe, without an engine.

    seconds = floating-point operations / rate + bytes / bandwidth + passes x overhead of a pass

    sampling        2 operations a linear weight and token, 2 a weight of the head and generated token, 4 a position
                    and unit of attention; weights are read once a pass, and a pass decodes `max_sequences` tokens
    ES: scoring     with fitness from probabilities, one pass over prompts and completions for each member
    ES: update      2 operations a weight, direction and rank; masters are read and written, weights written
    GRPO: training  three passes' worth of operations a token of completions and distinct prompts, one more for the
                    probabilities before the update and one for the base model's; weights, gradient and AdamW's moments

A prefix shared by all prompts is computed once per member. The estimate is a range: from answers of a quarter of the
length limit at most of the measured rate, to answers at the limit at a fraction of it. Scoring is not included.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from eggroll_llm.engine.memory import MOMENTS, SIZE
from eggroll_llm.es.noise import Shape
from eggroll_llm.models.architectures import experts_used, is_expert
from eggroll_llm.models.files import read_config, tensor_shapes
from eggroll_llm.models.targets import block_of, is_trained, trained_parameters
from eggroll_llm.system.hardware import serves_on_cpu

if TYPE_CHECKING:
    from eggroll_llm.training.prepare import Prepared

SHORT_ANSWER = 0.25
"""Share of the length limit that answers take in the short estimate."""
EFFICIENCY = (0.8, 0.3)
"""Share of the rate of a matrix product that a whole pass reaches: best and worst."""
ROWS = 512
"""Rows of the product that is measured, as in a prefill."""
EXAMPLES = 64
"""Prompts examined for a shared prefix."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What was measured."""

    serving: float
    """Operations a second of a matrix product in the format of the served weights."""
    training: float
    """The same in the format of the update: float32 with ES, `grpo.dtype` with GRPO."""
    bandwidth: float
    """Bytes of memory read or written a second."""
    passes: tuple[float, float]
    """Seconds that a pass takes apart from its operations, at least and at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """Sizes of a model."""

    linear: int
    """Weights of the linear layers of the blocks that a token passes through."""
    idle: int
    """Weights of the experts that it does not."""
    head: int
    """Weights of the output layer."""
    every: int
    """All weights."""
    attention: int
    """Units of attention, all layers and heads together."""
    trained: int
    """Weights that ES trains."""
    members_own: float
    """Share of the blocks that members do not have in common: what is before `es.layers` scores for all at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """What is sampled in one go."""

    completions: int
    prompt_tokens: float
    """Tokens of prompts that pass through the model."""
    length: float
    """Tokens of an answer."""
    context: float
    """Positions that a token attends to."""


def measure(prepared: "Prepared") -> Machine:
    """Time matrix products of the model's shape, and copies, on the device that will serve."""
    import torch

    config = prepared.config
    device = "cpu" if serves_on_cpu() or not torch.cuda.is_available() else "cuda"
    if config.engine.threads and device == "cpu":
        torch.set_num_threads(config.engine.threads)
    _, out, inside = max(trained_parameters(prepared.model_dir), key=lambda shape: shape[1] * shape[2])
    wait: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None

    def rate(dtype: str) -> float:
        x = torch.ones(ROWS, inside, dtype=getattr(torch, dtype), device=device)
        weight = torch.ones(out, inside, dtype=x.dtype, device=device)
        return 2 * ROWS * out * inside / _fastest(lambda: torch.nn.functional.linear(x, weight), wait)

    source = torch.zeros(2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Machine(
        serving=rate(config.engine.dtype),
        training=rate("float32" if config.method == "es" else config.grpo.dtype),
        bandwidth=2 * source.numel() / _fastest(lambda: target.copy_(source), wait),
        passes=(0.002, 0.03) if device == "cpu" else (0.006, 0.05),
    )


def _fastest(work: Callable[[], object], wait: Callable[[], None]) -> float:
    """Return the shortest time of several, for a quarter of a second."""
    work()
    wait()
    times: list[float] = []
    while sum(times) < 0.25:
        start = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - start)
    return min(times)


def estimate_lines(prepared: "Prepared", machine: Machine) -> list[str]:
    """Return a sentence on a step, one on an evaluation and one on the run."""
    config, model = prepared.config, model_sizes(prepared)
    ends = (
        (SHORT_ANSWER, machine.passes[0], EFFICIENCY[0]),
        (1.0, machine.passes[1], EFFICIENCY[1]),
    )
    steps, evaluations = [], []
    for length, overhead, efficiency in ends:
        at = replace(
            machine,
            serving=efficiency * machine.serving,
            training=efficiency * machine.training,
            passes=(overhead, overhead),
        )
        steps.append(step_seconds(prepared, model, at, length=length))
        evaluation = sampled(
            prepared.held_out.prompts,
            members=1,
            problems=len(prepared.held_out.prompts),
            samples=1,
            length=length * (config.eval.max_tokens or config.sampling.max_tokens),
        )
        evaluations.append(_sampling_seconds(evaluation, model, at, prepared))
    lines = [
        f"time, estimated: {_span(steps)} a step, {_span(evaluations)} an evaluation (here a matrix product runs at "
        f"{machine.serving / 1e9:,.0f} GFLOP/s in {config.engine.dtype}; answers of {SHORT_ANSWER:g} to 1 times the "
        "length limit; without scoring)"
    ]
    if config.steps:
        times = 1 + math.ceil(config.steps / config.eval.every if config.eval.every else 1)
        total = [config.steps * s + times * e for s, e in zip(steps, evaluations, strict=True)]
        limit = f", but training ends after {config.minutes:g} min" if config.minutes else ""
        lines.append(f"time, estimated: {_span(total)} for {config.steps} steps and {times} evaluations{limit}")
    return lines


def model_sizes(prepared: "Prepared") -> Model:
    """Return the sizes of the model, from the headers of its files."""
    tensors, every = tensor_shapes(prepared.model_dir), trained_parameters(prepared.model_dir)
    layers = prepared.config.es.layers
    own = [shape for shape in every if not layers or block_of(shape[0]) >= layers[0]]
    embeddings = [
        math.prod(shape) for name, shape in tensors.items() if name.endswith(("embed_tokens.weight", "lm_head.weight"))
    ]
    experts = sum(math.prod(shape) for name, shape in tensors.items() if is_expert(name))
    used = round(experts_used(read_config(prepared.model_dir)) * experts)
    queries = [out for name, out, _ in every if name.split(".")[-2] in ("q_proj", "qkv_proj")]
    return Model(
        linear=_values(every) + used,
        idle=experts - used,
        head=max(embeddings, default=0),
        every=sum(math.prod(shape) for shape in tensors.values()),
        attention=sum(queries),
        trained=_values([shape for shape in every if is_trained(shape[0], layers)]),
        members_own=_values(own) / _values(every),
    )


def _values(shapes: Sequence[Shape]) -> int:
    return sum(out * inside for _, out, inside in shapes)


def step_seconds(prepared: "Prepared", model: Model, machine: Machine, *, length: float) -> float:
    """Return the mean time of a step whose answers have that share of the length limit."""
    config, es = prepared.config, prepared.config.es
    sampling = config.sampling
    drawn = sampled(
        prepared.train.prompts,
        members=config.answering,
        problems=sampling.prompts_per_step,
        samples=sampling.samples_per_prompt,
        length=length * sampling.max_tokens,
    )
    seconds = _sampling_seconds(drawn, model, machine, prepared)
    size = SIZE[config.engine.dtype]
    if config.method == "es":
        if es.fitness_from == "probabilities":
            seconds = seconds / es.answer_reuse + _scoring_seconds(drawn, model, machine, es.population)
        moments = MOMENTS[es.optimizer]
        operations = 2 * model.trained * es.directions * es.rank
        return seconds + operations / machine.training + model.trained * (8 * (1 + moments) + size) / machine.bandwidth
    grpo = config.grpo
    prompts = sampling.prompts_per_step * _mean_length(prepared.train.prompts)
    generated = drawn.completions * drawn.length
    forward = _operations(model, prompts + generated, generated, drawn.context)
    before = (1 if grpo.importance_sampling or grpo.num_iterations > 1 else 0) + (1 if grpo.beta else 0)
    passes = (3 + grpo.gradient_checkpointing) * grpo.num_iterations + before
    adamw = grpo.num_iterations * 36 * (model.every if not grpo.lora_rank else 0)  # weight, gradient, moments
    return seconds + passes * forward / machine.training + (adamw + (4 + size) * model.every) / machine.bandwidth


def sampled(prompts: Sequence[Sequence[int]], *, members: int, problems: int, samples: int, length: float) -> Sampled:
    """Return what is sampled at once."""
    mean, common = _mean_length(prompts), _common(prompts[:EXAMPLES])
    passing = members * (common + problems * (mean - common))
    return Sampled(
        completions=members * problems * samples, prompt_tokens=passing, length=length, context=mean + length / 2
    )


def _sampling_seconds(drawn: Sampled, model: Model, machine: Machine, prepared: "Prepared") -> float:
    generated = drawn.completions * drawn.length
    at_once = min(drawn.completions, prepared.config.engine.max_sequences)
    passes = generated / at_once
    operations = _operations(model, drawn.prompt_tokens + generated, drawn.completions + generated, drawn.context)
    read = passes * SIZE[prepared.config.engine.dtype] * (model.linear + model.idle + model.head)
    return operations / machine.serving + read / machine.bandwidth + passes * machine.passes[0]


def _scoring_seconds(drawn: Sampled, model: Model, machine: Machine, members: int) -> float:
    """Return the time in which members score what was sampled: a pass over prompts and answers for each."""
    generated = drawn.completions * drawn.length
    blocks = _operations(model, drawn.prompt_tokens + generated, 0, drawn.context)
    passes = model.members_own * members + (1 - model.members_own)
    return (passes * blocks + members * _operations(model, 0, generated, 0)) / machine.serving + machine.passes[0]


def _operations(model: Model, tokens: float, predicted: float, context: float) -> float:
    return tokens * (2 * model.linear + 4 * model.attention * context) + 2 * predicted * model.head


def _mean_length(prompts: Sequence[Sequence[int]]) -> float:
    return sum(map(len, prompts)) / len(prompts)


def _common(prompts: Sequence[Sequence[int]]) -> int:
    """Return the length in tokens of the prefix that all prompts share."""
    same = 0
    for tokens in zip(*prompts, strict=False):
        if len(set(tokens)) > 1:
            break
        same += 1
    return same


def _span(seconds: Sequence[float]) -> str:
    low, high = min(seconds), max(seconds)
    unit, name = (3600, "h") if high >= 7200 else (60, "min") if high >= 120 else (1, "s")
    shown = (f"{value:.0f}" if value >= 10 else f"{value:.2g}" for value in (low / unit, high / unit))
    return f"{' to '.join(shown)} {name}"
