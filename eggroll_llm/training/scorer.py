"""The boundary to a task's grader, which may be the user's code: every completion gets a Score.

Built-in graders are called here, a user's in its own process. If it raises, returns something that is not a score,
takes too long or ends its process, only that completion scores 0, and the failure is counted; NaN or infinity drops the
member later. The first of each is shown with the answer that caused it. When all completions of the first step fail,
the run stops with the first failure, because then the grader is at fault.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
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
from eggroll_llm.tasks.sandbox.process import UserProcess
from eggroll_llm.tasks.task import Answer, Problem, Score, Task, Verdict, judge
from eggroll_llm.tasks.user import UserTask

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


class Scorer(AbstractContextManager["Scorer"]):
    """Scores completions of a task and counts the failures of its grader. Use as a context manager, or call `close`."""

    def __init__(
        self, task: Task, limits: RewardConfig | None = None, say: Callable[[str], None] = lambda text: None
    ) -> None:
        """Apply the limits to a user's task; `say` gets a sentence on the first failure."""
        self._task = task
        self._process = UserProcess(task, limits or RewardConfig()) if isinstance(task, UserTask) else None
        self.say = say
        self.first_failure = self.first_dropped = ""
        """The first answer without a score and the end of the traceback; what led to the first NaN."""
        self.start_counting()

    def __enter__(self) -> Self:
        """Start the user's process. Raises TaskError when the task does not load there as it did here."""
        if self._process:
            self._process.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the user's process; a second call does nothing."""
        if self._process:
            self._process.close()

    def start_counting(self) -> None:
        """Count scored completions and failures from here on."""
        self.scored = self.failures = 0

    def score(self, completion: Completion, problem: Problem) -> Score:
        """Return the task's score; the reward may be NaN or infinite, which drops the member later."""
        return self.score_all([(completion, problem)])[0]

    def score_all(self, pairs: Sequence[tuple[Completion, Problem]]) -> list[Score]:
        """Return the score of each completion, as `score` does."""
        verdicts = self._judge(pairs, voted=False)
        return [self._count(verdict, *pair) for verdict, pair in zip(verdicts, pairs, strict=True)]

    def score_rollouts(
        self, rollouts: Sequence[Rollout], problems: ProblemSet, indices_P: Sequence[int]
    ) -> list[ScoredRollout]:
        """Return the rollouts with their scores; `indices_P` are the problems that the step's prompts put."""
        scores = self.score_all([answered(problems, indices_P[r.prompt], r.completion) for r in rollouts])
        return [
            ScoredRollout(member=r.member, prompt=r.prompt, sample=r.sample, completion=r.completion, score=score)
            for r, score in zip(rollouts, scores, strict=True)
        ]

    def grade(self, completion: Completion, problem: Problem) -> Graded:
        """Return the task's score together with the answer that majority votes count."""
        (verdict,) = self._judge([(completion, problem)], voted=True)
        score = self._count(verdict, completion, problem)
        return Graded(correct=score.correct, reward=score.reward, detail=score.detail, answer=verdict.vote)

    def check(self, of: str) -> None:
        """Raise TaskError when nothing that was counted could be scored; `of` says what that was."""
        if self.scored and self.failures == self.scored:
            raise TaskError(
                f"the task's score() failed on all {self.scored} completions{of}; the first failure:\n"
                f"{self.first_failure}"
            )

    def _judge(self, pairs: Sequence[tuple[Completion, Problem]], *, voted: bool) -> Iterable[Verdict]:
        answers = [
            Answer(text=c.text, problem=problem, truncated=c.truncated, thought_open=c.thought_open)
            for c, problem in pairs
        ]
        if self._process:
            return self._process.judge(answers, voted=voted)
        return (judge(self._task, answer, voted=voted) for answer in answers)

    def _count(self, verdict: Verdict, completion: Completion, problem: Problem) -> Score:
        signals.check()  # which a grader may have swallowed
        self.scored += 1
        if verdict.score and math.isfinite(verdict.score.reward):
            return verdict.score
        sample = f'problem {inert(str(problem.get("id")), 60)}, answer "{inert(completion.text)}"'
        if verdict.score:
            if not self.first_dropped:
                self.first_dropped = f"{verdict.score.reward} for {sample}"
                self.say(f"score() returned NaN or infinity, so nothing is learned from it: {self.first_dropped}")
            return verdict.score
        self.failures += 1
        if not self.first_failure:
            self.first_failure = f"{sample}\n{verdict.failure}"
            reason = verdict.failure.rpartition("\n")[2]
            self.say(
                f"score() failed, so this completion scores 0; rewards/failed counts the others: {reason}; {sample}"
            )
        return Score(reward=0.0, correct=False, detail=FAILED)
