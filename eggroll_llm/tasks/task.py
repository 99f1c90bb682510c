"""What a task is: problems, how they are put to the model, and how an answer is graded."""

import contextlib
import json
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from eggroll_llm.config.toml import is_unicode
from eggroll_llm.errors import TaskError
from rewards import Score as Score

Problem = Mapping[str, Any]
"""One row; `id` is the same in every run. What JSON cannot hold is written to files as text."""
Message = dict[str, str]
"""One chat message: role and content."""
Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")
Place = Callable[[str], str]
"""Where an option of a task was written: its name -> file and line, or flag."""


def no_place(option: str) -> str:
    """Return the place of options that come from no file."""
    return "task_options"


def problem_text(problem: Problem) -> str:
    """Return what a problem holds, as JSON that is the same in every process.

    What JSON cannot hold counts by its type, as its text may have an address or an order of its own in it; so does what
    has a circle in it or is too deep. Keys that JSON cannot hold are left out.
    """
    if (whole := _as_json(dict(problem))) is not None:
        return whole
    parts = {key: (value, _as_json(value)) for key, value in problem.items()}
    return str(_as_json({k: type(v).__name__ if text is None else v for k, (v, text) in parts.items()}))


def _as_json(value: object) -> str | None:
    try:
        return json.dumps(value, skipkeys=True, default=lambda other: type(other).__name__)
    except (ValueError, RecursionError):
        return None


class Task(Protocol):
    """A data set with its prompts and its grader; training and evaluation use the same one."""

    @property
    def stop(self) -> tuple[str, ...]:
        """Texts at which sampling stops; may be empty."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what loading did that the user should know, such as rows removed; one sentence each."""

    def problems(self, split: Split) -> Sequence[Problem]:
        """Return all problems of a split, in a fixed order."""

    def prompt(self, problem: Problem) -> str | list[Message]:
        """Return text to complete, or chat messages."""

    def score(self, completion: str, problem: Problem, *, truncated: bool = False, thought_open: bool = False) -> Score:
        """Grade a completion.

        `truncated` says that the length limit cut it off, `thought_open` that the prompt ended in a thought.
        """

    def answer(self, completion: str, *, truncated: bool = False, thought_open: bool = False) -> str | None:
        """Return the answer of the completion for majority votes, equal for equal answers; None where there is none."""

    def gold(self, problem: Problem) -> str | None:
        """Return a completion that earns reward 1; None where none is known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What is graded."""

    text: str
    problem: Problem
    truncated: bool = False
    """Whether the length limit cut it off."""
    thought_open: bool = False
    """Whether the prompt ended in a thought."""

    @property
    def options(self) -> dict[str, bool]:
        """Return what a task's methods get beside text and problem; `thought_open` only where it is true."""
        return {"truncated": self.truncated} | ({"thought_open": True} if self.thought_open else {})


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What came of grading an answer."""

    score: Score | None = None
    """In plain numbers and text; None when the grader failed."""
    failure: str = ""
    """Why it did: the end of its traceback."""
    vote: str | None = None
    """What majority votes count, where that was asked for; None when there is none, or that failed."""
    out_of_memory: bool = False
    """That was the failure: the process may hold too much of it."""


def judge(task: Task, answer: Answer, *, voted: bool, catch: type[BaseException] = Exception) -> Verdict:
    """Return the task's verdict on anything. What is not a `catch` is not caught."""
    score, failure, out_of_memory, vote = None, "", False, None
    try:
        given: Any = task.score(answer.text, answer.problem, **answer.options)
        score = Score(reward=float(given.reward), correct=bool(given.correct), detail=str(given.detail))
    except catch as error:
        failure, out_of_memory = short_traceback(error), isinstance(error, MemoryError)
    if voted:
        with contextlib.suppress(catch):  # like a score that fails, it costs its own completion
            vote = task.answer(answer.text, **answer.options)
    return Verdict(score=score, failure=failure, vote=vote, out_of_memory=out_of_memory)


def short_traceback(error: BaseException) -> str:
    """Return the end of a traceback: the calls next to the error, and what it says. Lines, too, are cut."""
    lines = "".join(traceback.format_exception(error, limit=-3)).strip().split("\n")
    return "\n".join(line if len(line) <= 500 else f"{line[:500]}…" for line in lines[-30:])


def check_golds(task: Task, judge_all: Callable[[Sequence[Answer]], Iterable[Verdict]] | None = None) -> None:
    """Grade the gold completion of every problem, with `judge_all` where that is not to happen here.

    Raises:
        TaskError: one scores less than 1, which means that the grader or the row is wrong, or the grader fails.
    """
    for split in SPLITS:
        given = [(problem, task.gold(problem)) for problem in task.problems(split)]
        golds = [Answer(text=gold, problem=problem) for problem, gold in given if gold is not None]
        if bad := next((gold for gold in golds if not is_unicode(gold.text)), None):
            raise TaskError(
                f"Problem {bad.problem.get('id')!r} ({split}): its gold answer {bad.text!a:.200} is not valid Unicode: "
                "it holds half of a surrogate pair. Correct it."
            )
        verdicts = judge_all(golds) if judge_all else (judge(task, gold, voted=False) for gold in golds)
        for gold, verdict in zip(golds, verdicts, strict=True):
            score, name = verdict.score, f"Problem {gold.problem.get('id')!r} ({split})"
            if score is None:
                raise TaskError(f"{name}: score() failed on its own gold answer {gold.text!r:.200}:\n{verdict.failure}")
            if not score.reward >= 1:
                raise TaskError(
                    f"{name}: its own gold answer scores {score.reward:g} ({score.detail}). Correct the row or the "
                    f"grader. Gold: {gold.text!r:.200}"
                )
