"""Everything around the steps of a run that both methods share: problems, scores, progress, evaluations, the end.

A trainer makes a step, hands over its row of metrics and its rollouts, and asks whether the run continues. Both methods
therefore see the same problems, are scored and evaluated in the same way, end by the same rule, and write the same
files.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from eggroll_llm.engine.interface import Engine
from eggroll_llm.engine.sampling import OnRollout, Rollout, added, decoding_of, greedy
from eggroll_llm.errors import ModelError, TaskError
from eggroll_llm.records.baseline import Constant
from eggroll_llm.records.diagnosis import diagnose, news
from eggroll_llm.records.drawn import read_drawn
from eggroll_llm.system import signals
from eggroll_llm.tasks.constant import best_constant
from eggroll_llm.tasks.order import problems_of_step
from eggroll_llm.tasks.prompts import set_hash
from eggroll_llm.training.evaluation import Evaluation, divergence_from, draw_reference, evaluate
from eggroll_llm.training.limits import Course, Limits
from eggroll_llm.training.prepare import Prepared
from eggroll_llm.training.recorder import Metrics, Recorder, completion_row, in_order_of_interest, to_record
from eggroll_llm.training.scorer import ScoredRollout, Scorer, Scoring, answered, score_of

TIED = "rewards tied, nothing learned"


class Display(Protocol):
    """Where progress is shown."""

    def working(self, text: str) -> None:
        """Show that something of unknown duration has begun."""

    def course(self, course: Course) -> None:
        """Show where the run stands."""

    def sampling(self, label: str, done: int, total: int) -> None:
        """Show how far the sampling of a step or an evaluation is."""

    def step(
        self, row: dict[str, Any], samples: Sequence[dict[str, Any]], *, seconds_left: float | None, note: str = ""
    ) -> None:
        """Show a finished step, and a few words about it."""

    def evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Show an evaluation."""

    def message(self, text: str) -> None:
        """Show a sentence."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What a run is made of."""

    prepared: Prepared
    """Configuration, task and problems."""
    engine: Engine
    scorer: Scorer
    recorder: Recorder
    display: Display


