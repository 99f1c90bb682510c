"""What one fixed answer pattern earns on Countdown. A model at that accuracy need not have learned to read the target.

A pattern takes the numbers in one order, as given or from the largest to the smallest, and joins them from left to
right by the same operators in every problem: a - b, or (a + b) * c. Where problems have different counts of numbers,
each count has a pattern of its own.
"""

import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from typing import Any

MOST_NUMBERS = 5  # 512 patterns; with more numbers hardly a problem is solved by one
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Constant:
    """The best fixed pattern."""

    pattern: str
    """Such as "a - b, largest first"."""
    accuracy: float
    """Fraction of the problems that it solves."""


def best_constant(task: str, options: Mapping[str, Any], problems: Sequence[Mapping[str, Any]]) -> Constant | None:
    """Return the pattern that solves most of the problems; None for other tasks, and where problems are too long."""
    if task != "countdown" or not problems or not all("numbers" in p and "target" in p for p in problems):
        return None
    if max(len(p["numbers"]) for p in problems) > MOST_NUMBERS:
        return None
    by_count: dict[int, list[tuple[list[int], Fraction]]] = defaultdict(list)
    for problem in problems:
        by_count[len(problem["numbers"])].append((list(problem["numbers"]), Fraction(str(problem["target"]))))
    solved, patterns = 0, []
    for count, group in sorted(by_count.items()):
        best, pattern = max(
            ((_solved(group, order, signs), _text(signs, order)) for order, signs in _patterns(options, count)),
            key=lambda found: found[0],
        )
        solved += best
        patterns.append(pattern)
    return Constant(pattern="; ".join(patterns), accuracy=solved / len(problems))


def _patterns(options: Mapping[str, Any], count: int) -> Iterable[tuple[str, tuple[str, ...]]]:
    return product(_ORDERS, product(str(options.get("operators", "+-*/")), repeat=count - 1))


def _solved(group: Sequence[tuple[list[int], Fraction]], order: str, signs: Sequence[str]) -> int:
    return sum(_value(_ORDERS[order](numbers), signs) == target for numbers, target in group)


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
