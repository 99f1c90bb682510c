"""The configuration of a run: what a recipe and the flags of the command line say, typed.

`load_recipe` reads TOML, applies flags, parses and validates; nothing heavy is imported, so that every
mistake is found before a model is loaded. The resolved configuration is written into the run directory by
`to_toml` and read back the same.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from eggroll_llm.config_rules import MAY_CHANGE, MAY_CHANGE_KEYS, validate
from eggroll_llm.errors import ConfigError
from eggroll_llm.field_docs import FieldHelp, field_docs, field_help
from eggroll_llm.overrides import apply_overrides, flags_by_key
from eggroll_llm.toml_table import parse_table
from eggroll_llm.toml_text import Origin, Sourced, format_value, read_toml, write_toml

__all__ = [
    "CheckpointConfig",
    "EngineConfig",
    "EsConfig",
    "EvalConfig",
    "FieldHelp",
    "GrpoConfig",
    "LogConfig",
    "RewardConfig",
    "RunConfig",
    "SamplingConfig",
    "applies",
    "check_resume",
    "differences",
    "field_docs",
    "field_help",
    "flat",
    "frozen_hash",
    "is_scheduled",
    "load_recipe",
    "may_change",
    "parse_table",
    "sourced",
    "to_toml",
    "validate",
]

Schedule = Literal["constant", "linear", "cosine"]
METHOD_TABLES = ("es", "grpo")
"""Tables of settings that only the method of that name has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """How completions are sampled in training."""

    prompts_per_step: int = 8
    """Problems in a step; all members of a population get the same ones."""
    samples_per_prompt: int = 1
    """Completions per problem (and member), which with GRPO are a group; more than 1 needs a temperature above 0."""
    max_tokens: int = 256
    """Length limit of a completion in tokens."""
    temperature: float = 0.0
    """Sampling temperature; 0 decodes greedily, the population being the exploration."""
    top_p: float = 1.0
    """Probability mass that nucleus sampling keeps; 1 keeps all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardConfig:
    """Limits of a user's own score, which runs in a process of its own; built-in graders need none."""

    timeout_seconds: float = 10.0
    """Seconds that the score of one completion may take; then its process is killed, and the completion counts as 0."""
    memory_gib: float = 4.0
    """Memory in GiB that the process may take, with what it imports and loads; each that it starts may take as much."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EsConfig:
    """The evolution strategy."""

    population: int = 32
    """Models evaluated per step; even when antithetic."""
    sigma: float = 0.0
    """Standard deviation of the perturbation of a weight; method "es" needs it."""
    learning_rate: float = 0.0
    """Root-mean-square change of a weight in a step (with update_scale "rms"); method "es" needs it."""
    rank: int = 1
    """Rank of the perturbation of each weight matrix."""
    antithetic: bool = True
    """Whether members come in pairs that share their noise with opposite signs."""
    fitness: Literal["centered", "rank", "sign"] = "centered"
    """Rewards to fitness: centred per prompt and scaled, centred ranks, or signs of differences in pairs."""
    update_scale: Literal["rms", "literature"] = "rms"
    """Length of the update: always learning_rate ("rms"), or the sum over sqrt(population) as published."""
    optimizer: Literal["sgd", "momentum", "adam"] = "sgd"
    """Optimizer that gets the estimate as its negative gradient."""
    momentum: float = 0.9
    """Momentum of optimizer "momentum"."""
    adam_beta1: float = 0.9
    """Decay of the first moment of optimizer "adam"."""
    adam_beta2: float = 0.999
    """Decay of the second moment of optimizer "adam"."""
    adam_eps: float = 1e-8
    """Constant in the denominator of optimizer "adam"."""
    sigma_schedule: Schedule = "constant"
    """Course of sigma over the steps."""
    learning_rate_schedule: Schedule = "constant"
    """Course of the learning rate over the steps."""
    schedule_end: float = 0.1
    """Fraction of the starting value that a schedule reaches at the last step."""
    noise_reuse: int = 1
    """Number of steps for which the same noise is kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GrpoConfig:
    """Group relative policy optimization by TRL, with its defaults; the size of a group is in [sampling]."""

    learning_rate: float = 0.0
    """Learning rate of AdamW; method "grpo" needs it."""
    beta: float = 0.0
    """Weight of the divergence from the base model; 0 leaves it out, and the copy of the base model with it."""
    epsilon: float = 0.2
    """Clipping range of the probability ratio, which moves away from 1 when num_iterations is above 1."""
    epsilon_high: float = 0.0
    """Upper clipping range where it differs; 0 takes epsilon."""
    num_iterations: int = 1
    """Optimizer steps on the same completions; all of them together are one step of the run."""
    loss_type: Literal["dapo", "grpo", "dr_grpo", "bnpo"] = "dapo"
    """What the loss of tokens is averaged over: all of the step, each completion, the length limit, a micro batch."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """By which standard deviation advantages are divided: of the problem's rewards, of all, or by none."""
    importance_sampling: bool = True
    """Whether the difference between the engine's probabilities and the trainer's is corrected for."""
    lora_rank: int = 0
    """Rank of adapters on the linear layers, trained instead of the weights; 0 trains all weights."""
    lora_alpha: int = 32
    """Scale of the adapters, divided by their rank."""
    micro_batch: int = 8
    """Completions in a forward and backward pass; divides those of a step. For memory, but for "bnpo" the loss too."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Number format of the trainer's arithmetic, "auto" as in [engine]; its weights and the optimizer stay float32."""
    gradient_checkpointing: bool = False
    """Whether activations are computed again in the backward pass to save memory."""
    weight_decay: float = 0.0
    """Weight decay of AdamW."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.999
    """Decay of the second moment."""
    adam_eps: float = 1e-8
    """Constant in the denominator of AdamW."""
    max_grad_norm: float = 1.0
    """Norm to which gradients are clipped; 0 clips none."""
    learning_rate_schedule: Schedule = "constant"
    """Course of the learning rate over the steps."""
    schedule_end: float = 0.1
    """Fraction of the starting value that a schedule reaches at the last step."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises to its value."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """The inference engine and the memory that it takes."""

    slots: int = 0
    """Members resident at once; 0 takes the population, at most 64. GRPO has none."""
    max_sequences: int = 128
    """Sequences decoded at once."""
    max_model_len: int = 0
    """Longest prompt and completion together in tokens; 0 takes it from the task."""
    kv_cache_gib: float = 1.0
    """Memory of the key-value cache in GiB."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Number format of the served weights; "auto" is bfloat16, but float32 on a CPU without bfloat16 instructions."""
    enforce_eager: bool = True
    """Whether the model runs without compilation; compiling starts slowly and gains little on CPU."""
    gpu_memory_utilization: float = 0.85
    """Fraction of the GPU's memory that the engine may use."""
    timeout_seconds: float = 1800.0
    """Seconds without progress of the engine, or in its start, after which the process ends (status 124); 0: none."""
    threads: int = 0
    """CPU threads; 0 takes all cores. Without a C++ compiler the last bits of an update depend on it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """Evaluation on held-out problems during training."""

    every: int = 10
    """Steps between evaluations; 0 evaluates only at the start and at the end."""
    split: Literal["test", "validation"] = "test"
    """Where they come from: "test", or "validation", the last problems of "train", which are then not trained on."""
    problems: int = 256
    """Held-out problems per evaluation."""
    max_tokens: int = 0
    """Length limit of a completion in tokens; 0 takes that of sampling."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """Checkpoints; with method "es" the journal is written at every step whatever this says."""

    every: int = 10
    """Steps between checkpoints; 0 writes none, as the journal of "es" rebuilds every step; "grpo" resumes from one."""
    keep: int = 2
    """Newest checkpoints that are kept."""
    best: bool = True
    """Whether the step of the highest accuracy gets a checkpoint, which is kept until there is a better one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig:
    """What is shown and recorded besides the metrics."""

    samples: int = 2
    """Completions shown per step."""
    completions: int = 8
    """Completions per step recorded in completions.jsonl."""
    tensorboard: bool = False
    """Whether metrics also go to TensorBoard."""
    wandb: str = ""
    """Weights & Biases project that metrics also go to; empty for none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """A whole run."""

    model: str = "smollm2-135m-instruct"
    """Model to train: the embedded default, a local directory, or a name on the Hugging Face hub."""
    task: str
    """Task: "countdown", "gsm8k", or "file.py:NAME" next to the recipe."""
    method: Literal["es", "grpo"] = "es"
    """Training method: evolution strategies, or GRPO (needs the extra "grpo")."""
    seed: int = 0
    """Seed of everything random in the run."""
    steps: int = 0
    """Number of updates after which the run ends; 0 sets no limit."""
    minutes: float = 0.0
    """Training time in minutes, evaluations not counted, after which the run ends; 0 sets no limit."""
    task_options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the task, see its documentation."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How completions are sampled in training."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """Limits of a user's own score."""
    es: EsConfig = field(default_factory=EsConfig)
    """The evolution strategy, of method "es"."""
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    """Group relative policy optimization, of method "grpo"."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """The inference engine and the memory that it takes."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Evaluation on held-out problems during training."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints of the weights."""
    log: LogConfig = field(default_factory=LogConfig)
    """What is shown and recorded besides the metrics."""


def load_recipe(path: Path | str, overrides: Sequence[tuple[str, str]] = ()) -> RunConfig:
    """The validated configuration of a recipe with flags, e.g. `("es.sigma", "5e-4")`; the last one wins.

    Raises:
        ConfigError: anything wrong with the file, its keys and values, or the flags.
    """
    table, origin = read_toml(Path(path))
    table = apply_overrides(RunConfig, table, overrides)
    origin = dataclasses.replace(origin, flags=flags_by_key(overrides))
    config = parse_table(RunConfig, table, where="", source=origin.name, text=origin.text, flags=origin.flags)
    validate(config, origin)
    return dataclasses.replace(config, task_options=sourced(config.task_options, origin, overrides))


def sourced(options: Mapping[str, Any], origin: Origin, overrides: Sequence[tuple[str, str]]) -> Sourced:
    """Task options that know which of them are of a file and which of a flag, such as --task_options.seed."""
    result = Sourced(options)
    parts = [flag.removeprefix("--").split(".") for flag, _ in overrides]
    result.origin = origin
    result.flags = frozenset(part[1] for part in parts if part[0].replace("-", "_") == "task_options")
    return result


def to_toml(config: RunConfig) -> str:
    """The resolved configuration as TOML that `load_recipe` reads back as an equal one."""
    return write_toml(dataclasses.asdict(config))


def flat(config: RunConfig) -> dict[str, Any]:
    """Dotted key -> value of every setting, task options included."""
    return dict(_leaves(dataclasses.asdict(config), ""))


def differences(a: RunConfig, b: RunConfig) -> list[str]:
    """Dotted keys whose values differ, in the order of the configuration."""
    flat_a, flat_b = flat(a), flat(b)
    # Compared as text: 1, 1.0 and true are equal in Python but are not the same setting.
    return [key for key in flat_a | flat_b if _shown(flat_a, key) != _shown(flat_b, key)]


def may_change(key: str) -> bool:
    """Whether a resumed run may have another value: true of settings that the updates do not depend on.

    Not of the problems of the evaluation: one run would then report accuracies that cannot be compared. The limits of
    [reward] may, as those of the engine: they protect the machine, and may have been too tight for it.
    """
    if key.startswith("engine."):
        return key != "engine.dtype"
    return key in MAY_CHANGE_KEYS or key.startswith(("log.", "checkpoint.", "reward."))


def applies(key: str, config: RunConfig) -> bool:
    """Whether a setting has a meaning for the run: those in the table of another method have none."""
    table = key.partition(".")[0]
    return table not in METHOD_TABLES or table == config.method


def check_resume(saved: RunConfig, now: RunConfig, *, saved_in: str) -> None:
    """Raises ConfigError, showing each difference, when `now` cannot continue the run of `saved` (a file)."""
    keys = [
        key
        for key in differences(saved, now)
        if applies(key, saved) and (not may_change(key) or (key == "steps" and is_scheduled(saved)))
    ]
    if not keys:
        return
    old, new = flat(saved), flat(now)
    shown = "; ".join(f"{key} was {_shown(old, key)} and is now {_shown(new, key)}" for key in keys)
    raise ConfigError(
        f"{saved_in}: cannot resume with other settings: {shown}. Restore them, or start a new run, which may train on "
        f"from the weights of this one: --model {Path(saved_in).parent / 'final'}. May change: {MAY_CHANGE}."
    )


def is_scheduled(config: RunConfig) -> bool:
    """Whether something takes a course over the steps, so that their number may not change within a run."""
    if config.method == "es":
        return {config.es.sigma_schedule, config.es.learning_rate_schedule} != {"constant"}
    return config.grpo.learning_rate_schedule != "constant"


def frozen_hash(config: RunConfig) -> str:
    """SHA-256 of the settings that may not change within a run."""
    frozen = {key: value for key, value in flat(config).items() if applies(key, config) and not may_change(key)}
    return hashlib.sha256(json.dumps(frozen, sort_keys=True, default=str).encode()).hexdigest()


def _leaves(table: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _shown(values: Mapping[str, Any], key: str) -> str:
    return format_value(values[key], key) if key in values else "not set"
