r"""Multiple choice: the letter that a completion gives as its answer is the gold letter.

    B    (b)    **B**    B. Paris    The answer is (B).    \boxed{B}    <answer>B</answer>

The answer is what the last marker holds, else the whole text outside thoughts (`marked`): a letter from A to Z alone,
or first and then a bracket, a full stop, a colon or a comma. "A dog" names no letter, and "A) or B)" names two;
"D. Both A and B." names one.

Reward: 1 if it is the gold letter, else 0.
"""

import re

from rewards.marked import marked, unstyled
from rewards.plain_number import RefusedError
from rewards.score import Score
from rewards.turns import visible

DETAILS = ("correct", "wrong", "no_letter", "several", "no_answer", "unclosed", "too_long", "truncated", "bad_gold")
"""Vocabulary of `Score.detail`."""
_LETTER = re.compile(r"(?:\\text\{)?[\s*_`\"'(\[$]*([A-Za-z])(?:[\s*_`\"')\]$}]*[.]?[\s*_`]*\Z|[*_`\"'$]{0,2}[).\]:,])")
_FIRST = re.compile(r"(?:\\text\{)?[\s*_`\"'(\[$]*[A-Za-z]")
_OPENING = r"[\s*_`\"'(\[]*[A-Za-z]"
_NEXT = re.compile(rf"[\s*_`\"')\]}}$.:]*(?:\b(?:or|and)\b|[/&,]){_OPENING}(?:[).\]:,*]|\s*\Z)")
"""Another letter directly behind the first."""
_LATER = re.compile(rf"\bor\b{_OPENING}(?:[).\]:,*]|\s*\Z)|(?:\band\b|[/&,]){_OPENING}[).\]:]\s+\S")
"""One with a text of its own, or an alternative; an "and" may belong to the option."""


def score(completion: str, answer: str, *, truncated: bool = False, thought_open: bool = False) -> Score:
    """Score a completion against the gold letter, which may have brackets or a full stop."""
    try:
        gold = _letter(answer.strip())
    except RefusedError:
        return Score(0.0, False, "bad_gold")
    try:
        found = marked(visible(completion, thought_open=thought_open), _letter, truncated=truncated)
    except RefusedError as refusal:
        return Score(0.0, False, str(refusal))
    return Score(float(found == gold), found == gold, "correct" if found == gold else "wrong")


def read_answer(completion: str, *, truncated: bool = False, thought_open: bool = False) -> str | None:
    """Return the letter, as a capital; None without one."""
    try:
        return marked(visible(completion, thought_open=thought_open), _letter, truncated=truncated)
    except RefusedError:
        return None


def _letter(text: str) -> str:
    text = unstyled(text)
    first = _FIRST.match(text)
    if first and _NEXT.match(text, first.end()):
        raise RefusedError("several")
    match = _LETTER.match(text)
    if not match:
        raise RefusedError("no_letter")
    if _LATER.search(text, match.end(1)):
        raise RefusedError("several")
    return match[1].upper()
