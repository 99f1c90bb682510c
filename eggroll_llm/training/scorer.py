"""The boundary to a task's grader, which may be the user's code: every completion gets a Score.

Built-in graders are called here, a user's in processes of its own while more completions are sampled. If it raises,
returns something that is not a score, takes too long or ends its process, only that completion scores 0, and the
failure is counted; NaN or infinity drops the member later. The first of each, in the order of requests and not of
scores, is shown with the answer that caused it. When all completions of the first step fail, the run stops with the
first failure, because then the grader is at fault.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from eggroll_llm.config.schema import RewardConfig
from eggroll_llm.engine.interface import Completion
from eggroll_llm.engine.sampling import Rollout
from eggroll_llm.errors import TaskError
from eggroll_llm.records.answers import Graded
from eggroll_llm.system import signals
from eggroll_llm.system.terminal import inert
from eggroll_llm.tasks.prompts import ProblemSet
from eggroll_llm.tasks.sandbox.pool import Judging, ScorePool
from eggroll_llm.tasks.task import Answer, Problem, Score, Task, Verdict, judge, sandboxed

if TYPE_CHECKING:
    from torch import Tensor

FAILED = "reward_failed"


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredRollout(Rollout):
    """A rollout with the task's score."""

    score: Score

    @property
    def unusable(self) -> bool:
        """Return whether the grader failed or returned NaN or infinity."""
        return self.score.detail == FAILED or not math.isfinite(self.score.reward)


def rewards_of(rollouts: Sequence[ScoredRollout], prompts: int, samples: int) -> "Tensor":
    """Return rewards_MPS, float64, of rollouts in member-major order."""
    rewards = [rollout.score.reward for rollout in rollouts]
    import torch  # evaluations are compared without it

    return torch.tensor(rewards, dtype=torch.float64).view(-1, prompts, samples)


def answered(problems: ProblemSet, index: int, completion: Completion) -> tuple[Completion, Problem]:
    """Return what a grader gets of a completion of the prompt with that index."""
    if index in problems.in_thought:
        completion = dataclasses.replace(completion, thought_open=True)
    return completion, problems.problems[index]


def score_of(verdict: Verdict) -> Score:
    """Return the score, and 0 where the grader failed."""
    return verdict.score or Score(reward=0.0, correct=False, detail=FAILED)


def graded(verdict: Verdict) -> Graded:
    """Return the score as evaluations record it."""
    score = score_of(verdict)
    return Graded(correct=score.correct, reward=score.reward, detail=score.detail, answer=verdict.vote)


class Scorer(AbstractContextManager["Scorer"]):
    """Scores completions of a task and counts the failures of its grader. Use as a context manager, or call `close`."""

    def __init__(
        self, task: Task, limits: RewardConfig | None = None, say: Callable[[str], None] = lambda text: None
    ) -> None:
        """Apply the limits to a user's task; `say` gets a sentence on the first failure."""
        self._task = task
        own = sandboxed(task)
        self._pool = ScorePool(own, limits or RewardConfig()) if own else None
        self.say = say
        self.first_failure = self.first_dropped = ""
        """The first answer without a score and the end of the traceback; what led to the first NaN."""
        self.start_counting()

    def __enter__(self) -> Self:
        """Start the user's processes. Raises TaskError when the task does not load there as it did here."""
        if self._pool:
            self._pool.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the user's processes; a second call does nothing."""
        if self._pool:
            self._pool.close()

    def start_counting(self) -> None:
        """Count scored completions and failures from here on."""
        self.scored = self.failures = 0

    def begin(self, *, voted: bool = False) -> "Scoring":
        """Return a new set of completions; what is left of the last is dropped. `voted` asks for answers to vote on."""
        judging = self._pool.begin(voted=voted) if self._pool else _JudgingHere(self._task, voted=voted)
        return Scoring(judging, self._count)

    def judge(self, answers: Sequence[Answer], *, voted: bool = False) -> Iterator[Verdict]:
        """Yield the verdict on each answer, in their order; none is counted or shown. `voted` asks for votes too."""
        if self._pool:
            yield from self._pool.judge(answers, voted=voted)
            return
        for answer in answers:
            yield judge(self._task, answer, voted=voted)
            signals.check()  # which a grader may have swallowed

    def check(self, of: str) -> None:
        """Raise TaskError when nothing that was counted could be scored; `of` says what that was."""
        if self.scored and self.failures == self.scored:
            raise TaskError(
                f"the task's score() failed on all {self.scored} completions{of}; the first failure:\n"
                f"{self.first_failure}"
            )

    def _count(self, verdict: Verdict, completion: Completion, problem: Problem) -> None:
        self.scored += 1
        if verdict.score and math.isfinite(verdict.score.reward):
            return
        sample = f'problem {inert(str(problem.get("id")), 60)}, answer "{inert(completion.text)}"'
        if verdict.score:
            if not self.first_dropped:
                self.first_dropped = f"{verdict.score.reward} for {sample}"
                self.say(f"score() returned NaN or infinity, so nothing is learned from it: {self.first_dropped}")
            return
        self.failures += 1
        if not self.first_failure:
            self.first_failure = f"{sample}\n{verdict.failure}"
            reason = verdict.failure.rpartition("\n")[2]
            self.say(
                f"score() failed, so this completion scores 0; rewards/failed counts the others: {reason}; {sample}"
            )


class _JudgingHere:
    """Judges by a built-in grader, when it is asked for verdicts."""

    def __init__(self, task: Task, *, voted: bool) -> None:
        self._task, self._voted = task, voted
        self._waiting: dict[int, Answer] = {}

    def put(self, number: int, answer: Answer) -> None:
        self._waiting[number] = answer

    def ready(self) -> list[tuple[int, Verdict]]:
        return list(self.rest())

    def rest(self) -> Iterator[tuple[int, Verdict]]:
        for number in sorted(self._waiting):
            verdict = judge(self._task, self._waiting.pop(number), voted=self._voted)
            signals.check()  # which a grader may have swallowed
            yield number, verdict


class Scoring:
    """Completions of a step or an evaluation, which are scored as they are put."""

    def __init__(self, judging: Judging | _JudgingHere, count: Callable[[Verdict, Completion, Problem], None]) -> None:
        """`count` gets each verdict with its completion and problem, in the order of their numbers."""
        self._judging, self._count = judging, count
        self._given: dict[int, tuple[Completion, Problem]] = {}
        self._uncounted: dict[int, Verdict] = {}
        self._counted = 0

    def put(self, number: int, completion: Completion, problem: Problem) -> None:
        """Have a completion scored. Numbers start from 0, leave none out at the end, and come in any order."""
        self._given[number] = completion, problem
        answer = Answer(
            text=completion.text,
            problem=problem,
            truncated=completion.truncated,
            thought_open=completion.thought_open,
            token_ids=completion.token_ids,
        )
        self._judging.put(number, answer)

    def ready(self) -> list[tuple[int, Verdict]]:
        """Return the verdicts that have come since, by number, without waiting for any."""
        judged = self._judging.ready()
        for number, verdict in judged:
            self._note(number, verdict)
        return judged

    def rest(self) -> Iterator[tuple[int, Verdict]]:
        """Yield all verdicts that have not been returned, as they come; no more is put."""
        for number, verdict in self._judging.rest():
            self._note(number, verdict)
            yield number, verdict

    def _note(self, number: int, verdict: Verdict) -> None:
        self._uncounted[number] = verdict
        while self._counted in self._uncounted:
            self._count(self._uncounted.pop(self._counted), *self._given.pop(self._counted))
            self._counted += 1
