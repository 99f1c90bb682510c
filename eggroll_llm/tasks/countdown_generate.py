"""Countdown problems: drawn at random, solvable by construction, and told apart by a canonical key.

A draw takes numbers at random and joins two random operands with a random operator until one is left; its
value is the target. Only whole quotients and targets within the range are kept. Two problems are the same if
they have the same target and the same numbers in whatever order.
"""

import operator
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Key = tuple[tuple[int, ...], str]
_Operand = tuple[int, "tuple[_Operand, str, _Operand] | None"]
"""Value, and how it was made; None for a given number."""

_LEVEL = {"+": 1, "-": 1, "*": 2, "/": 2}
_APPLY: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.floordiv,
}
_NUMBER_LEVEL = 3

PATIENCE = 20_000
"""Draws in a row without a new problem after which the space counts as exhausted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Space:
    """Which problems are drawn; both ends of the ranges belong to them."""

    count: tuple[int, int]
    number_range: tuple[int, int]
    target_range: tuple[int, int]
    operators: str


def key_of(numbers: list[int], target: int | float) -> Key:
    """Return what makes a problem: its numbers without order, and its target."""
    return tuple(sorted(numbers)), str(int(target) if target == int(target) else target)


def make_row(numbers: list[int], target: int | float, solution: str | None) -> dict[str, Any]:
    """Return a problem as a row; `id` is its key."""
    ordered, goal = key_of(numbers, target)
    row = {"id": f"{'_'.join(map(str, ordered))}={goal}", "numbers": numbers, "target": target}
    return row if solution is None else {**row, "solution": solution}


def draw_problems(
    space: Space, rng: random.Random, amount: int, taken: set[Key], uses: str = ""
) -> list[dict[str, Any]]:
    """Up to `amount` new problems; fewer if `PATIENCE` draws in a row bring none.

    Args:
        taken: keys that are not drawn; those drawn are added.
        uses: operator that the solution must contain.
    """
    rows: list[dict[str, Any]] = []
    misses = 0
    while len(rows) < amount and misses < PATIENCE:
        misses += 1
        drawn = _draw(space, rng)
        if drawn is None or uses not in drawn[2] or key_of(*drawn[:2]) in taken:
            continue
        misses = 0
        taken.add(key_of(*drawn[:2]))
        rows.append(make_row(*drawn))
    return rows


def _draw(space: Space, rng: random.Random) -> tuple[list[int], int, str] | None:
    # rng.random() instead of randrange and choice: most of the time goes into draws that are not kept.
    count = space.count[0] + int(rng.random() * (space.count[1] - space.count[0] + 1))
    low, high = space.number_range
    numbers = [low + int(rng.random() * (high - low + 1)) for _ in range(count)]
    operands: list[_Operand] = [(number, None) for number in numbers]
    while len(operands) > 1:
        left = operands.pop(int(rng.random() * len(operands)))
        right = operands.pop(int(rng.random() * len(operands)))
        sign = space.operators[int(rng.random() * len(space.operators))]
        if sign == "/" and (right[0] == 0 or left[0] % right[0]):
            return None
        operands.append((_APPLY[sign](left[0], right[0]), (left, sign, right)))
    target = operands[0][0]
    if not space.target_range[0] <= target <= space.target_range[1]:
        return None
    return numbers, target, _text(operands[0])[0]


def _text(operand: _Operand) -> tuple[str, int]:
    """(text, precedence) of an operand, with the parentheses that it needs and no others."""
    value, parts = operand
    if parts is None:
        return str(value), _NUMBER_LEVEL
    left, sign, right = parts
    level = _LEVEL[sign]
    (left_text, left_level), (right_text, right_level) = _text(left), _text(right)
    if left_level < level:
        left_text = f"({left_text})"
    if right_level < level or (right_level == level and sign in "-/"):
        right_text = f"({right_text})"
    return f"{left_text}{sign}{right_text}", level
