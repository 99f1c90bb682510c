"""A configuration -> a finished run: puts task, model, engine, journal and the trainer of its method together.

Everything that can be known without the engine is checked before it starts.
"""

import copy
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eggroll_llm.config.recipe import RunConfig, applies, check_resume, flat, frozen_hash, load_recipe, to_toml
from eggroll_llm.errors import ConfigError, EngineError, TaskError, TrainingError
from eggroll_llm.models import embedded
from eggroll_llm.models.architectures import check_method, check_tested
from eggroll_llm.models.files import architecture_of
from eggroll_llm.models.resolve import model_identity, resolve_model
from eggroll_llm.models.targets import check_rank
from eggroll_llm.records.checkpoint import Checkpoint, clean
from eggroll_llm.records.diagnosis import Finding, diagnose
from eggroll_llm.records.journal import Journal, JournalHeader
from eggroll_llm.records.run_dir import OnExisting, RunDir
from eggroll_llm.system import installed
from eggroll_llm.system.hardware import resolve_dtype, serves_on_cpu
from eggroll_llm.system.jsonl import to_json
from eggroll_llm.tasks.chat import check_chat
from eggroll_llm.tasks.constant import Constant, best_constant
from eggroll_llm.tasks.load import PATH_OPTIONS, load_task
from eggroll_llm.tasks.prompts import ProblemSet, Prompter, needed_context, problems_hash
from eggroll_llm.tasks.task import Problem, Task
from eggroll_llm.training.budget import check_memory
from eggroll_llm.training.es import EsTrainer
from eggroll_llm.training.evaluation import Evaluation
from eggroll_llm.training.grpo import GrpoTrainer
from eggroll_llm.training.harness import Display, Loop
from eggroll_llm.training.resume import by_checkpoint, by_journal, restore, say_what_was_found
from eggroll_llm.training.scorer import Scorer
from eggroll_llm.training.trackers import Trackers

MAX_SLOTS = 64


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a run needs before its engine."""

    config: RunConfig
    """With everything automatic settled: dtype, task file, context length, slots (of GRPO one, which stays empty)."""
    task: Task
    model_dir: Path
    train: ProblemSet
    held_out: ProblemSet
    notes: tuple[str, ...] = ()
    """What else the user should know, as `task.notes`."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run has come to."""

    steps: int
    wall_time: float
    first: dict[str, Any]
    """Metrics of the base model's evaluation."""
    last: dict[str, Any]
    """Metrics of the last evaluation."""
    metrics: Sequence[dict[str, Any]]
    """All lines of metrics.jsonl."""
    base_model: str
    """What it is called beside its figures."""
    constant: Constant | None
    """The best fixed answer pattern on the held-out problems; None where the task has none, or `evaluation` is None."""
    final: Path
    evaluation: Evaluation | None
    """The last evaluation, when this process did it."""
    findings: Sequence[Finding] = ()
    """What kept the run from learning."""


def settle(config: RunConfig, recipe_dir: Path) -> RunConfig:
    """Return the configuration with what depends on the machine or the recipe's folder made explicit."""
    task = config.task
    path, separator, name = task.rpartition(":")
    if separator and path.endswith(".py"):
        task = f"{(recipe_dir / path).resolve()}:{name}"
    options: Any = copy.copy(config.task_options)
    for key in PATH_OPTIONS.get(task, ()):
        if options.get(key) and isinstance(options[key], str):
            options[key] = str((recipe_dir / options[key]).resolve())
    if config.engine.dtype == "float32" and not serves_on_cpu():
        raise ConfigError(
            'engine.dtype = "float32": vLLM\'s adapter kernels on CUDA serve bfloat16 only. Set it to "auto".'
        )
    es, grpo, engine = config.es, config.grpo, config.engine
    model = Path(config.model).expanduser()
    return dataclasses.replace(
        config,
        model=str(model.resolve()) if model.is_dir() and config.model != embedded.NAME else config.model,
        task=task,
        task_options=options,
        grpo=dataclasses.replace(grpo, dtype=resolve_dtype(grpo.dtype)) if config.method == "grpo" else grpo,
        engine=dataclasses.replace(
            engine,
            dtype=resolve_dtype(engine.dtype),
            slots=engine.slots or (min(es.population, MAX_SLOTS) if config.method == "es" else 1),
        ),
    )


