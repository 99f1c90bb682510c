"""What a run writes as it goes: rows of metrics, completions, graded evaluations, checkpoints, model cards."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from eggroll_llm.config.schema import RunConfig
from eggroll_llm.errors import SamplesError
from eggroll_llm.models.card import describe
from eggroll_llm.records.answers import Sample
from eggroll_llm.records.checkpoint import checkpoint_path, is_valid, list_checkpoints, prune, save_checkpoint
from eggroll_llm.records.drawn import Drawn
from eggroll_llm.records.journal import Journal
from eggroll_llm.records.run_dir import RunDir
from eggroll_llm.records.weights import best_step
from eggroll_llm.system.hardware import GIB, peak_memory
from eggroll_llm.system.invocation import command
from eggroll_llm.tasks.prompts import ProblemSet
from eggroll_llm.training.callbacks.base import Callbacks
from eggroll_llm.training.evaluation import Evaluation
from eggroll_llm.training.scorer import ScoredRollout

Metrics = dict[str, float]
"""One row of metrics.jsonl."""


class Recorder:
    """The directory of a run while it trains."""

    def __init__(
        self,
        config: RunConfig,
        directory: RunDir,
        journal: Journal,
        *,
        metrics: Sequence[Mapping[str, Any]] = (),
        callbacks: Callbacks | None = None,
    ) -> None:
        """Continue after the rows of `metrics`. Callbacks get each step that is recorded."""
        self.config, self.directory, self.journal = config, directory, journal
        self.rows = [*metrics]
        """Rows of metrics so far."""
        self.best = best_step(metrics)
        """Row of the best evaluation so far."""
        self.resumed_from: Path | None = None
        """Checkpoint that this process resumed from; it is kept."""
        self.callbacks = callbacks or Callbacks([])
        self._seconds = 0.0

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Time writes to the run directory; a step's row has the sum since the previous row."""
        start = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - start

    def record_step(self, row: Metrics, completions: Sequence[Mapping[str, Any]], answers: Sequence[Sample]) -> None:
        """Record a step: its completions, then its metrics, which mark the step as complete."""
        row["memory/peak_gib"] = max(peak_memory() / GIB, row.get("memory/peak_gib", 0.0))
        with self.saving():
            self.directory.append_completions(completions)
        row["time/save"], self._seconds = self._seconds, 0.0
        self.record_metrics(row, completions, answers)

    def record_metrics(self, row: Metrics, completions: Sequence[Mapping[str, Any]], answers: Sequence[Sample]) -> None:
        """Add a row to metrics.jsonl, and report the step to the callbacks; `answers` are those of its evaluation."""
        with self.saving():
            self.directory.append_metrics(row)
        self.rows.append(row)
        self.best = best_step([*([self.best] if self.best else []), row])
        self.callbacks.end_step(row, completions, answers)

    def record_evaluation(self, step: int, settings: Mapping[str, Any], evaluation: Evaluation) -> None:
        """Write the graded answers of an evaluation."""
        with self.saving():
            self.directory.write_evaluation(step, settings, evaluation.samples)

    def keep(self, file: Path, drawn: Drawn) -> None:
        """Write answers, with what later steps need of them, into a file of the run directory."""
        with self.saving():
            self.directory.write_drawn(file, drawn)

    def against_base(self, evaluation: Evaluation) -> Metrics:
        """Compare with the base model's answers, problem by problem; {} where they are missing or of other problems."""
        try:
            return evaluation.against(self.directory.read_evaluation(0))
        except SamplesError:
            return {}

    def checkpoint_due(self, step: int) -> bool:
        """Return whether a step gets a checkpoint."""
        every = self.config.checkpoint.every
        return (bool(every) and step % every == 0) or self.best_is_due(step)

    def best_is_due(self, step: int) -> bool:
        """Return whether this step is the best so far and has no valid checkpoint yet. The base model needs none."""
        return (
            self.config.checkpoint.best
            and self.best is not None
            and 0 < self.best["step"] == step
            and not is_valid(checkpoint_path(self.directory.checkpoints, step))
        )

    def save(
        self,
        step: int,
        write_model: Callable[[Path], None],
        state: Mapping[str, Tensor],
        metadata: Mapping[str, float | str],
    ) -> None:
        """Write a checkpoint and delete old ones."""
        root, settings = self.directory.checkpoints, self.config.checkpoint
        protected = [self.resumed_from] if self.resumed_from else []
        if settings.best and self.best:
            protected.append(checkpoint_path(root, self.best["step"]))
        with self.saving():
            save_checkpoint(root, step, write_model, state, metadata)
            prune(root, step, settings.keep, protected)

    def describe(self, step: int, model: Path) -> None:
        """Write model card and provenance into the directory of a step's model."""
        assert self.journal.header is not None
        base_model = self.journal.header.base_model
        describe(model, self.directory, self.config, base_model=base_model, step=step, metrics=self.rows)

    def how_to_resume(self) -> str:
        """Return what is on disk, and the command that resumes from it."""
        directory = self.directory
        if self.config.method == "es":
            kept = f"The journal is on disk up to step {directory.last_logged_step() or 0}"
        elif saved := list_checkpoints(directory.checkpoints):
            kept = f"The checkpoint of step {saved[-1][0]} is on disk"
        else:
            kept = "There is no checkpoint yet, so the run starts over"
        return f"{kept}; resume with: {command('resume', directory.path)}"


