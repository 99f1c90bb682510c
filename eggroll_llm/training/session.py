"""A configuration -> a finished run: puts task, model, engine, journal and the trainer of its method together.

Everything that can be known without the engine is checked before it starts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eggroll_llm.config.compare import applies, check_resume, flat
from eggroll_llm.config.recipe import load_recipe, to_toml
from eggroll_llm.config.schema import RunConfig
from eggroll_llm.engine.blueprint import Blueprint
from eggroll_llm.engine.interface import Engine
from eggroll_llm.engine.start import start
from eggroll_llm.errors import EngineError, TrainingError
from eggroll_llm.models import embedded
from eggroll_llm.records.checkpoint import Checkpoint, clean
from eggroll_llm.records.diagnosis import Finding, diagnose
from eggroll_llm.records.journal import Journal
from eggroll_llm.records.run_dir import OnExisting, RunDir
from eggroll_llm.tasks.constant import Constant, best_constant
from eggroll_llm.training.budget import check_memory
from eggroll_llm.training.es import EsTrainer
from eggroll_llm.training.evaluation import Evaluation
from eggroll_llm.training.grpo import GrpoTrainer
from eggroll_llm.training.harness import Display, Harness, Run
from eggroll_llm.training.prepare import Prepared, journal_header, prepare
from eggroll_llm.training.recorder import OnStep, Recorder
from eggroll_llm.training.resume import by_checkpoint, by_journal, restore, say_what_was_found
from eggroll_llm.training.scorer import Scorer
from eggroll_llm.training.trackers import Trackers


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
    """The model as it was at the end."""
    evaluation: Evaluation | None
    """The last evaluation, when this process did it."""
    findings: Sequence[Finding] = ()
    """What kept the run from learning."""

    @property
    def path(self) -> Path:
        """Return the run directory."""
        return self.final.parent


def start_engine(prepared: Prepared, run: RunDir, display: Display) -> Engine:
    """Start vLLM for a run, once or several times."""
    config = prepared.config
    trainable = config.method == "es"  # else the weights come from outside, and there are no members
    blueprint = Blueprint(
        model=config.model,
        model_dir=prepared.model_dir,
        engine=config.engine,
        slots=config.engine.slots,
        rank=config.es.rank if trainable else 1,
        max_model_len=config.engine.max_model_len,
        es=config.es if trainable else None,
        logprobs=not trainable,
    )
    return start(blueprint, run.path / "engines", display.message)


def train(
    config: RunConfig,
    recipe_dir: Path,
    run_path: Path,
    on_existing: OnExisting,
    display: Display,
    *,
    on_step: OnStep | None = None,
) -> Outcome:
    """Train to the limit, write `final/` and return what came out. Raises UserError."""
    RunDir.check(run_path, on_existing)
    prepared = prepare(config, recipe_dir)
    check_memory(prepared)
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
            evaluation = _train_from(step, checkpoint, prepared, scorer, run, journal, display, on_step)
        return outcome(run, config, evaluation)


def _train_from(
    step: int,
    checkpoint: Checkpoint | None,
    prepared: Prepared,
    scorer: Scorer,
    run: RunDir,
    journal: Journal,
    display: Display,
    on_step: OnStep | None,
) -> Evaluation | None:
    """Start the engine, train on after `step`, and write `final/`; return the last evaluation if it was done here."""
    config = prepared.config
    display.working("starting the engine")
    engine = start_engine(prepared, run, display)
    settings = {key: value for key, value in flat(config).items() if applies(key, config)}
    trackers = Trackers(config.log, run.path, settings, display.message)
    try:
        metrics = run.read_metrics() if step else ()
        recorder = Recorder(config, run, journal, metrics=metrics, trackers=trackers, on_step=on_step)
        harness = Harness(
            Run(prepared=prepared, engine=engine, scorer=scorer, recorder=recorder, display=display), step=step
        )
        engine.watchdog.describe = harness.stopped_by
        trainer: EsTrainer | GrpoTrainer
        if config.method == "es":
            checkpoint = restore(engine, config, run, journal, display)
            trainer = EsTrainer(harness)
        else:
            if run.resumed:
                display.message(_FROM.format(step) if step else _FROM_START)
            trainer = GrpoTrainer(harness, checkpoint=checkpoint)
        recorder.resumed_from = checkpoint.path if checkpoint else None
        evaluation = trainer.run()
        display.working("writing the model")
        run.write_final(trainer.export)
    except EngineError as error:
        raise TrainingError(harness.stopped_by(str(error))) from error
    finally:
        trackers.close()
        engine.close()
    return evaluation


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
