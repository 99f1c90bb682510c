"""Countdown: an expression over the given numbers that equals the target.

    <answer>(44 + 19) * 35</answer>     answer_format "tag": the last pair of tags
    (44 + 19) * 35 = 2205               answer_format "line": the first line; "= target" may follow

    expression = term (("+" | "-") term)*        term = factor (("*" | "/") factor)*
    factor = [sign] primary                      primary = integer | "(" expression ")"

Only text outside thoughts counts, and after an answer only that before a next turn (`turns`).

Numbers are ASCII digits without leading zeros, signs + and -; every dash (`DASHES`) stands for -, a wide plus for +, ÷
and the slashes of mathematics for /, x, × and dots, bullets or asterisks of mathematics for *, and wide parentheses for
( and ). At most 512 characters and 32 parentheses deep. The numbers are compared with the given ones, as multisets,
before anything is evaluated; then the value is exact (fractions). A target with up to four decimals must be met
exactly. One with more is a decimal rounding, to be met within half a unit of its last decimal, or within the error of a
float.

Reward: 1 if correct; `format_reward` for a wrong answer in the right format; 0 without an answer. A tag that
is not blank is an answer whatever it holds; a line is one if it is an expression. A problem that is not
usable scores 0 with detail "bad_problem" (task loaders refuse such problems before that).
"""

import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable
from decimal import Decimal
from fractions import Fraction
from typing import Literal

from rewards.markup import DASHES
from rewards.score import Score
from rewards.turns import closes_thought, next_turns, visible

MAX_LENGTH = 512
"""Longest expression in characters; the value of a shorter one has at most as many digits."""
MAX_DEPTH = 32
"""Deepest nesting of parentheses."""
ROUNDED = 5
"""Decimals from which on a target is a rounding."""
FLOAT_ERROR = Fraction(1, 2**49)
"""Relative error of a target that a few operations on floats have made."""
DETAILS = (
    "correct",
    "wrong_value",
    "wrong_numbers",
    "wrong_result",
    "division_by_zero",
    "syntax",
    "too_long",
    "too_deep",
    "no_answer",
    "bad_problem",
)
"""Vocabulary of `Score.detail`; "wrong_result" is a right expression followed by `= something else`."""

_WRITTEN = {
    "-": DASHES,
    "+": "\uff0b",
    "/": "\u00f7\u2044\u2215\uff0f",
    "(": "\uff08",
    ")": "\uff09",
    "*": "x\u00b7\u00d7\u2022\u2217\u2219\u22c5\u2715\u2716\uff0a",
}
_OPERATORS = {ord(character): symbol for symbol, characters in _WRITTEN.items() for character in characters}
_TOKEN = re.compile(r"\s*(?:(0(?![0-9])|[1-9][0-9]*)|([-+*/()]))")
_BEGUN = re.compile(r"<answer>[\s(\uff08+-]{0,64}[0-9]")
_MAX_DIGITS = 64
_DECIMAL = re.compile(rf"[-+]?[0-9]{{1,{_MAX_DIGITS}}}(?:\.[0-9]{{1,{_MAX_DIGITS}}})?")
_FLOAT = re.compile(r"[-+]?[0-9](?:\.[0-9]{1,20})?e[-+][0-9]{2,3}")
"""A float as Python writes it where it is long: 6.28e+17."""
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2, "neg": 3, "pos": 3}
_SIGN = {"-": "neg", "+": "pos"}
_APPLY: dict[str, Callable[[Fraction, Fraction], Fraction]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}


class _ExpressionError(Exception):
    """The expression is refused; the message is a word of DETAILS."""


def score(
    completion: str,
    numbers: Iterable[int | str],
    target: int | float | str,
    *,
    use_all: bool = True,
    answer_format: Literal["tag", "line"] = "tag",
    format_reward: float = 0.1,
    thought_open: bool = False,
) -> Score:
    """Score a completion.

    Args:
        numbers: given numbers, each to be used once at most.
        target: number to reach; a float or a decimal string where it is not an integer.
        use_all: whether every number must be used.
        answer_format: where the expression stands; see the module's docstring.
        format_reward: reward of a wrong answer in the right format.
        thought_open: whether the prompt ended in a thought that the completion continues.

    Raises:
        ValueError: answer_format is neither "tag" nor "line".
    """
    answer = read_answer(completion, answer_format=answer_format, thought_open=thought_open)
    given, goal = _given(numbers), _number(target)
    if given is None or goal is None:
        return Score(0.0, False, "bad_problem")
    if answer is None:
        return Score(0.0, False, "no_answer")
    detail = _check(answer, given, goal, use_all, may_state_result=answer_format == "line")
    if detail == "correct":
        return Score(1.0, True, detail)
    attempted = answer_format == "tag" or detail not in ("syntax", "too_long", "too_deep")
    return Score(float(format_reward) if attempted else 0.0, False, detail)


def read_answer(
    completion: str, *, answer_format: Literal["tag", "line"] = "tag", thought_open: bool = False
) -> str | None:
    """Return what stands where the answer belongs, whether or not it is an expression; None when nothing does.

    Raises:
        ValueError: answer_format is neither "tag" nor "line".
    """
    if answer_format not in ("tag", "line"):
        raise ValueError(f'answer_format "{answer_format}" is not valid. Valid: "tag", "line".')
    text = visible(completion, thought_open=thought_open)
    if answer_format == "tag":
        return _in_tag(text) or None
    # After thoughts the answer has a line of its own; otherwise it goes on in the line of the prompt.
    return _first_line(text.lstrip() if closes_thought(completion) else text) or None