class Harness:
    """Holds where a run stands; `step` is its trainer's to advance."""

    def __init__(self, run: Run, *, step: int = 0) -> None:
        """Continue after `step`, which the recorder's rows lead up to."""
        self.run, self.config, self.step = run, run.prepared.config, step
        config, rows = self.config, run.recorder.rows
        self.limits = Limits(steps=config.steps, minutes=config.minutes)
        self.wall_time = float(rows[-1]["wall_time"]) if rows else 0.0
        """Seconds in steps so far, without evaluations."""
        self.decoding = decoding_of(config.sampling, run.prepared.task.stop)
        """How completions are sampled in training."""
        self.greedy = greedy(self.decoding, max_tokens=config.eval.max_tokens)
        """How they are in an evaluation."""
        self._scoring: Scoring | None = None  # of the current step
        self._said: dict[str, int] = {}  # kinds of findings that were shown, with their level
        self._show_course()

    def finished(self) -> bool:
        """Return whether a limit of the configuration is reached, or a callback has ended the run."""
        signals.check()
        return self.run.recorder.callbacks.stopped or self.limits.reached(self.step, self.wall_time)

    def problems(self) -> list[int]:
        """Return the indices of the problems of the current step."""
        count, per_step = len(self.run.prepared.train.problems), self.config.problems_per_step
        return problems_of_step(count, per_step, seed=self.config.seed, step=self.step)

    def show_sampling(self, done: int, total: int) -> None:
        """Show how far the sampling of the current step is."""
        self._show_progress(self.limits.label(self.step), done, total)

    def scoring(self, indices_P: Sequence[int]) -> OnRollout:
        """Return what takes each rollout of the current step as it arrives, so that it is scored meanwhile.

        `indices_P` are the problems behind the step's prompts.
        """
        scorer, train = self.run.scorer, self.run.prepared.train
        scorer.start_counting()
        self._scoring = scoring = scorer.begin()

        def put(number: int, rollout: Rollout) -> None:
            scoring.put(number, *answered(train, indices_P[rollout.prompt], rollout.completion))

        return put

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """Return all rollouts that `scoring` has taken, in their order, with their scores.

        Raises TaskError when this is the first step and the grader fails on all of it.
        """
        assert self._scoring is not None
        verdicts, self._scoring = dict(self._scoring.rest()), None
        if self.step == 1:
            self.run.scorer.check(of=" of the first step")
        return [
            ScoredRollout(
                member=r.member, prompt=r.prompt, sample=r.sample, completion=r.completion, score=score_of(verdicts[i])
            )
            for i, r in enumerate(rollouts)
        ]

    def check_dropped(self, dropped: int, total: int, what: str) -> None:
        """Raise TaskError when the rewards of more than half of the step's members or completions are not finite."""
        if 2 * dropped > total:
            raise TaskError(
                f"step {self.step}: {dropped} of {total} {what} were dropped for a NaN or infinite reward: make "
                f"score() return finite rewards; the first: {self.run.scorer.first_dropped}"
            )

    def start(self) -> None:
        """Evaluate the base model, as step 0, and find the best constant answer, which the figures are read next to."""
        prepared, recorder = self.run.prepared, self.run.recorder
        train, held_out = prepared.train.problems, prepared.held_out.problems
        constant = best_constant(prepared.task, train, held_out, self.run.scorer.judge)
        evaluation = self._evaluate(constant)
        if self.config.method == "es":
            with contextlib.suppress(ModelError):  # an architecture that cannot score is trained without
                reference = draw_reference(self.run.engine, prepared.held_out, self.greedy)
                recorder.keep(recorder.directory.reference, reference)
        recorder.record_metrics({"step": 0, "wall_time": 0.0, **evaluation.metrics}, (), evaluation.samples)
        self._show_course()

    def end_step(
        self, metrics: Metrics, rollouts: Sequence[ScoredRollout], indices_P: Sequence[int], *, tied: bool
    ) -> None:
        """Show and record a finished step, "time/step" among its metrics; evaluate when it is due.

        `tied`: all rewards were tied, so nothing was learned.
        """
        config, train, recorder, display = self.config, self.run.prepared.train, self.run.recorder, self.run.display
        self.wall_time += metrics["time/step"]
        row: Metrics = {"step": self.step, "wall_time": self.wall_time, **metrics, **self.run.engine.metrics()}
        shown = in_order_of_interest(rollouts, self.step)
        display.step(
            row,
            [completion_row(rollout, self.step, train, indices_P) for rollout in shown[: config.log.samples]],
            seconds_left=self.limits.seconds_left(self.step, self.wall_time),
            note=TIED if tied else "",
        )
        evaluation = self._evaluate() if self._evaluation_due() else None
        if evaluation:
            row |= evaluation.metrics | recorder.against_base(evaluation)
            if reference := read_drawn(recorder.directory.reference):
                row["base/divergence"] = divergence_from(reference, self.run.engine, self.run.prepared.held_out)
        recorded = to_record(shown, rollouts, config.log.completions)
        completions = [completion_row(rollout, self.step, train, indices_P) for rollout in recorded]
        recorder.record_step(row, completions, evaluation.samples if evaluation else ())
        self._show_course()
        for finding in news(self._said, diagnose(config, recorder.rows)):
            self._said[finding.kind] = finding.level
            display.message(f"{finding}")

    def save(
        self, write_model: Callable[[Path], None], state: Mapping[str, Tensor], metadata: Mapping[str, str]
    ) -> None:
        """Write a checkpoint of the current step and delete old ones."""
        self.run.recorder.save(self.step, write_model, state, {"wall_time": self.wall_time, **metadata})

    def stopped_by(self, problem: str) -> str:
        """Return the problem that ended the run with its step, what is on disk, and how to resume."""
        return f"step {self.step}: {problem.rstrip('.')}. {self.run.recorder.how_to_resume()}"

    def _evaluation_due(self) -> bool:
        every = self.config.eval.every
        return self.finished() or (bool(every) and self.step % every == 0)

    def _evaluate(self, constant: Constant | None = None) -> Evaluation:
        run, held_out = self.run, self.run.prepared.held_out
        evaluation = evaluate(
            run.engine,
            run.scorer,
            held_out,
            self.greedy,
            lambda done, total: self._show_progress("evaluation", done, total),
        )
        settings: dict[str, Any] = {
            "task": self.config.task,
            "split": self.config.eval.split,
            "step": self.step,
            "prompts": set_hash(held_out.hashes),
            "prompt": held_out.example,
            "max_tokens": self.greedy.max_tokens,
            "temperature": self.greedy.temperature,
            **added(self.greedy),
            **(constant.settings() if constant else {}),
        }
        run.recorder.record_evaluation(self.step, settings, evaluation)
        run.display.evaluation(self.step, evaluation)
        return evaluation

    def _show_progress(self, label: str, done: int, total: int) -> None:
        signals.check()
        self.run.display.sampling(label, done, total)

    def _show_course(self) -> None:
        best = self.run.recorder.best
        accuracy = float(best["eval/accuracy"]) if best else None
        self.run.display.course(self.limits.course(self.step, self.wall_time, accuracy))
