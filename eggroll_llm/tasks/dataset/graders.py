"""The graders that a recipe can name: how each scores a row's answer, reads one for votes, and writes the right one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from eggroll_llm.tasks.dataset import math
from eggroll_llm.tasks.task import Answer
from rewards import Score, choice, countdown, exact, gsm8k


@dataclass(frozen=True, kw_only=True, slots=True)
class Grader:
    """A grader by name."""

    score: Callable[[Answer, str], Score]
    """Grades an answer against the row's right one, "" where it needs none."""
    read: Callable[..., str | None]
    """Reads the answer of a completion, for majority votes."""
    gold: Callable[[str], str] | None
    """Writes the right answer as a completion; None where the grader needs none."""
    needs_process: bool = False
    """Whether it may hang or take all memory."""


def _by(score: Callable[..., Score]) -> Callable[[Answer, str], Score]:
    return lambda answer, gold: score(answer.text, gold, **answer.options)


def _gsm8k_gold(answer: str) -> str:
    return answer if "#### " in answer else f"#### {answer}"


def _countdown(answer: Answer, _: str) -> Score:
    row = answer.problem
    numbers = row.get("numbers", row.get("nums"))
    given = numbers if isinstance(numbers, list) else []
    return countdown.score(answer.text, given, row.get("target", ""), thought_open=answer.thought_open)


def _expression(completion: str, *, truncated: bool = False, thought_open: bool = False) -> str | None:
    return countdown.read_answer(completion, thought_open=thought_open)


GRADERS: Mapping[str, Grader] = {
    "gsm8k": Grader(score=_by(gsm8k.score), read=gsm8k.read_answer, gold=_gsm8k_gold),
    "math": Grader(score=_by(math.score), read=math.read_answer, gold=math.boxed, needs_process=True),
    "exact": Grader(score=_by(exact.score), read=exact.read_answer, gold=lambda answer: f"<answer>{answer}</answer>"),
    "choice": Grader(score=_by(choice.score), read=choice.read_answer, gold=str),
    "countdown": Grader(score=_countdown, read=_expression, gold=None),
}
"""Those that need no gold answer read the columns numbers (or nums) and target."""
