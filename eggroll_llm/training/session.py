"""A configuration -> a finished run: puts task, model, engine, journal and the trainer of its method together.

Everything that can be known without the engine is checked before it starts.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eggroll_llm.config.compare import applies, check_resume, flat
from eggroll_llm.config.recipe import load_recipe, to_toml
from eggroll_llm.config.rules import validate
from eggroll_llm.config.schema import RunConfig
from eggroll_llm.engine.start import start_engine
from eggroll_llm.errors import EngineError, SamplesError, TrainingError
from eggroll_llm.models.called import called
from eggroll_llm.records.baseline import Constant, Share, by_kind
from eggroll_llm.records.checkpoint import Checkpoint, clean
from eggroll_llm.records.diagnosis import Finding, diagnose
from eggroll_llm.records.journal import Journal
from eggroll_llm.records.run_dir import OnExisting, RunDir
from eggroll_llm.training.budget import check_memory
from eggroll_llm.training.callbacks.base import Callback, Callbacks, check_callbacks
from eggroll_llm.training.callbacks.trackers import trackers
from eggroll_llm.training.es import EsTrainer
from eggroll_llm.training.grpo import GrpoTrainer
from eggroll_llm.training.harness import Display, Harness, Run
from eggroll_llm.training.prepare import Prepared, journal_header, prepare
from eggroll_llm.training.recorder import Recorder
from eggroll_llm.training.resume import by_checkpoint, by_journal, check_steps_left, restore, say_what_was_found
from eggroll_llm.training.scorer import Scorer


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The outcome of a run."""

    steps: int
    wall_time: float
    first: dict[str, Any]
    """Metrics of the base model's evaluation."""
    last: dict[str, Any]
    """Metrics of the last evaluation."""
    metrics: Sequence[dict[str, Any]]
    """All lines of metrics.jsonl."""
    base_model: str
    """Its name next to its figures."""
    constant: Constant | None
    """The best constant answer to the held-out problems; None where the task has none, or it was not recorded."""
    kinds: Mapping[str, tuple[Share, Share]]
    """Accuracy of the first and of the last evaluation by kind of problem; empty without kinds."""
    final: Path
    """The model as it was at the end."""
    findings: Sequence[Finding] = ()
    """What kept the run from learning."""

    @property
    def path(self) -> Path:
        """Return the run directory."""
        return self.final.parent


def train(
    config: RunConfig,
    recipe_dir: Path,
    run_path: Path,
    on_existing: OnExisting,
    display: Display,
    *,
    callbacks: Sequence[Callback] = (),
) -> Outcome:
    """Train to the limit, write `final/` and return the outcome. Raises UserError, and what a callback raises."""
    validate(config)
    check_callbacks(callbacks)
    RunDir.check(run_path, on_existing)
    prepared = prepare(config, recipe_dir)
    check_memory(prepared)
    config, header = prepared.config, journal_header(prepared)
    for note in (*prepared.task.notes, *prepared.notes):
        display.message(note)
    with RunDir.create(run_path, to_toml(config), on_existing) as run:
        if run.resumed:
            check_resume(load_recipe(run.config), config, saved_in=str(run.config))
            check_steps_left(config.steps, run)
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
            _train_from(step, checkpoint, prepared, run, journal, scorer, display, callbacks)
        return outcome(run, config)


def _train_from(
    step: int,
    checkpoint: Checkpoint | None,
    prepared: Prepared,
    run: RunDir,
    journal: Journal,
    scorer: Scorer,
    display: Display,
    own_callbacks: Sequence[Callback],
) -> None:
    """Start the engine, continue after `step` and write `final/`."""
    config, is_es = prepared.config, prepared.config.method == "es"
    settings = {key: value for key, value in flat(config).items() if applies(key, config)}
    metrics = run.read_metrics() if step else ()
    tracking = trackers(config.log, run.path, settings, metrics, display.message)
    with contextlib.ExitStack() as stack:
        callbacks = stack.enter_context(contextlib.closing(Callbacks([*tracking, *own_callbacks])))
        display.working("starting the engine")
        engine = start_engine(
            prepared.model_dir,
            config.engine,
            es=config.es if is_es else None,
            logprobs=not is_es,
            thinking=config.sampling.thinking_token_budget > 0,
            model=config.model,
            logs=run.path / "engines",
            say=display.message,
        )
        stack.callback(engine.close)
        recorder = Recorder(config, run, journal, metrics=metrics, callbacks=callbacks)
        harness = Harness(
            Run(prepared=prepared, engine=engine, scorer=scorer, recorder=recorder, display=display), step=step
        )
        engine.watchdog.describe = harness.stopped_by
        try:
            trainer: EsTrainer | GrpoTrainer
            if is_es:
                checkpoint = restore(engine, config, run, journal, display)
                trainer = EsTrainer(harness)
            else:
                if run.resumed:
                    again = f"resuming from the checkpoint of step {step}; later steps are repeated"
                    display.message(again if step else "no checkpoint yet: starting from the beginning")
                trainer = GrpoTrainer(harness, checkpoint=checkpoint)
            recorder.resumed_from = checkpoint.path if checkpoint else None
            trainer.run()
            if callbacks.stopped:
                reason = callbacks.reason or "no reason given"
                display.message(f"a callback ended the run after step {harness.step}: {reason}")
            display.working("writing the model")
            run.write_final(trainer.export)
        except EngineError as error:
            raise TrainingError(harness.stopped_by(str(error))) from error


def outcome(run: RunDir, config: RunConfig) -> Outcome:
    """Read the outcome of a run from its directory."""
    metrics = run.read_metrics()
    evaluated = [row for row in metrics if "eval/accuracy" in row]
    return Outcome(
        steps=int(metrics[-1]["step"]),
        wall_time=float(metrics[-1]["wall_time"]),
        first=evaluated[0],
        last=evaluated[-1],
        metrics=metrics,
        base_model=called(config.model),
        constant=run.constant(),
        kinds=_kinds(run, evaluated[0]["step"], evaluated[-1]["step"]),
        final=run.final,
        findings=diagnose(config, metrics, ended=True),
    )


def _kinds(run: RunDir, first: int, last: int) -> dict[str, tuple[Share, Share]]:
    try:
        before, after = (by_kind(run.read_evaluation(step)) for step in (first, last))
    except SamplesError:
        return {}
    return {kind: (before[kind], share) for kind, share in after.items() if kind in before}
