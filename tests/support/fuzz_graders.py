"""What holds of the graders whatever text they read. A check takes bytes, and raises where something does not hold."""

import ast
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from rewards import Score, countdown, gsm8k
from rewards.trl import reward_function, text_of
from rewards.turns import THOUGHT

CASES = Path(__file__).parents[1] / "rewards"
SECONDS = 0.05
"""Processor time in which a text of some kilobytes is graded."""
_WRITTEN = {
    "-": "\u02d7\u2010\u2011\u2012\u2013\u2014\u2015\u207b\u2212\u2796\ufe58\ufe63\uff0d",
    "+": "\uff0b",
    "/": "\u00f7\u2044\u2215\uff0f",
    "(": "\uff08",
    ")": "\uff09",
    "*": "x\u00b7\u00d7\u2022\u2217\u2219\u22c5\u2715\u2716\uff0a",
}
_ASCII = {ord(character): symbol for symbol, characters in _WRITTEN.items() for character in characters}


def as_text(data: bytes) -> str:
    """Any text, as a tokenizer gives it: what is no UTF-8 becomes half a surrogate pair."""
    return data.decode("utf-8", "surrogateescape")


def in_time(call: Callable[[], Any], seconds: float = SECONDS) -> Any:
    """The result of a call that takes less time; of several tries the fastest counts, as others may be busy."""
    least = float("inf")
    for _ in range(5):
        start = time.process_time()
        result = call()
        least = min(least, time.process_time() - start)
        if least < seconds:
            return result
    raise AssertionError(f"took {least:.3f} s")


def check_countdown(data: bytes) -> None:
    """First line: `[numbers, target]` in JSON, or a target for the numbers 4 and 5. The rest is the completion."""
    first, _, text = as_text(data).partition("\n")
    numbers, target = _problem(first)
    for use_all in (True, False):
        for answer_format in ("tag", "line"):
            _check_countdown(text, numbers, target, use_all, answer_format)
    for same in (f"<think>{THOUGHT.sub('', text)}</think>{text}", f"Thinking.\n{text}", f"{text}\n", f"{text}\n</s>"):
        assert countdown.score(same, numbers, target) == countdown.score(text, numbers, target), ascii(same)
    assert countdown.score(text, numbers, target, thought_open=True) == countdown.score(
        f"<think>{text}", numbers, target
    )


def _problem(line: str) -> tuple[Any, Any]:
    try:
        numbers, target = json.loads(line)
    except (ValueError, TypeError, RecursionError):
        return [4, 5], line
    return numbers, target


def _check_countdown(
    text: str, numbers: Any, target: Any, use_all: bool, answer_format: Literal["tag", "line"]
) -> None:
    options: dict[str, Any] = {"use_all": use_all, "answer_format": answer_format}
    score: Score = in_time(lambda: countdown.score(text, numbers, target, **options))
    answer = countdown.read_answer(text, answer_format=answer_format)
    assert score.detail in countdown.DETAILS
    assert score.reward in (1.0, 0.1, 0.0)
    assert score.correct == (score.reward == 1.0) == (score.detail == "correct")
    assert answer or score.detail in ("no_answer", "bad_problem")
    assert reward_function(countdown.score, **options)([""], [text], numbers=[numbers], target=[target]) == [
        score.reward
    ]
    if score.correct:
        assert answer is not None
        expression = answer.partition("=")[0] if answer_format == "line" else answer
        tree = ast.parse(f"({' '.join(expression.translate(_ASCII).split())})", mode="eval").body
        used, given = Counter(_leaves(tree)), Counter(int(Fraction(str(number))) for number in numbers)
        assert used == given if use_all else not used - given
        goal = Fraction(str(target).strip())
        assert abs(_value(tree) - goal) <= countdown.tolerance(goal)


def _leaves(node: ast.expr) -> Iterator[int]:
    for child in ast.walk(node):
        if isinstance(child, ast.Constant):
            assert isinstance(child.value, int)
            yield child.value


def _value(node: ast.expr) -> Fraction:
    """The value that Python's parser sees, in fractions."""
    if isinstance(node, ast.Constant):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp):
        return -_value(node.operand) if isinstance(node.op, ast.USub) else _value(node.operand)
    assert isinstance(node, ast.BinOp)
    left, right = _value(node.left), _value(node.right)
    if isinstance(node.op, ast.Div):
        return left / right
    return {ast.Add: left + right, ast.Sub: left - right, ast.Mult: left * right}[type(node.op)]


def check_gsm8k(data: bytes) -> None:
    """First line: the gold answer. The rest is the completion."""
    gold, _, text = as_text(data).partition("\n")
    readings: dict[tuple[str, bool], str | None] = {}
    for method in ("robust", "strict", "strict_cot", "flexible"):
        for truncated in (False, True):
            options: dict[str, Any] = {"method": method, "truncated": truncated}
            score: Score = in_time(lambda options=options: gsm8k.score(text, gold, **options))
            found = readings[method, truncated] = gsm8k.read_answer(text, **options)
            assert score.detail in gsm8k.DETAILS
            assert (score.reward, score.correct) == ((1.0, True) if score.detail == "correct" else (0.0, False))
            assert found is not None or not score.correct
            if method == "robust":
                known = gsm8k.gold_number(gold)
                assert score.correct == (known is not None and found == known)
                # A number in its shortest form, which as an answer reads as itself.
                assert found is None or gsm8k.read_answer(f"#### {found}\n") == found == gsm8k.gold_number(found)
            else:
                assert score.correct == published(method, text, gold)
    assert readings["robust", True] in (None, readings["robust", False])
    for same in (f"<think>{THOUGHT.sub('', text)}</think>{text}", f"Thinking.\n{text}", f"{text}\n", f"{text}</s>"):
        assert gsm8k.read_answer(same) == readings["robust", False], ascii(same)
    assert gsm8k.read_answer(text, thought_open=True) == gsm8k.read_answer(f"<think>{text}")
    messages = [{"role": "assistant", "content": [{"type": "text", "text": text}, {"type": "image"}]}]
    assert text_of(messages) == text


def published(method: str, text: str, answer: str) -> bool:
    """The filters as lm-evaluation-harness writes them: findall, group_select, then exact_match."""
    if method == "flexible":
        found = [first or second for first, second in re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", text)][-1:]
    else:
        found = re.findall(
            {"strict": r"#### (\-?[0-9\.\,]+)", "strict_cot": r"The answer is (\-?[0-9\.\,]+)."}[method], text
        )[:1]
    return _ignored((found or ["[invalid]"])[0].strip()) == _ignored(answer)


def _ignored(text: str) -> str:
    for pattern in (",", r"\$", "(?s).*#### ", r"\.$"):
        text = re.sub(pattern, "", text)
    return text.lower()


def countdown_seeds() -> list[bytes]:
    """The graded answers of the tests, with their problems."""
    rows = _rows("cases_countdown.jsonl")
    return [_input(json.dumps([row["numbers"], row["target"]]), row["completion"]) for row in rows]


def gsm8k_seeds() -> list[bytes]:
    """The graded answers of the tests, with their gold numbers."""
    return [_input(row["answer"], row["completion"]) for row in _rows("cases_gsm8k.jsonl")]


def _input(first: str, text: str) -> bytes:
    return f"{first}\n{text}".encode("utf-8", "surrogatepass")


def _rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (CASES / name).read_text(encoding="utf-8").splitlines()]
