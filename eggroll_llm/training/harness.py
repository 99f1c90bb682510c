"""What a run does around its steps, whatever the method: limits, evaluations, metrics, checkpoints, model cards.

A trainer makes a step, hands over its row of metrics and its completions, and asks whether the run goes on. So two
methods end by the same rule, are evaluated on the same problems in the same way, and write the same files.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from eggroll_llm.config.schema import RunConfig
from eggroll_llm.engine.interface import Completion, Decoding, Engine
from eggroll_llm.errors import SamplesError
from eggroll_llm.models.card import write_card
from eggroll_llm.records.answers import TASK
from eggroll_llm.records.checkpoint import checkpoint_path, is_valid, list_checkpoints, prune, save_checkpoint
from eggroll_llm.records.diagnosis import diagnose, news
from eggroll_llm.records.journal import Journal
from eggroll_llm.records.run_dir import RunDir
from eggroll_llm.records.weights import best_step, write_provenance
from eggroll_llm.system import signals
from eggroll_llm.system.hardware import peak_memory
from eggroll_llm.system.invocation import command
from eggroll_llm.tasks.prompts import ProblemSet, set_hash
from eggroll_llm.tasks.task import Score
from eggroll_llm.training.evaluation import Evaluation, evaluate
from eggroll_llm.training.scorer import Scorer, unusable
from eggroll_llm.training.trackers import Trackers

if TYPE_CHECKING:
    from torch import Tensor

TIED = "rewards tied, nothing learned"


OnStep = Callable[[Mapping[str, Any]], None]
"""Called with the row of metrics of each finished step, evaluation included, when it is on disk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Course:
    """Where a run stands."""

    fraction: float | None
    """Of the limit that is nearest, 0 to 1; None without limits."""
    seconds_left: float | None
    """Until that limit, evaluations not counted; None without limits, or where nothing is known yet."""
    best: float | None
    """Highest accuracy so far; None before the first evaluation."""


class Display(Protocol):
    """Where progress is shown."""

    def working(self, text: str) -> None:
        """Show that something of unknown length has begun."""

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