def prepare(config: RunConfig, recipe_dir: Path, *, memory: bool = True) -> Prepared:
    """Load task, model directory and tokenizer, and turn all prompts into tokens. Raises UserError.

    With `memory` a run that needs more of it than there is, is refused.
    """
    config = settle(config, recipe_dir)
    installed.check_settings(config)
    task = load_task(config.task, config.task_options, base_dir=recipe_dir, limits=config.reward)
    train, held_out = _splits(task, config)
    train, notes = _without_held_out(task, train, held_out)
    model_dir = resolve_model(config.model)
    architecture = architecture_of(model_dir)
    check_tested(architecture, model_dir, allow_untested=config.engine.allow_untested_architecture)
    check_method(architecture, config.method, model_dir)
    if config.method == "es":
        check_rank(model_dir, "es.rank", config.es.rank)
    else:
        check_rank(model_dir, "grpo.lora_rank", config.grpo.lora_rank)
    prompter = Prompter(model_dir, config.chat)
    check_chat(prompter, [task.prompt(problem) for problem in train])
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
    prepared = Prepared(
        config=config, task=task, model_dir=model_dir, train=train_set, held_out=held_out_set, notes=notes
    )
    if memory:
        check_memory(prepared)
    return prepared


def _splits(task: Task, config: RunConfig) -> tuple[Sequence[Problem], Sequence[Problem]]:
    """Return the problems to train on and those to evaluate on."""
    train, test = task.problems("train"), task.problems("test")
    if not train or not test:
        raise ConfigError(
            f"task {config.task!r} has {len(train)} training and {len(test)} test problems: it needs both"
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
    """Return the training problems that are asked otherwise than any held-out or test problem, and a note of the rest.

    The built-in tasks compare problems, which is more, when they load them.
    """

    def asked(problem: Problem) -> str:
        return to_json(task.prompt(problem))

    taken = {asked(problem) for problem in (*held_out, *task.problems("test"))}
    kept = [problem for problem in train if asked(problem) not in taken]
    if not kept:
        raise TaskError("every training problem has the prompt of a held-out one: give train problems of its own")
    if len(kept) == len(train):
        return train, ()
    return kept, (f"{len(train) - len(kept)} training problems were left out: they have the prompt of a held-out one.",)


def encode(prompter: Prompter, task: Task, problems: Sequence[Problem]) -> ProblemSet:
    """Return the problems with the task's prompts in tokens."""
    return prompter.encode_all(problems, [task.prompt(problem) for problem in problems])


def context_limit(model_dir: Path) -> int:
    """Return the longest context that the model was made for; a very long one where its file names no number."""
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    limit = config.get("max_position_embeddings")
    return limit if isinstance(limit, int) else 2**31


def start_engine(prepared: Prepared) -> Any:
    """Start vLLM for a run."""
    from eggroll_llm.engine.vllm.engine import Engine
    from eggroll_llm.training.plan import optimizer_settings

    config = prepared.config
    common: dict[str, Any] = {"slots": config.engine.slots, "max_model_len": config.engine.max_model_len}
    if config.method == "grpo":  # the weights come from outside, and there are no members
        return Engine(prepared.model_dir, config.engine, rank=1, trainable=False, logprobs=True, **common)
    return Engine(
        prepared.model_dir, config.engine, rank=config.es.rank, optimizer=optimizer_settings(config), **common
    )


def train(config: RunConfig, recipe_dir: Path, run_path: Path, on_existing: OnExisting, display: Display) -> Outcome:
    """Train to the limit, write `final/` and return what came out. Raises UserError."""
    RunDir.check(run_path, on_existing)
    prepared = prepare(config, recipe_dir)
    config, header = prepared.config, journal_header(prepared)
    for note in (*prepared.task.notes, *prepared.notes):
        display.message(note)
    with RunDir.create(run_path, to_toml(config), on_existing) as run:
        if run.resumed:
            check_resume(load_recipe(run.config), config, saved_in=str(run.config))
        clean(run.checkpoints)
        with (
            Journal.open(run.journal, header) as journal,
            Scorer(prepared.task, config.reward, display.message) as scorer,
        ):
            if run.resumed:
                run.write_config(to_toml(config))
            say_what_was_found(run, journal, header, display)
            if config.method == "es":
                step, checkpoint = by_journal(run, journal, display), None
            else:
                step, checkpoint = by_checkpoint(run, display)
            evaluation = _train_from(step, checkpoint, prepared, scorer, run, journal, display)
        return outcome(run, config, evaluation)


def _train_from(
    step: int,
    checkpoint: Checkpoint | None,
    prepared: Prepared,
    scorer: Scorer,
    run: RunDir,
    journal: Journal,
    display: Display,
) -> Evaluation | None:
    """Start the engine, train on after `step`, and write `final/`; return the last evaluation if it was done here."""
    config = prepared.config
    display.working("starting the engine")
    engine = start_engine(prepared)
    settings = {key: value for key, value in flat(config).items() if applies(key, config)}
    trackers = Trackers(config.log, run.path, settings, display.message)
    try:
        loop = Loop(
            config,
            engine,
            scorer,
            prepared.held_out,
            tuple(prepared.task.stop),
            run,
            journal,
            display,
            step=step,
            metrics=run.read_metrics() if step else (),
            trackers=trackers,
        )
        engine.watchdog.describe = loop.stopped_by
        trainer: EsTrainer | GrpoTrainer
        if config.method == "es":
            checkpoint = restore(engine, config, run, journal, display)
            trainer = EsTrainer(loop, prepared.train)
        else:
            if run.resumed:
                display.message(_FROM.format(step) if step else _FROM_START)
            trainer = GrpoTrainer(loop, prepared.train, model_dir=prepared.model_dir, checkpoint=checkpoint)
        loop.resumed_from = checkpoint.path if checkpoint else None
        evaluation = trainer.run()
        display.working("writing the model")
        run.write_final(trainer.export)
    except EngineError as error:
        raise TrainingError(loop.stopped_by(str(error))) from error
    finally:
        trackers.close()
        engine.close()
    return evaluation


def journal_header(prepared: Prepared) -> JournalHeader:
    """Return what the updates of a run are updates of."""
    return JournalHeader(
        frozen_hash=frozen_hash(prepared.config),
        base_model=model_identity(prepared.model_dir),
        train=problems_hash(prepared.train),
        held_out=problems_hash(prepared.held_out),
        task_file=getattr(prepared.task, "file_hash", ""),
    )


_FROM = "resuming after step {}, from its checkpoint; what came later is done again"
_FROM_START = "resuming from the start: there is no checkpoint"


def outcome(run: RunDir, config: RunConfig, evaluation: Evaluation | None = None) -> Outcome:
    """Read what a run has come to from its directory."""
    metrics = run.read_metrics()
    evaluated = [row for row in metrics if "eval/accuracy" in row]
    held_out = [sample.doc for sample in evaluation.samples] if evaluation else []
    return Outcome(
        steps=int(metrics[-1]["step"]),
        wall_time=float(metrics[-1]["wall_time"]),
        first=evaluated[0],
        last=evaluated[-1],
        metrics=metrics,
        base_model=embedded.called(config.model),
        constant=best_constant(config.task, config.task_options, held_out),
        final=run.final,
        evaluation=evaluation,
        findings=diagnose(config, metrics, ended=True),
    )
