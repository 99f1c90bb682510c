"""What one fixed answer earns. A model at that accuracy need not have learned to read the problem.

For Countdown it is a pattern: the numbers in one order, as given or from the largest to the smallest, joined from left
to right by the same operators in every problem: a - b, or (a + b) * c. Where problems have different counts of numbers,
each count has a pattern of its own.

For any other task with gold answers it is one of the most frequent ones in training, graded by the task on the held-out
problems. A user's score may be slow, so only those count that are graded in time.
"""

import operator
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from itertools import product
from typing import Protocol

from eggroll_llm.records.baseline import Constant
from eggroll_llm.system.terminal import inert
from eggroll_llm.tasks.countdown import CountdownTask
from eggroll_llm.tasks.task import Answer, Problem, Task, Verdict
from rewards.countdown import tolerance

MOST_NUMBERS = 5  # 512 patterns; with more numbers hardly a problem is solved by one
MOST_ANSWERS = 16
"""Gold answers that are tried."""
SECONDS = 20.0
"""Time to grade them in."""
SHOWN = 40
"""Characters of an answer that are shown."""


class Judge(Protocol):
    """Grades answers as the task does."""

    def __call__(self, answers: Sequence[Answer], *, voted: bool = False) -> Iterable[Verdict]:
        """Yield the verdict on each, in their order; `voted` asks for the answers that majority votes count."""


_Sum = tuple[list[int], Fraction, Fraction]
"""Numbers and target of a problem, and how far from the target a value may be."""
_APPLY: dict[str, Callable[[Fraction, Fraction], Fraction]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}
_ORDERS: dict[str, Callable[[Iterable[int]], list[int]]] = {
    "as given": list,
    "largest first": lambda numbers: sorted(numbers, reverse=True),
}


def best_constant(
    task: Task,
    train: Iterable[Problem],
    held_out: Sequence[Problem],
    judge: Judge,
    *,
    seconds: float = SECONDS,
) -> Constant | None:
    """Return the fixed answer that solves most of the held-out problems.

    Args:
        seconds: after which no more are graded; half of them may be spent on reading the answers in training.

    None where the task has no gold answers, or none was graded in time.
    """
    if isinstance(task, CountdownTask):
        return best_pattern(task.options.operators, held_out)
    best: Constant | None = None
    start = time.monotonic()
    frequent, deadline = _frequent(task, train, judge, start + seconds / 2), start + seconds
    for answer, completion in frequent.items():
        right = 0
        for verdict in judge([Answer(text=completion, problem=problem) for problem in held_out]):
            right += verdict.score is not None and verdict.score.correct
            if time.monotonic() > deadline:
                return best
        if best is None or right / len(held_out) > best.accuracy:
            shown = inert(answer.strip(), SHOWN)
            best = Constant(pattern=shown, accuracy=right / len(held_out), problems=len(held_out))
    return best


def _frequent(task: Task, problems: Iterable[Problem], judge: Judge, deadline: float) -> dict[str, str]:
    """Return the most frequent answers with a gold completion that gives each, the most frequent first."""
    counts: Counter[str] = Counter()
    completions: dict[str, str] = {}
    given = ((problem, task.gold(problem)) for problem in problems)
    golds = [Answer(text=gold, problem=problem) for problem, gold in given if gold is not None]
    for gold, verdict in zip(golds, judge(golds, voted=True), strict=True):
        answer = verdict.vote or gold.text  # which is the answer where none can be read
        counts[answer] += 1
        completions.setdefault(answer, gold.text)
        if time.monotonic() > deadline:
            break
    return {answer: completions[answer] for answer, _ in counts.most_common(MOST_ANSWERS)}


def best_pattern(operators: str, problems: Sequence[Mapping[str, object]]) -> Constant | None:
    """Return the Countdown pattern that solves most of the problems; None without any, or where they are too long."""
    rows = [(p.get("numbers"), p.get("target")) for p in problems]
    by_count: dict[int, list[_Sum]] = defaultdict(list)
    for numbers, target in rows:
        if not isinstance(numbers, Sequence) or target is None or len(numbers) > MOST_NUMBERS:
            return None
        goal = Fraction(str(target))
        by_count[len(numbers)].append((list(numbers), goal, tolerance(goal)))
    if not by_count:
        return None
    solved, patterns = 0, []
    for count, group in sorted(by_count.items()):
        best, pattern = max(
            ((_solved(group, order, signs), _text(signs, order)) for order, signs in _patterns(operators, count)),
            key=lambda found: found[0],
        )
        solved += best
        patterns.append(pattern)
    return Constant(pattern="; ".join(patterns), accuracy=solved / len(problems), problems=len(problems))


def _patterns(operators: str, count: int) -> Iterable[tuple[str, tuple[str, ...]]]:
    return product(_ORDERS, product(operators, repeat=count - 1))


def _solved(group: Sequence[_Sum], order: str, signs: Sequence[str]) -> int:
    values = ((_value(_ORDERS[order](numbers), signs), target, within) for numbers, target, within in group)
    return sum(value is not None and abs(value - target) <= within for value, target, within in values)


def _value(numbers: Sequence[int], signs: Sequence[str]) -> Fraction | None:
    value = Fraction(numbers[0])
    for sign, number in zip(signs, numbers[1:], strict=True):
        if sign == "/" and number == 0:
            return None
        value = _APPLY[sign](value, Fraction(number))
    return value


def _text(signs: Sequence[str], order: str) -> str:
    text, level = "a", 2
    for sign, name in zip(signs, "bcdefgh", strict=False):
        text = f"({text})" if sign in "*/" and level == 1 else text
        text, level = f"{text} {sign} {name}", 1 if sign in "+-" else 2
    return text if set(signs) in ({"+"}, {"*"}) else f"{text}, {order}"
