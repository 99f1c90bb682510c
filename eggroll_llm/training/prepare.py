"""A configuration -> what a run needs before its engine; everything that can be checked early is checked here."""

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eggroll_llm.config.compare import frozen_hash
from eggroll_llm.config.recipe import load_recipe
from eggroll_llm.config.schema import GrpoConfig, RunConfig
from eggroll_llm.errors import ConfigError, TaskError
from eggroll_llm.es.settings import set_in_vain, without_effect
from eggroll_llm.models.architectures import check_method, check_quantization, check_tensor_parallel, check_tested
from eggroll_llm.models.files import architecture_of, context_limit, model_identity, read_config
from eggroll_llm.models.resolve import resolve_model, settled_name
from eggroll_llm.models.targets import check_layers, check_rank, left_out
from eggroll_llm.records.journal import JournalHeader
from eggroll_llm.system import installed
from eggroll_llm.system.hardware import resolve_dtype, resolve_sequences, serves_on_cpu
from eggroll_llm.system.jsonl import to_json
from eggroll_llm.tasks.chat import check_chat, check_thoughts
from eggroll_llm.tasks.load import load_task
from eggroll_llm.tasks.paths import absolute_option, absolute_task, absolute_value
from eggroll_llm.tasks.prompts import ProblemSet, Prompter, needed_context, problems_hash
from eggroll_llm.tasks.task import Problem, Task

MAX_SLOTS = 64


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a run needs before its engine."""

    config: RunConfig
    """With everything automatic settled: dtype, task file, context length, sequences, slots (one unused for GRPO)."""
    task: Task
    model_dir: Path
    train: ProblemSet
    held_out: ProblemSet
    notes: tuple[str, ...] = ()
    """What else the user should know, as `task.notes`."""


def with_absolute_paths(config: RunConfig, recipe_dir: Path) -> RunConfig:
    """Return the configuration with the paths that are relative to its recipe's folder made absolute."""
    options: Any = copy.copy(config.task_options)
    if ":" not in config.task:
        for key in options:
            options[key] = absolute_option(key, options[key], recipe_dir)
    template = absolute_value("chat.template_file", config.chat.template_file, recipe_dir)
    return dataclasses.replace(
        config,
        task=absolute_task(config.task, recipe_dir),
        task_options=options,
        chat=dataclasses.replace(config.chat, template_file=template),
    )


def load_absolute(path: Path | str, overrides: Sequence[tuple[str, str]] = ()) -> RunConfig:
    """Return the configuration of a recipe and flags, its paths made absolute. Raises ConfigError."""
    return with_absolute_paths(load_recipe(path, overrides), Path(path).resolve().parent)


def settle(config: RunConfig, recipe_dir: Path) -> RunConfig:
    """Return the configuration with what depends on the machine or the recipe's folder made explicit."""
    if config.engine.dtype == "float32" and not serves_on_cpu():
        raise ConfigError(
            'engine.dtype = "float32": on CUDA the population is served in bfloat16 only. Set it to "auto".'
        )
    es, grpo, engine = config.es, config.grpo, config.engine
    dtype = resolve_dtype(engine.dtype)
    if config.method == "es" and es.masters == "split" and dtype == "float32":
        raise ConfigError(
            f'es.masters = "split": engine.dtype = "{engine.dtype}" serves float32 here, which has no other half to '
            'keep. Set es.masters to "float32", or engine.dtype to "bfloat16".'
        )
    if engine.quantization == "fp8" and (dtype == "float32" or config.method != "es"):
        raise ConfigError(
            f'engine.quantization = "fp8": FP8 is rounded from bfloat16 weights of method "es", and here method = '
            f'"{config.method}" and engine.dtype = "{dtype}". Set engine.quantization to "none", or change these.'
        )
    return dataclasses.replace(
        with_absolute_paths(config, recipe_dir),
        model=settled_name(config.model),
        grpo=dataclasses.replace(grpo, dtype=resolve_dtype(grpo.dtype)) if config.method == "grpo" else grpo,
        engine=dataclasses.replace(
            engine,
            dtype=dtype,
            max_sequences=resolve_sequences(engine.max_sequences),
            slots=engine.slots or (min(es.population, MAX_SLOTS) if config.method == "es" else 1),
        ),
    )


