"""What a task is: problems, the prompts that ask them, and how an answer is graded."""

import contextlib
import json
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

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
"""Name of a task option -> where it was set: file and line, or flag."""


def no_place(option: str) -> str:
    """Return the place of options that come from neither file nor flag."""
    return "task_options"


def check_format_reward(value: float, task: str, place: Place) -> None:
    """Refuse a reward of wrong answers that is not in [0, 1). Raises TaskError."""
    if not 0 <= value < 1:  # nor is nan
        raise TaskError(
            f"{place('format_reward')}: {task}: format_reward = {value} is not in [0, 1). "
            "A wrong answer must earn less than a right one."
        )


def problem_text(problem: Problem) -> str:
    """Return the contents of a problem as JSON that is the same in every process.

    Values that JSON cannot hold, circular or too deeply nested ones included, count by their type, because their text
    may contain an address or an arbitrary order. Keys that JSON cannot hold are left out.
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What is graded."""

    text: str
    problem: Problem
    truncated: bool = False
    """Whether the length limit cut it off."""
    thought_open: bool = False
    """Whether the prompt ended in a thought."""
    token_ids: Sequence[int] = ()
    """Its tokens, where they are known."""

    @property
    def options(self) -> dict[str, bool]:
        """Return what graders of texts get as keywords."""
        return {"truncated": self.truncated, "thought_open": self.thought_open}


class Grading(Protocol):
    """Grades answers."""

    def score(self, answer: Answer) -> Score:
        """Grade an answer."""

    def answer(self, answer: Answer) -> str | None:
        """Return what majority votes count, equal for equal answers; None where there is none."""


class Task(Grading, Protocol):
    """A data set with its prompts and its grader; training and evaluation use the same one."""

    @property
    def stop(self) -> tuple[str, ...]:
        """Return the texts at which sampling stops; may be empty."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what the user should know about loading, such as removed rows; one sentence each."""

    def problems(self, split: Split) -> Sequence[Problem]:
        """Return all problems of a split, in a fixed order."""

    def prompt(self, problem: Problem) -> str | list[Message]:
        """Return text to complete, or chat messages."""

    def gold(self, problem: Problem) -> str | None:
        """Return a completion that earns reward 1; None where none is known."""

    def kind(self, problem: Problem) -> str:
        """Return what kind of problem it is, a few words; accuracies are shown for each. Empty where there are none."""


class Sandboxed(Task, Protocol):
    """A task that is graded in processes of its own (`tasks.sandbox`)."""

    @property
    def label(self) -> str:
        """Return what messages call it."""

    @property
    def hashes(self) -> Mapping[str, str]:
        """Return the hashes of what such a process loads, which it has to find as well."""

    @property
    def reloads(self) -> bool:
        """Return whether such a process loads the problems itself; else each answer comes with its own."""

    @property
    def batched(self) -> bool:
        """Return whether several answers are scored in one call."""

    @property
    def takes_ids(self) -> bool:
        """Return whether the tokens of answers are needed."""

    def hello(self) -> dict[str, Any]:
        """Return what such a process loads, as JSON."""


def sandboxed(task: Task) -> Sandboxed | None:
    """Return the task, if it is to be graded in processes of its own."""
    return cast(Sandboxed, task) if getattr(task, "needs_process", False) else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """The result of grading an answer."""

    score: Score | None = None
    """In plain numbers and text; None when the grader failed."""
    failure: str = ""
    """Why the grader failed: the end of its traceback."""
    vote: str | None = None
    """The answer that majority votes count, if requested; None when there is none, or reading it failed."""
    out_of_memory: bool = False
    """Whether the grader ran out of memory: its process may still hold too much."""


def judge(
    task: Grading,
    answer: Answer,
    *,
    voted: bool,
    catch: type[BaseException] = Exception,
    scored: Callable[[], Score] | None = None,
) -> Verdict:
    """Return the task's verdict on an answer; exceptions other than `catch` propagate.

    `scored` is called in the place of the task's score.
    """
    score, failure, out_of_memory, vote = None, "", False, None
    try:
        given: Any = scored() if scored else task.score(answer)
        parts = {str(name): None if value is None else float(value) for name, value in dict(given.parts).items()}
        score = Score(float(given.reward), bool(given.correct), str(given.detail), parts)
    except catch as error:
        failure, out_of_memory = short_traceback(error), isinstance(error, MemoryError)
    if voted:
        with contextlib.suppress(catch):  # like a score that fails, it costs its own completion
            vote = task.answer(answer)
    return Verdict(score=score, failure=failure, vote=vote, out_of_memory=out_of_memory)


def short_traceback(error: BaseException) -> str:
    """Return the end of a traceback: the calls next to the error, and its message. Long lines are cut."""
    lines = "".join(traceback.format_exception(error, limit=-3)).strip().split("\n")
    return "\n".join(line if len(line) <= 500 else f"{line[:500]}…" for line in lines[-30:])


def check_golds(task: Task, judge_all: Callable[[Sequence[Answer]], Iterable[Verdict]] | None = None) -> None:
    """Grade the gold completion of every problem, by `judge_all` where given.

    Raises:
        TaskError: a gold completion scores below 1, so the grader or the row is wrong, or the grader fails.
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
                raise TaskError(f"{name}: score() failed on its gold answer {gold.text!r:.200}:\n{verdict.failure}")
            if not score.reward >= 1:
                raise TaskError(
                    f"{name}: its gold answer scores {score.reward:g} ({score.detail}). Correct the row or the "
                    f"grader. Gold: {gold.text!r:.200}"
                )