class Loop:
    """The course of a run. `step` and `wall_time` are its trainer's to advance."""

    def __init__(
        self,
        config: RunConfig,
        engine: Engine,
        scorer: Scorer,
        held_out: ProblemSet,
        stop: tuple[str, ...],
        run: RunDir,
        journal: Journal,
        display: Display,
        *,
        step: int = 0,
        metrics: Sequence[Mapping[str, Any]] = (),
        trackers: Trackers | None = None,
        on_step: OnStep | None = None,
    ) -> None:
        """Continue after `step`, which `metrics` are the rows up to. `on_step` gets each row that is recorded."""
        self.config, self.engine, self.scorer, self.held_out = config, engine, scorer, held_out
        self.run_dir, self.journal, self.display, self.trackers = run, journal, display, trackers
        self.on_step = on_step
        self.step, self.wall_time = step, float(metrics[-1]["wall_time"]) if metrics else 0.0
        self.best = best_step(metrics)
        self.rows = [*metrics]
        """Rows of metrics so far."""
        self._said: dict[str, int] = {}  # kinds of findings that were shown, with their level
        self.resumed_from: Path | None = None
        """Checkpoint that this process went on from; it is kept."""
        sampling = config.sampling
        self.decoding = Decoding(
            max_tokens=sampling.max_tokens, temperature=sampling.temperature, top_p=sampling.top_p, stop=stop
        )
        """How completions are sampled in training."""
        self.greedy = Decoding(max_tokens=config.eval.max_tokens or sampling.max_tokens, stop=stop)
        self._saving_seconds = 0.0
        display.course(self._course())

    def finished(self) -> bool:
        """Whether a limit of the configuration is reached."""
        signals.check()
        out_of_steps = bool(self.config.steps) and self.step >= self.config.steps
        return out_of_steps or (bool(self.config.minutes) and self.wall_time >= 60 * self.config.minutes)

    @property
    def step_label(self) -> str:
        """Return "step 3 of 50", or "step 3" where no limit of steps is set."""
        steps = self.config.steps
        return f"step {self.step:>{len(str(steps))}} of {steps}" if steps else f"step {self.step}"

    def sampling(self, label: str, done: int, total: int) -> None:
        """Show how far the sampling of a step or an evaluation is."""
        signals.check()
        self.display.sampling(label, done, total)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Count what writing to the run directory takes; the next row has the sum since the one before."""
        start = time.perf_counter()
        yield
        self._saving_seconds += time.perf_counter() - start

    def start(self) -> Evaluation:
        """Evaluate the base model, as step 0."""
        evaluation = self._evaluate()
        self._log({"step": 0, "wall_time": 0.0} | _evaluation_row(evaluation))
        return evaluation

    def end_step(self, row: dict[str, Any], samples: Sequence[dict[str, Any]], *, tied: bool) -> Evaluation | None:
        """Show and record a finished step; evaluate when it is due. `tied`: all its rewards were."""
        shown = samples[: self.config.log.samples]
        self.display.step(row, shown, seconds_left=self._seconds_left(), note=TIED if tied else "")
        evaluation = self._evaluate() if self._evaluation_due() else None
        if evaluation:
            row |= _evaluation_row(evaluation) | self._against_base(evaluation)
        row["memory/peak_gib"] = peak_memory() / 2**30
        with self.saving():
            self.run_dir.append_completions(self._recorded(samples))
        row["time/save"], self._saving_seconds = self._saving_seconds, 0.0
        self._log(row)
        for finding in news(self._said, diagnose(self.config, self.rows)):
            self._said[finding.kind] = finding.level
            self.display.message(f"{finding}")
        return evaluation

    def checkpoint_due(self) -> bool:
        """Whether the current step gets a checkpoint."""
        every = self.config.checkpoint.every
        return (bool(every) and self.step % every == 0) or self.best_is_due()

    def best_is_due(self) -> bool:
        """Whether the best step so far is this one, and has no valid checkpoint yet. The base model needs none."""
        return (
            self.config.checkpoint.best
            and self.best is not None
            and 0 < self.best["step"] == self.step
            and not is_valid(checkpoint_path(self.run_dir.checkpoints, self.step))
        )

    def save(
        self, write_model: Callable[[Path], None], state: Mapping[str, "Tensor"], metadata: Mapping[str, Any]
    ) -> None:
        """Write a checkpoint of the current step and delete old ones."""
        root, settings = self.run_dir.checkpoints, self.config.checkpoint
        protected = [self.resumed_from] if self.resumed_from else []
        if settings.best and self.best:
            protected.append(checkpoint_path(root, self.best["step"]))
        with self.saving():
            save_checkpoint(root, self.step, write_model, state, {"wall_time": self.wall_time, **metadata})
            prune(root, self.step, settings.keep, protected)

    def describe(self, directory: Path) -> None:
        """Write model card and provenance beside a model of the current step."""
        assert self.journal.header is not None
        write_provenance(directory, step=self.step, base_model=self.journal.header.base_model)
        write_card(
            directory,
            config=self.config,
            base_model=self.journal.header.base_model,
            step=self.step,
            metrics=self.rows,
            journal=self.journal.path,
            prompt=self.run_dir.example_prompt(),
        )

    def stopped_by(self, problem: str) -> str:
        """Complete what ended the run with the step, with what is on disk, and with how to go on."""
        run = self.run_dir
        if self.config.method == "es":
            kept = f"The journal is on disk up to step {run.last_logged_step() or 0}"
        elif saved := list_checkpoints(run.checkpoints):
            kept = f"The checkpoint of step {saved[-1][0]} is on disk"
        else:
            kept = "There is no checkpoint yet, so that the run starts anew"
        return f"step {self.step}: {problem.rstrip('.')}. {kept}; go on with: {command('resume', run.path)}"

    def _recorded(self, samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the first completions, among them the first of the step that could not be scored."""
        recorded, wanted = list(samples[: self.config.log.completions]), self.scorer.unusable
        found = (
            i
            for i, row in enumerate(samples)
            if wanted and row["completion"] == wanted.text and unusable(row["reward"], row["detail"])
        )
        if recorded and (first := next(found, 0)) >= len(recorded):
            recorded[-1] = samples[first]
        return recorded

    def _log(self, row: dict[str, Any]) -> None:
        with self.saving():
            self.run_dir.append_metrics(row)
        self.rows.append(row)
        self.best = best_step([*([self.best] if self.best else []), row])
        self.display.course(self._course())
        if self.trackers:
            self.trackers.log(row)
        if self.on_step:
            self.on_step(row)

    def _evaluate(self) -> Evaluation:
        evaluation = evaluate(
            self.engine,
            self.scorer,
            self.held_out,
            self.greedy,
            lambda done, total: self.sampling("evaluation", done, total),
        )
        settings = {
            "task": self.config.task,
            "split": self.config.eval.split,
            "step": self.step,
            "prompts": set_hash(self.held_out.hashes),
            "prompt": self.held_out.example,
            "max_tokens": self.greedy.max_tokens,
            "temperature": self.greedy.temperature,
        }
        with self.saving():
            self.run_dir.write_evaluation(self.step, settings, evaluation.samples)
        self.display.evaluation(self.step, evaluation)
        return evaluation

    def _against_base(self, evaluation: Evaluation) -> dict[str, int]:
        """Return on how many problems the answer is right and the base model's is not, and the reverse."""
        try:
            base = self.run_dir.read_evaluation(0)
        except SamplesError:
            return {}
        right = {(sample.problem, sample.prompt_hash): sample.scores[TASK].correct for sample in base}
        pairs = [
            (sample.scores[TASK].correct, right.get((sample.problem, sample.prompt_hash)))
            for sample in evaluation.samples
        ]
        if any(before is None for _, before in pairs):
            return {}
        return {
            "eval/won": sum(now and not before for now, before in pairs),
            "eval/lost": sum(bool(before) and not now for now, before in pairs),
        }

    def _evaluation_due(self) -> bool:
        every = self.config.eval.every
        return self.finished() or (bool(every) and self.step % every == 0)

    def _course(self) -> Course:
        steps, minutes = self.config.steps, self.config.minutes
        done = [self.step / steps] if steps else []
        done += [self.wall_time / (60 * minutes)] if minutes else []
        return Course(
            fraction=min(1.0, max(done)) if done else None,
            seconds_left=self._seconds_left(),
            best=float(self.best["eval/accuracy"]) if self.best else None,
        )

    def _seconds_left(self) -> float | None:
        """Estimate from the limit that will be reached first; None without limits, and before the first step."""
        if not self.step:
            return None
        estimates = []
        if self.config.steps:
            estimates.append(self.wall_time / self.step * (self.config.steps - self.step))
        if self.config.minutes:
            estimates.append(60 * self.config.minutes - self.wall_time)
        return max(0.0, min(estimates)) if estimates else None


