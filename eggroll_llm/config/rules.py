"""Which configurations make sense: ranges, and settings that contradict each other.

Types are checked on parsing, and here for a configuration built in Python. Each message names the
keys, their values and a remedy.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, get_origin

from eggroll_llm.bounds import violations
from eggroll_llm.config.parse import convert, field_types
from eggroll_llm.config.toml import Origin, format_value, is_unicode
from eggroll_llm.errors import ConfigError

if TYPE_CHECKING:
    from eggroll_llm.config.schema import RunConfig

_SET_HERE = ("messages", "conversation", "add_generation_prompt", "continue_final_message", "tokenize")
"""Arguments of a chat template, and of what applies it, that are not left to the user."""
_NEEDED = {"es": ("es.sigma", "es.learning_rate"), "grpo": ("grpo.learning_rate",)}
"""Settings of a method that have no default: 0 means not given."""


def validate(config: "RunConfig", origin: Origin | None = None) -> None:
    """Raise ConfigError for the first setting that is out of range or contradicts another one."""
    check = _Check(config, origin or Origin(name="configuration"))
    check.types(config, "")
    check.ranges()
    check.contradictions()


class _Check:
    """The configuration with the means to complain about it."""

    def __init__(self, config: "RunConfig", origin: Origin) -> None:
        self.config, self.origin = config, origin

    def fail(self, problem: str, remedy: str, *keys: str, because: str = "") -> None:
        """Raise ConfigError about the values of `keys`; `because` is a setting that only makes them wrong."""
        settings = ", ".join(f"{key} = {format_value(self.get(key), key)}" for key in keys)
        # A flag among them rather than the file's line of another: it is what the user has just written.
        blamed = next(filter(self.origin.flag, (*keys, because)), keys[0])
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
            elif kind in (int, float, bool, str) or get_origin(kind) in (Literal, tuple, Mapping):
                convert(value, kind, key, self.origin)

    def ranges(self) -> None:
        for key in _NEEDED[self.config.method]:
            if self.number(key) <= 0:
                method = self.config.method
                problem = f'must be above 0 with method "{method}"'
                self.fail(problem, f"Set {key} to a positive number", key, because="method")
        for table in ("", *(field.name for field in dataclasses.fields(self.config))):
            settings = self.get(table) if table else self.config
            for found in violations(settings) if dataclasses.is_dataclass(settings) else ():
                key = f"{table}.{found.field}" if table else found.field
                self.fail(found.problem, f"Set {key} to {found.remedy}", key)

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
        if 0 < config.engine.replicas < config.engine.min_replicas:
            self.fail(
                "more engines are needed than are started",
                "Lower engine.min_replicas, or raise engine.replicas",
                "engine.min_replicas",
                "engine.replicas",
            )
        if config.engine.tensor_parallel > 1:
            self.of_tensor_parallel()
        self.of_chat()
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
        self.of_sampling()
        for key in ("sampling.max_tokens", "eval.max_tokens"):
            if 0 < config.engine.max_model_len <= self.number(key):
                self.fail(
                    "leaves no room for a prompt",
                    f"Set engine.max_model_len to more than {key}, or to 0 (from the task)",
                    "engine.max_model_len",
                    key,
                )
            if 0 < self.number(key) <= sampling.thinking_token_budget:
                self.fail(
                    "leaves no room for an answer",
                    f"Set {key} to more than sampling.thinking_token_budget",
                    "sampling.thinking_token_budget",
                    key,
                )

    def of_sampling(self) -> None:
        for name, off in (("top_p", 1), ("top_k", 0), ("min_p", 0)):
            if self.config.sampling.temperature == 0 and getattr(self.config.sampling, name) != off:
                self.fail(
                    "greedy decoding takes the most probable token in any case",
                    f"Set sampling.temperature above 0, or sampling.{name} to {off}",
                    f"sampling.{name}",
                    "sampling.temperature",
                )
        if not all(text and is_unicode(text) for text in self.config.sampling.stop):
            self.fail("every completion would end at an empty text", "Remove it", "sampling.stop")

    def schedules(self, *keys: str) -> None:
        for key in keys:
            if self.get(key) != "constant" and self.config.steps == 0:
                self.fail(
                    "a schedule needs to know the last step",
                    f'Set steps above 0, or {key} to "constant"',
                    key,
                    "steps",
                )

    def of_tensor_parallel(self) -> None:
        key = "engine.tensor_parallel"
        if self.config.method == "grpo":
            self.fail("a trainer's weights can only be served by one device", f"Set {key} to 1", key, because="method")
        if self.config.engine.compile:
            self.fail("torch.compile does not reach the ranks", "Set engine.compile to false", "engine.compile", key)

    def of_chat(self) -> None:
        chat = self.config.chat
        if not is_unicode(chat.system):
            raise ConfigError(
                f"{self.origin.at('chat.system')}: chat.system = {chat.system!a:.80}: is not valid Unicode: it holds "
                "half of a surrogate pair. Write the whole character."
            )
        for name, value in chat.template_args.items():
            key = f"chat.template_args.{name}"
            at = f"{self.origin.at(key)}: {key} = {value!r:.60}"
            if name in _SET_HERE:
                raise ConfigError(f"{at}: is set by the run itself. Remove it.")
            if isinstance(value, str) and value.lower() in ("true", "false", "none", "yes", "no", "on", "off"):
                raise ConfigError(
                    f"{at}: is text, which a template takes for true. Write true or false without quotes."
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
        if es.layers and (len(es.layers) != 2 or not 0 <= es.layers[0] <= es.layers[1]):
            self.fail("is not a range of decoder blocks", "Set es.layers to [first, last]", "es.layers")
        if es.fitness == "sign" and not es.antithetic:
            self.fail(
                "the sign compares the two members of a pair",
                'Set es.antithetic to true, or es.fitness to "rank"',
                "es.fitness",
                "es.antithetic",
            )
        self.of_answers()
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

    def of_answers(self) -> None:
        """Which answers a step learns from."""
        es = self.config.es
        if es.problems == "per_pair":
            self.of_pairs()
        if es.fitness_from == "probabilities":
            self.of_groups("fitness from probabilities", "es.fitness_from")
        elif es.answer_reuse > 1:
            self.fail(
                "the rewards of members' own answers say nothing of others",
                'Set es.answer_reuse to 1, or es.fitness_from to "probabilities"',
                "es.answer_reuse",
                "es.fitness_from",
            )
        elif es.weighting != "ratio":
            self.fail(
                "rewards need no weighting",
                'Leave es.weighting out, or set es.fitness_from to "probabilities"',
                "es.weighting",
                "es.fitness_from",
            )
        if es.max_drift and es.answer_reuse == 1:
            self.fail(
                "answers are drawn anew at every step anyway",
                "Set es.answer_reuse above 1, or es.max_drift to 0",
                "es.max_drift",
                "es.answer_reuse",
            )
        if es.answer_reuse > 1 and es.skip_tied:
            self.fail(
                "which problems come next would depend on when answers are drawn anew",
                "Set es.answer_reuse to 1, or es.skip_tied to false",
                "es.answer_reuse",
                "es.skip_tied",
            )

    def of_pairs(self) -> None:
        """Problems of their own leave twins alone to compare."""
        es = self.config.es
        if not es.antithetic:
            self.fail(
                "there are no pairs",
                'Set es.antithetic to true, or es.problems to "shared"',
                "es.problems",
                "es.antithetic",
            )
        if es.fitness == "rank":
            self.fail(
                "members with other problems have no common ranks",
                'Set es.fitness to "centered" or "sign", or es.problems to "shared"',
                "es.problems",
                "es.fitness",
            )
        if es.fitness_from == "probabilities":
            self.fail(
                "members that only score answers share them all",
                'Set es.problems to "shared", or es.fitness_from to "rewards"',
                "es.problems",
                "es.fitness_from",
            )

    def of_groups(self, who: str, because: str) -> None:
        """What compares the completions of a problem with each other needs different ones, as they are drawn."""
        sampling = self.config.sampling
        if sampling.samples_per_prompt < 2:
            self.fail(
                f"{who} compares the completions of a problem with each other",
                "Set sampling.samples_per_prompt to 2 or more, such as 8",
                "sampling.samples_per_prompt",
                because=because,
            )
        if sampling.temperature == 0:
            self.fail(
                "greedy completions of a problem are all the same",
                "Set sampling.temperature above 0, such as 1.0",
                "sampling.temperature",
                because=because,
            )
        usual = {"top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1, "thinking_token_budget": 0}
        for name, off in usual.items():
            if getattr(sampling, name) != off:
                key = f"sampling.{name}"
                problem = f"{who} needs answers drawn from the model's own probabilities"
                self.fail(problem, f"Set {key} to {off}", key, because=because)

    def of_grpo(self) -> None:
        grpo, sampling = self.config.grpo, self.config.sampling
        self.of_groups("GRPO", "method")
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