def prepare(config: RunConfig, recipe_dir: Path) -> Prepared:
    """Load task, model directory and tokenizer, and turn all prompts into tokens. Raises UserError."""
    config = settle(config, recipe_dir)
    check_packages(config)
    task = load_task(config.task, config.task_options, base_dir=recipe_dir, limits=config.reward)
    train, held_out = _splits(task, config)
    train, notes = _without_held_out(task, train, held_out)
    model_dir = resolve_model(config.model)
    architecture = architecture_of(model_dir)
    check_tested(architecture, model_dir, allow_untested=config.engine.allow_untested_architecture)
    check_method(architecture, config.method, model_dir)
    description = read_config(model_dir)
    check_tensor_parallel(description, config.engine.tensor_parallel, model_dir)
    check_quantization(description, config.engine.quantization, model_dir)
    if config.method == "es":
        check_rank(model_dir, "es.rank", config.es.rank)
        check_layers(model_dir, config.es.layers)
        notes = (*notes, *left_out(model_dir), *(f"{each}." for each in without_effect(config.es, "es.")))
    else:
        check_rank(model_dir, "grpo.lora_rank", config.grpo.lora_rank)
        notes = (*notes, *(f"{each}." for each in _without_effect(config.grpo)))
    prompter = Prompter(model_dir, config.chat)
    check_chat(prompter, map(task.prompt, train))
    check_thoughts(prompter, config.sampling.thinking_token_budget)
    train_set = encode(prompter, task, train)
    held_out_set = encode(prompter, task, held_out)
    context = needed_context(
        [train_set, held_out_set],
        max(config.sampling.max_tokens, config.eval.max_tokens),
        config.engine.max_model_len,
        context_limit(model_dir),
        length_key="eval.max_tokens" if config.eval.max_tokens > config.sampling.max_tokens else "sampling.max_tokens",
    )
    config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, max_model_len=context))
    return Prepared(config=config, task=task, model_dir=model_dir, train=train_set, held_out=held_out_set, notes=notes)


def _splits(task: Task, config: RunConfig) -> tuple[Sequence[Problem], Sequence[Problem]]:
    """Return the problems to train on and those to evaluate on."""
    train, test = task.problems("train"), task.problems("test")
    if not train or not test:
        raise ConfigError(
            f"task {config.task!r} has {len(train)} training and {len(test)} test problems, but needs both"
        )
    wanted = config.eval.problems
    if config.eval.split == "test":
        return train, test[:wanted]
    if len(train) <= wanted:
        raise ConfigError(
            f"eval.problems = {wanted} leaves none of {len(train)} training problems: lower it, or set eval.split to "
            '"test"'
        )
    return train[:-wanted], train[-wanted:]


def _without_held_out(
    task: Task, train: Sequence[Problem], held_out: Sequence[Problem]
) -> tuple[Sequence[Problem], tuple[str, ...]]:
    """Return the training problems whose prompt no held-out or test problem has, and a note about the rest.

    The built-in tasks also compare the problems themselves when they load them.
    """

    def asked(problem: Problem) -> str:
        return to_json(task.prompt(problem))

    taken = {asked(problem) for problem in (*held_out, *task.problems("test"))}
    kept = [problem for problem in train if asked(problem) not in taken]
    if not kept:
        raise TaskError("every training problem has the prompt of a held-out one: give train other problems")
    if len(kept) == len(train):
        return train, ()
    return kept, (f"{len(train) - len(kept)} training problems were left out: they have the prompt of a held-out one.",)


def encode(prompter: Prompter, task: Task, problems: Sequence[Problem]) -> ProblemSet:
    """Return the problems with their prompts as tokens."""
    prompts, kinds = [task.prompt(problem) for problem in problems], [task.kind(problem) for problem in problems]
    return prompter.encode_all(problems, prompts, kinds=kinds)


def journal_header(prepared: Prepared) -> JournalHeader:
    """Return what identifies the run that the updates belong to."""
    return JournalHeader(
        frozen_hash=frozen_hash(prepared.config),
        base_model=model_identity(prepared.model_dir),
        train=problems_hash(prepared.train),
        held_out=problems_hash(prepared.held_out),
        task_file=getattr(prepared.task, "file_hash", ""),
    )


def check_packages(config: RunConfig) -> None:
    """Raise InstallError when packages that the settings of a run need are missing."""
    if config.method == "grpo":
        installed.check(
            'method = "grpo"', "trl", "accelerate", "datasets", *(["peft"] if config.grpo.lora_rank else [])
        )
    if config.engine.replicas > 1:
        installed.check(f"engine.replicas = {config.engine.replicas}", "ray")
    if config.log.wandb:
        installed.check("log.wandb", "wandb")
    if config.log.tensorboard:
        installed.check("log.tensorboard", "tensorboard")


def _without_effect(grpo: GrpoConfig) -> Iterator[str]:
    """Yield a sentence for each field that was set in vain."""
    several = (grpo.num_iterations > 1, "grpo.num_iterations above 1")
    needed = {
        "schedule_end": (grpo.learning_rate_schedule != "constant", "a schedule"),
        "lora_alpha": (grpo.lora_rank > 0, "grpo.lora_rank"),
        "epsilon": several,
        "epsilon_high": several,
    }
    return set_in_vain(grpo, needed, "grpo.")
