"""What a task is: problems, how they are put to the model, and how an answer is graded."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

from eggroll_llm.errors import TaskError
from rewards import Score

Problem = Mapping[str, Any]
"""One row; values can be written as JSON, and `id` is the same in every run."""
Message = dict[str, str]
"""One chat message: role and content."""
Split = Literal["train", "test"]


class Task(Protocol):
    """A data set with its prompts and its grader; training and evaluation use the same one."""

    @property
    def stop(self) -> tuple[str, ...]:
        """Texts at which sampling stops; may be empty."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What loading did that the user should know, such as rows removed; one sentence each."""

    def problems(self, split: Split) -> Sequence[Problem]:
        """All problems of a split, in a fixed order."""

    def prompt(self, problem: Problem) -> str | list[Message]:
        """Text to complete, or chat messages."""

    def score(self, completion: str, problem: Problem, *, truncated: bool = False) -> Score:
        """Grade a completion; `truncated` says that it was cut off by the length limit."""

    def answer(self, completion: str, *, truncated: bool = False) -> str | None:
        """What the completion gives as its answer, equal for equal answers, for majority votes; None for nothing."""

    def gold(self, problem: Problem) -> str | None:
        """A completion that earns reward 1; None where none is known."""


def check_golds(task: Task) -> None:
    """Grade the gold completion of every problem.

    Raises:
        TaskError: one scores less than 1, which means that the grader or the row is wrong.
    """
    splits: tuple[Split, ...] = ("train", "test")
    for split in splits:
        for problem in task.problems(split):
            gold = task.gold(problem)
            score = task.score(gold, problem) if gold is not None else None
            if score is not None and not score.reward >= 1:
                raise TaskError(
                    f"Problem {problem.get('id')!r} ({split}): its own gold answer scores {score.reward:g} "
                    f"({score.detail}). Correct the row or the grader. Gold: {gold!r:.200}"
                )