def reward_metrics(rollouts: Sequence[ScoredRollout], rewards: Tensor) -> Metrics:
    """Return mean of the finite rewards, of each where several are added, and accuracy of the completions."""
    finite = rewards[rewards.isfinite()]
    parts: dict[str, list[float]] = {}
    for rollout in rollouts:
        for name, value in rollout.score.parts.items():
            parts.setdefault(name, []).extend([] if value is None else [value])
    return {
        **{f"rewards/{name}/mean": sum(given) / len(given) for name, given in parts.items() if given},
        "reward/mean": float(finite.mean()) if len(finite) else math.nan,
        "reward/accuracy": sum(rollout.score.correct for rollout in rollouts) / len(rollouts),
    }


def twin_metrics(rollouts: Sequence[ScoredRollout], members: int) -> Metrics:
    """Return the share of answers of twins of which one is right, and of those the share whose other was not read.

    `rollouts` are in member-major order, as many of each member. The second share is left out where there is none.
    """
    each = len(rollouts) // members
    differ = unread = 0
    for first in range(0, len(rollouts), 2 * each):
        twins = zip(rollouts[first : first + each], rollouts[first + each : first + 2 * each], strict=True)
        for one, other in twins:
            differ += one.score.correct != other.score.correct
            unread += one.score.correct != other.score.correct and (one.score.unread or other.score.unread)
    return {"twins/differ": 2 * differ / len(rollouts), **({"twins/unread": unread / differ} if differ else {})}


def sampling_metrics(rollouts: Sequence[ScoredRollout], seconds: float) -> Metrics:
    """Return what was sampled, and how fast."""
    completions = [rollout.completion for rollout in rollouts]
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


def in_order_of_interest(rollouts: Sequence[ScoredRollout], step: int) -> list[ScoredRollout]:
    """Return the rollouts of a step so that neighbours differ in member and prompt, and later steps begin elsewhere.

    Of a member's samples of a prompt there is one: the first that could not be scored, else the first. Without members
    the samples take their place.
    """
    if not rollouts:  # a step that learns from the answers of one before
        return []
    shown: dict[tuple[int, int], ScoredRollout] = {}
    for rollout in rollouts:
        place = (rollout.sample if rollout.member is None else rollout.member, rollout.prompt)
        if place not in shown or (rollout.unusable and not shown[place].unusable):
            shown[place] = rollout
    members, prompts = (list(dict.fromkeys(place[i] for place in shown)) for i in (0, 1))
    turn = _diagonals(len(members), len(prompts), step)
    member_at, prompt_at = ({each: i for i, each in enumerate(places)} for places in (members, prompts))
    return [shown[place] for place in sorted(shown, key=lambda place: turn(member_at[place[0]], prompt_at[place[1]]))]


def _diagonals(members: int, prompts: int, step: int) -> Callable[[int, int], int]:
    """Return the turn at which a member and a prompt, by position, meet, if both advance by one from turn to turn.

    Both begin again at their ends. Where all have been met that way, members skip one, so that others meet.
    """
    together, common = math.lcm(members, prompts), math.gcd(members, prompts)
    inverse = pow(prompts // common, -1, members // common)

    def turn(member: int, prompt: int) -> int:
        apart, skipped = divmod(member - step - prompt, common)
        rounds = apart * inverse % (members // common)  # of the prompts
        return skipped * together + rounds * prompts + prompt

    return turn


def to_record(shown: Sequence[ScoredRollout], rollouts: Sequence[ScoredRollout], count: int) -> list[ScoredRollout]:
    """Return the first `count` of `shown`; the last is a text that could not be scored, if there is one further on."""
    recorded = list(shown[:count])
    failed = next((rollout.completion.text for rollout in rollouts if rollout.unusable), None)
    first = next((i for i, r in enumerate(shown) if r.unusable and r.completion.text == failed), 0)
    if recorded and first >= count:
        recorded[-1] = shown[first]
    return recorded


def completion_row(rollout: ScoredRollout, step: int, problems: ProblemSet, indices_P: Sequence[int]) -> dict[str, Any]:
    """Return a rollout's line of completions.jsonl."""
    index, score = indices_P[rollout.prompt], rollout.score
    who = {"sample": rollout.sample} if rollout.member is None else {"member": rollout.member}
    return {
        "step": step,
        **who,
        "problem": problems.problems[index].get("id", index),
        "question": problems.questions[index] if problems.questions else "",
        "completion": rollout.completion.text,
        "truncated": rollout.completion.truncated,
        "reward": score.reward,
        **({"rewards": dict(score.parts)} if score.parts else {}),
        "correct": score.correct,
        "detail": score.detail,
    }
