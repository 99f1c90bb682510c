r"""Exact match: the text that a completion gives as its answer is the gold text.

The answer is what the last marker holds, else the whole text outside thoughts (`marked`). Before both are compared,
case is folded, runs of white space become one space, \text{...} and its like become what they hold, and LaTeX dollar
signs, quotation marks, asterisks and backticks around the whole are taken away, and so is one full stop at its end.
Nothing else: "1,000" is not "1000".

Reward: 1 if equal, else 0.
"""

from rewards.marked import marked, unstyled
from rewards.plain_number import RefusedError
from rewards.score import Score
from rewards.turns import visible

DETAILS = ("correct", "wrong", "no_answer", "unclosed", "too_long", "truncated", "bad_gold")
"""Vocabulary of `Score.detail`."""
_AROUND = "\"'`*$ “”‘’"  # noqa: RUF001 - quotation marks are meant


def score(completion: str, answer: str, *, truncated: bool = False, thought_open: bool = False) -> Score:
    """Score a completion against the gold text."""
    gold = normalise(answer)
    if not gold:
        return Score(0.0, False, "bad_gold")
    try:
        found = _read(completion, truncated, thought_open)
    except RefusedError as refusal:
        return Score(0.0, False, str(refusal))
    correct = found == gold
    return Score(float(correct), correct, "correct" if correct else "wrong")


def read_answer(completion: str, *, truncated: bool = False, thought_open: bool = False) -> str | None:
    """Return the answer as it is compared; None without one."""
    try:
        return _read(completion, truncated, thought_open)
    except RefusedError:
        return None


def normalise(text: str) -> str:
    """Return the form in which answers are compared."""
    folded = " ".join(unstyled(text).casefold().split()).strip(_AROUND)
    return folded.removesuffix(".").strip(_AROUND)


def _read(completion: str, truncated: bool, thought_open: bool) -> str:
    return marked(visible(completion, thought_open=thought_open), _normal, truncated=truncated)


def _normal(answer: str) -> str:
    found = normalise(answer)
    if not found:
        raise RefusedError("no_answer")
    return found
