"""The boundary to a task's grader, which may be the user's code: it returns a Score for anything.

A grader that raises or returns something unusable costs its own completion, which scores 0, and is counted. When it
fails on every completion of the first step, the run stops with the first failure, as the mistake is the grader's.
"""

import traceback
from typing import Any

from eggroll_llm.errors import TaskError
from eggroll_llm.sampler import Completion
from eggroll_llm.samples import Graded
from eggroll_llm.tasks import Problem, Score, Task

FAILED = "reward_failed"


class Scorer:
    """Scores completions of a task and counts the failures of its grader."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self.scored = 0
        self.failures = 0
        self.first_failure = ""
        """Traceback of the first failure."""

    def start_counting(self) -> None:
        """Count scored completions and failures from here on."""
        self.scored = self.failures = 0

    def score(self, completion: Completion, problem: Problem) -> Score:
        """Return the task's score; the reward may be NaN or infinite, which drops the member later."""
        self.scored += 1
        try:
            score: Any = self._task.score(completion.text, problem, truncated=completion.truncated)
            return Score(reward=float(score.reward), correct=bool(score.correct), detail=str(score.detail))
        except Exception:
            self.failures += 1
            self.first_failure = self.first_failure or traceback.format_exc(limit=-3)
            return Score(reward=0.0, correct=False, detail=FAILED)

    def grade(self, completion: Completion, problem: Problem) -> Graded:
        """Return the task's score together with the answer that majority votes count."""
        score = self.score(completion, problem)
        try:
            answer = self._task.answer(completion.text, truncated=completion.truncated)
        except Exception:  # like a score that fails, it costs its own completion
            answer = None
        return Graded(correct=score.correct, reward=score.reward, detail=score.detail, answer=answer)

    def check(self, of: str) -> None:
        """Raise TaskError when nothing that was counted could be scored; `of` says what that was."""
        if self.scored and self.failures == self.scored:
            raise TaskError(
                f"the task's score() failed on all {self.scored} completions{of}; the first failure:\n"
                f"{self.first_failure}"
            )
