"""Which configurations make sense: ranges, and settings that contradict each other.

Types are checked on parsing; this also holds for a configuration built in Python. Each message names the
keys, their values and a remedy.
"""

import dataclasses
from typing import TYPE_CHECKING, Literal, get_origin

from eggroll_llm.errors import ConfigError
from eggroll_llm.toml_table import convert, field_types
from eggroll_llm.toml_text import Origin, format_value

if TYPE_CHECKING:
    from eggroll_llm.config import RunConfig

# Smallest allowed values; a bound of "> 0" is listed in _POSITIVE.
_AT_LEAST = {
    "seed": 0,
    "steps": 0,
    "minutes": 0,
    "sampling.prompts_per_step": 1,
    "sampling.samples_per_prompt": 1,
    "sampling.max_tokens": 1,
    "sampling.temperature": 0,
    "es.population": 2,
    "es.sigma": 0,
    "es.learning_rate": 0,
    "es.rank": 1,
    "es.noise_reuse": 1,
    "es.momentum": 0,
    "es.adam_beta1": 0,
    "es.adam_beta2": 0,
    "es.schedule_end": 0,
    "grpo.learning_rate": 0,
    "grpo.beta": 0,
    "grpo.epsilon_high": 0,
    "grpo.num_iterations": 1,
    "grpo.lora_rank": 0,
    "grpo.micro_batch": 1,
    "grpo.weight_decay": 0,
    "grpo.adam_beta1": 0,
    "grpo.adam_beta2": 0,
    "grpo.max_grad_norm": 0,
    "grpo.schedule_end": 0,
    "grpo.warmup_steps": 0,
    "engine.slots": 0,
    "engine.max_sequences": 1,
    "engine.max_model_len": 0,
    "engine.timeout_seconds": 0,
    "engine.threads": 0,
    "eval.every": 0,
    "eval.problems": 2,
    "eval.max_tokens": 0,
    "checkpoint.every": 0,
    "checkpoint.keep": 1,
    "log.samples": 0,
    "log.completions": 0,
}
_POSITIVE = (
    "es.adam_eps",
    "grpo.epsilon",
    "grpo.lora_alpha",
    "grpo.adam_eps",
    "sampling.top_p",
    "reward.timeout_seconds",
    "reward.memory_gib",
    "engine.kv_cache_gib",
    "engine.gpu_memory_utilization",
)
_AT_MOST = {
    "sampling.top_p": 1,
    "es.schedule_end": 1,
    "grpo.schedule_end": 1,
    "es.rank": 64,  # what the engine's kernels take
    "es.learning_rate": 1e6,  # a weight in one step; more could leave the range of float32
    "engine.gpu_memory_utilization": 1,
    "engine.timeout_seconds": 1e9,  # a timer takes little more
    "reward.timeout_seconds": 86_400,
    "seed": 2**63 - 1,
}
_BELOW = {
    "es.momentum": 1,
    "es.adam_beta1": 1,
    "es.adam_beta2": 1,
    "grpo.epsilon": 1,
    "grpo.adam_beta1": 1,
    "grpo.adam_beta2": 1,
}
MAY_CHANGE_KEYS = ("steps", "minutes", "eval.every", "grpo.gradient_checkpointing")
MAY_CHANGE = f"{', '.join(MAY_CHANGE_KEYS)}, [log], [checkpoint], [reward], [engine] except dtype"
"""What may be changed within a run, in words; steps only without a schedule (`config.may_change`)."""
_NEEDED = {"es": ("es.sigma", "es.learning_rate"), "grpo": ("grpo.learning_rate",)}
"""Settings of a method that have no default: 0 means not given."""


def validate(config: "RunConfig", origin: Origin | None = None) -> None:
    """Raises ConfigError for the first setting that is out of range or contradicts another one."""
    check = _Check(config, origin or Origin(name="configuration"))
    check.types(config, "")
    check.ranges()
    check.contradictions()