def reward_row(scores: Sequence[Score], rewards: "Tensor") -> dict[str, float]:
    """Return mean of the finite rewards, and accuracy of the completions."""
    finite = rewards[rewards.isfinite()]
    return {
        "reward/mean": float(finite.mean()) if len(finite) else math.nan,
        "reward/accuracy": sum(score.correct for score in scores) / len(scores),
    }


def throughput_row(completions: Sequence[Completion], seconds: float) -> dict[str, float]:
    """Return what was sampled, and how fast."""
    generated = sum(len(completion.token_ids) for completion in completions)
    prompt = sum(completion.prompt_tokens for completion in completions)
    return {
        "completions": len(completions),
        "completions/truncated": sum(completion.truncated for completion in completions) / len(completions),
        "tokens/prompt": prompt,
        "tokens/generated": generated,
        "throughput/tokens_per_second": (prompt + generated) / seconds,
        "throughput/generated_per_second": generated / seconds,
    }


def _evaluation_row(evaluation: Evaluation) -> dict[str, float]:
    return {
        "eval/accuracy": evaluation.accuracy,
        "eval/problems": evaluation.problems,
        "eval/reward": evaluation.reward,
        "eval/truncated": evaluation.truncated,
        "time/eval": evaluation.seconds,
    }


def sample_rows(
    step: int,
    who: str,
    problems: ProblemSet,
    indices_P: Sequence[int],
    completions_MP: Sequence[Sequence[Completion]],
    scores_MP: Sequence[Sequence[Score]],
) -> list[dict[str, Any]]:
    """Return a row of each completion for the log, neighbours of different M and problems; `who` is what M is."""
    members, prompts = len(completions_MP), len(indices_P)
    together = math.lcm(members, prompts)  # after so many rows the same pairs would come again
    rows = []
    for i in range(members * prompts):
        p = i % prompts
        m = (step + i + i // together) % members
        completion, score, index = completions_MP[m][p], scores_MP[m][p], indices_P[p]
        rows.append(
            {
                "step": step,
                who: m,
                "problem": problems.problems[index].get("id", index),
                "question": problems.questions[index] if problems.questions else "",
                "completion": completion.text,
                "truncated": completion.truncated,
                "reward": score.reward,
                "correct": score.correct,
                "detail": score.detail,
            }
        )
    return rows