def _in_tag(text: str) -> str:
    begin = text.find("<answer>")
    closed = text.find("</answer>", max(0, begin))
    if 0 <= begin < closed and _BEGUN.match(text, begin) and next_turns(text, begin, closed):
        return ""  # an answer without an end, and then another turn's
    end = next(iter(next_turns(text, closed)), len(text)) if closed >= 0 else 0
    while (opening := text.rfind("<answer>", 0, max(0, text.rfind("</answer>", 0, end)))) >= 0:
        if answer := text[opening + len("<answer>") : text.find("</answer>", opening)].strip():
            return answer
        end = opening  # "in <answer></answer> tags"
    return ""


def _first_line(text: str) -> str:
    line = text.partition("\n")[0]
    return line[: next(iter(next_turns(line)), len(line))].strip()


def _check(answer: str, given: Counter[int], goal: Fraction, use_all: bool, *, may_state_result: bool) -> str:
    if len(answer) > MAX_LENGTH:
        return "too_long"
    expression, equals, result = answer.partition("=") if may_state_result else (answer, "", "")
    try:
        steps = _parse(expression)
        stated = _number(result.strip().translate(_OPERATORS)) if equals else goal
        if stated is None:
            return "syntax"
        used = Counter(step for step in steps if isinstance(step, int))
        if used != given if use_all else used - given:
            return "wrong_numbers"
        value = _evaluate(steps)
    except _ExpressionError as invalid:
        return str(invalid)
    if not _meets(value, goal):
        return "wrong_value"
    return "correct" if _meets(stated, goal) else "wrong_result"


def _parse(expression: str) -> list[int | str]:
    """Return the expression in postfix order: integers, operators, "neg" and "pos"."""
    steps: list[int | str] = []
    stack: list[str] = []
    depth, operand_next, signed = 0, True, False
    text = expression.translate(_OPERATORS).rstrip()
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise _ExpressionError("syntax")
        position = match.end()
        integer, symbol = match.groups()
        # Operand and operator take turns, except for one sign in front of an operand.
        if operand_next and not (integer or symbol == "(" or (symbol in _SIGN and not signed)):
            raise _ExpressionError("syntax")
        if not operand_next and (integer or symbol == "("):
            raise _ExpressionError("syntax")
        if integer:
            steps.append(int(integer))
            operand_next = signed = False
        elif symbol == "(":
            depth += 1
            if depth > MAX_DEPTH:
                raise _ExpressionError("too_deep")
            stack.append(symbol)
            signed = False
        elif symbol == ")":
            if not depth:
                raise _ExpressionError("syntax")
            depth -= 1
            while (top := stack.pop()) != "(":
                steps.append(top)
        elif operand_next:
            stack.append(_SIGN[symbol])
            signed = True
        else:
            while stack and stack[-1] != "(" and _PRECEDENCE[stack[-1]] >= _PRECEDENCE[symbol]:
                steps.append(stack.pop())
            stack.append(symbol)
            operand_next = True
    if operand_next or depth:
        raise _ExpressionError("syntax")
    return steps + stack[::-1]


def _evaluate(steps: list[int | str]) -> Fraction:
    stack: list[Fraction] = []
    for step in steps:
        if isinstance(step, int):
            stack.append(Fraction(step))
        elif step == "neg":
            stack.append(-stack.pop())
        elif step != "pos":
            right, left = stack.pop(), stack.pop()
            if step == "/" and not right:
                raise _ExpressionError("division_by_zero")
            stack.append(_APPLY[step](left, right))
    return stack.pop()


def _meets(value: Fraction, goal: Fraction) -> bool:
    return abs(value - goal) <= tolerance(goal)


def tolerance(goal: Fraction) -> Fraction:
    """Return the distance at which a value meets a target, which is a decimal."""
    decimals = next(n for n in range(_MAX_DIGITS + 1) if 10**n % goal.denominator == 0)
    if decimals < ROUNDED:
        return Fraction(0)
    return max(Fraction(1, 2 * 10**decimals), abs(goal) * FLOAT_ERROR)


def _given(numbers: object) -> Counter[int] | None:
    """Return the given numbers as a multiset; None unless all are whole and not negative."""
    if isinstance(numbers, str) or not isinstance(numbers, Iterable):
        return None
    values = [_number(number) for number in numbers]
    if any(value is None or value < 0 or value.denominator != 1 for value in values):
        return None
    return Counter(int(value) for value in values if value is not None)


def _number(value: object) -> Fraction | None:
    """Return the value exactly, a decimal string digit by digit; None for what is no ordinary number."""
    if not isinstance(value, str) or _FLOAT.fullmatch(value.strip()):
        try:
            decimal = Decimal(str(value).strip())
        except (ArithmeticError, ValueError):
            return None
        # Written out only when that is short: a billion zeros are one Decimal("1e1000000000").
        if not decimal.is_finite() or abs(decimal.adjusted()) > _MAX_DIGITS:
            return None
        value = f"{decimal:f}"
    return Fraction(value.strip()) if _DECIMAL.fullmatch(value.strip()) else None