class _Check:
    """The configuration with the means to complain about it."""

    def __init__(self, config: "RunConfig", origin: Origin) -> None:
        self.config, self.origin = config, origin

    def fail(self, problem: str, remedy: str, *keys: str) -> None:
        settings = ", ".join(f"{key} = {format_value(self.get(key), key)}" for key in keys)
        # A flag among them rather than the file's line of another: it is what the user has just written.
        blamed = next(filter(self.origin.flag, keys), keys[0])
        raise ConfigError(f"{self.origin.at(blamed)}: {settings}: {problem}. {remedy}.")

    def get(self, key: str) -> object:
        value: object = self.config
        for part in key.split("."):
            value = getattr(value, part)
        return value

    def types(self, table: object, where: str) -> None:
        for name, kind in field_types(type(table)).items():
            key, value = f"{where}.{name}" if where else name, getattr(table, name)
            if isinstance(kind, type) and dataclasses.is_dataclass(kind):
                self.types(value, key)
            elif kind in (int, float, bool, str) or get_origin(kind) is Literal:
                convert(value, kind, key, self.origin)

    def ranges(self) -> None:
        for key in _NEEDED[self.config.method]:
            if self.number(key) <= 0:
                method = self.config.method
                self.fail(f'must be above 0 with method "{method}"', f"Set {key} to a positive number", key)
        for key, low in _AT_LEAST.items():
            if self.number(key) < low:
                self.fail(f"must be at least {low}", f"Set {key} to {low} or more", key)
        for key in _POSITIVE:
            if self.number(key) <= 0:
                self.fail("must be above 0", f"Set {key} to a positive number", key)
        for key, high in _AT_MOST.items():
            if self.number(key) > high:
                self.fail(f"must be at most {high}", f"Set {key} to {high} or less", key)
        for key, limit in _BELOW.items():
            if self.number(key) >= limit:
                self.fail(f"must be below {limit}", f"Set {key} to less than {limit}", key)

    def number(self, key: str) -> float:
        value = self.get(key)
        assert isinstance(value, int | float)
        return value

    def contradictions(self) -> None:
        config, sampling = self.config, self.config.sampling
        for key, text in (("model", config.model), ("task", config.task)):
            if not text.strip() or "\0" in text:
                self.fail("is not a name", f"Name a {key}", key)
        if config.steps == 0 and config.minutes == 0:
            self.fail("the run would never end", "Set steps or minutes (or both) above 0", "steps", "minutes")
        if config.method == "es":
            self.of_es()
        else:
            self.of_grpo()
        if sampling.samples_per_prompt > 1 and sampling.temperature == 0:
            self.fail(
                "greedy decoding gives the same completion every time",
                "Set sampling.temperature above 0, or sampling.samples_per_prompt to 1",
                "sampling.samples_per_prompt",
                "sampling.temperature",
            )
        for key in ("sampling.max_tokens", "eval.max_tokens"):
            if 0 < config.engine.max_model_len <= self.number(key):
                self.fail(
                    "leaves no room for a prompt",
                    f"Set engine.max_model_len to more than {key}, or to 0 (from the task)",
                    "engine.max_model_len",
                    key,
                )

    def schedules(self, *keys: str) -> None:
        for key in keys:
            if self.get(key) != "constant" and self.config.steps == 0:
                self.fail(
                    "a schedule needs to know the last step",
                    f'Set steps above 0, or {key} to "constant"',
                    key,
                    "steps",
                )

    def of_es(self) -> None:
        es = self.config.es
        if es.antithetic and es.population % 2:
            self.fail(
                "pairs need an even population",
                f"Set es.population to {es.population + 1}, or es.antithetic to false",
                "es.population",
                "es.antithetic",
            )
        if es.fitness == "sign" and not es.antithetic:
            self.fail(
                "the sign compares the two members of a pair",
                'Set es.antithetic to true, or es.fitness to "rank"',
                "es.fitness",
                "es.antithetic",
            )
        if es.optimizer == "momentum" and es.momentum == 0:
            self.fail(
                "momentum 0 is plain SGD",
                'Set es.momentum to 0.9, or es.optimizer to "sgd"',
                "es.optimizer",
                "es.momentum",
            )
        self.schedules("es.sigma_schedule", "es.learning_rate_schedule")
        if es.sigma_schedule != "constant" and es.schedule_end == 0:
            self.fail(
                "sigma must stay above 0",
                'Set es.schedule_end above 0, or es.sigma_schedule to "constant"',
                "es.sigma_schedule",
                "es.schedule_end",
            )

    def of_grpo(self) -> None:
        grpo, sampling = self.config.grpo, self.config.sampling
        if sampling.samples_per_prompt < 2:
            self.fail(
                "GRPO compares the completions of a problem with each other",
                "Set sampling.samples_per_prompt to 2 or more, such as 8",
                "sampling.samples_per_prompt",
            )
        if sampling.temperature == 0:
            self.fail(
                "greedy completions of a problem are all the same",
                "Set sampling.temperature above 0, such as 1.0",
                "sampling.temperature",
            )
        if sampling.top_p < 1:
            self.fail(
                "the trainer's probabilities are of the whole vocabulary, not of a nucleus",
                "Set sampling.top_p to 1",
                "sampling.top_p",
            )
        completions = sampling.prompts_per_step * sampling.samples_per_prompt
        if completions % grpo.micro_batch:
            fits = max(size for size in range(1, grpo.micro_batch) if completions % size == 0)
            self.fail(
                f"does not divide the {completions} completions of a step",
                f"Set grpo.micro_batch to {fits}, or to another divisor",
                "grpo.micro_batch",
                "sampling.prompts_per_step",
                "sampling.samples_per_prompt",
            )
        self.schedules("grpo.learning_rate_schedule")
