r"""Answers in LaTeX, compared by the package math-verify (github.com/huggingface/Math-Verify): \boxed{\frac12}, $0.5$.

Only LaTeX is read, by a grammar: math-verify's other way to read text calls Python's eval. What is parsed is sympy on
hostile input, which may take any time or memory: this belongs into a process of its own (`tasks.sandbox`).
"""

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from rewards import Score
from rewards.markers import BOX, closing_brace
from rewards.turns import last_match, next_turns, visible

DETAILS = ("correct", "wrong", "no_math", "truncated", "bad_gold")
"""Vocabulary of `Score.detail`."""
_MATH = re.compile(r"(?<!\\)\$|\\(?:boxed|fbox|[(\[])")
_FILLED = re.compile(BOX.pattern + r"(?!\s*\})")
_LIST = re.compile(r"(?:[\s$,;/.()\[\]{}\\]|\btext\b|\band\b|\bor\b)*")
"""What stands between boxes that are one answer; after a sentence the last box corrects the others."""
_SECONDS = 3
"""Of each of three calls; the process has a limit for all of them."""


def score(completion: str, answer: str, *, truncated: bool = False, thought_open: bool = False) -> Score:
    """Score a completion against an answer in LaTeX, with or without a box or dollar signs."""
    try:
        gold = _gold(answer)
    except ValueError:
        return Score(0.0, False, "bad_gold")
    text = _answered(visible(completion, thought_open=thought_open), truncated=truncated)
    if text is None:
        return Score(0.0, False, "truncated")
    found = _parse(_corrected(text))
    if not found:
        return Score(0.0, False, "no_math")
    correct = bool(_verify()(list(gold), found, timeout_seconds=_SECONDS))
    return Score(float(correct), correct, "correct" if correct else "wrong")


def read_answer(completion: str, *, truncated: bool = False, thought_open: bool = False) -> str | None:
    """Return the answer as sympy writes it; None without one."""
    text = _answered(visible(completion, thought_open=thought_open), truncated=truncated)
    found = [] if text is None else _parse(_corrected(text))
    return str(found[0]) if found else None


def boxed(answer: str) -> str:
    """Return an answer, or a whole solution, as a completion would give it."""
    return answer if "\\boxed" in answer or "$" in answer.replace("\\$", "") else f"\\boxed{{{answer}}}"


def _answered(text: str, *, truncated: bool) -> str | None:
    """Return the text before a next turn that the model may invent; None where the length limit cut the answer off.

    A text that was cut off has an answer only if its last box is closed.
    """
    turn = next((turn for turn in next_turns(text) if _MATH.search(text, 0, turn)), None)
    if turn is not None:
        return text[:turn]
    if not truncated:
        return text
    box = last_match(BOX, text)
    end = -1 if box is None or "\\boxed" in text[box.end() :] else closing_brace(text, box.end(), len(text))
    return text[: end + 1] if end >= 0 else None


def _corrected(text: str) -> str:
    """Return the text from its last box on, where that comes after a sentence that follows another box."""
    box = last_match(_FILLED, text)
    before = None if box is None else last_match(_FILLED, text[: box.start()])
    end = -1 if before is None or box is None else closing_brace(text, before.end(), box.start())
    if box is None or end < 0 or _LIST.fullmatch(text, end + 1, box.start()):
        return text
    return text[box.start() :]


@lru_cache(maxsize=4096)
def _gold(answer: str) -> tuple[Any, ...]:
    """Parse an answer. Raises ValueError where it gives nothing, which is not kept: it may have been out of time."""
    if not (found := _parse(boxed(answer))):
        raise ValueError(answer)
    return tuple(found)


def _parse(text: str) -> list[Any]:
    from math_verify import LatexExtractionConfig, parse

    latex = [LatexExtractionConfig(boxed_match_priority=0)]
    return list(parse(text, extraction_config=latex, fallback_mode="no_fallback", parsing_timeout=_SECONDS))


def _verify() -> Callable[..., bool]:
    from math_verify import verify

    return verify
