"""GSM8K: the number that a completion gives as its answer equals the gold number.

`robust`, the reward. In the text outside thoughts, up to a next turn that the model may invent, the last
explicit marker counts:

    \\boxed{18}    #### 18    <answer>18</answer>    The answer is 18.    Answer: 18

(`turns` says which text that is, `markers` and `prose` what is marked in it, `plain_number` how a number is read.)
It must hold exactly one plain number, in ASCII digits, correct thousands separators allowed, with or without a
currency sign, percent sign or unit. A scale word belongs to the number (1.45 million is 1450000). Abbreviated
scales (18k), expressions that are not evaluated (36/2, three times 18), alternatives (18 or 17), hedges (about 18)
and retractions (18, which is wrong) are refused; an equation counts by its right side (9 * 2 = 18). Numbers are
compared as decimals, exactly. Where the completion was cut off by the length limit, an answer counts only if
something after it shows that it was complete.

`strict` and `flexible` are the filters "strict-match" and "flexible-extract" of the task `gsm8k` of
lm-evaluation-harness, and its normalisation before exact match, for comparison with published numbers;
`strict_cot` is "strict-match" of its task `gsm8k_cot`. They read the whole text, thoughts included, and ignore
`truncated`.

Reward: 1 if correct; `format_reward` for a wrong number where the method looks for the answer; else 0. A gold answer
without a number scores 0 with detail "bad_gold" (the task loader refuses it before that).
"""

import re
from typing import Literal

from rewards.markers import answer_text
from rewards.plain_number import RefusedError, canonical, read_number
from rewards.score import Score
from rewards.turns import visible

Method = Literal["robust", "strict", "strict_cot", "flexible"]

DETAILS = (
    "correct",
    "wrong_value",
    "no_marker",
    "no_number",
    "several_numbers",
    "not_plain",
    "hedged",
    "unclosed",
    "truncated",
    "bad_gold",
)
"""Vocabulary of `Score.detail`; "no_marker" and "no_number" are also what lm-evaluation-harness's filters
find where nothing matches."""

_STRICT = {
    "strict": re.compile(r"#### (-?[0-9.,]+)"),
    "strict_cot": re.compile(r"The answer is (-?[0-9.,]+)."),
}
# A match of (-?[$0-9.,]{2,})|(-?[0-9]+) is a whole run of these characters, so the last match is the first
# match of the mirror image, [$0-9.,]{2,}-?|[0-9]-?, in the reversed text. Its first character is written in
# front because the search for one character is fast.
_FLEXIBLE_REVERSED = re.compile(r"[$0-9.,](?:[$0-9.,]+|(?<=[0-9]))-?")


def score(
    completion: str,
    answer: str | int,
    *,
    truncated: bool = False,
    thought_open: bool = False,
    method: Method = "robust",
    format_reward: float = 0.0,
) -> Score:
    """Score a completion.

    Args:
        answer: gold number, or the gold solution, whose number follows its last `#### `.
        truncated: whether the completion was cut off by the length limit.
        thought_open: whether the prompt ended in a thought that the completion continues.
        format_reward: reward of a wrong number that stands where an answer belongs.

    Raises:
        ValueError: unknown method.
    """
    gold = gold_number(str(answer)) if method == "robust" else _normalise(str(answer))
    if gold is None:
        return Score(0.0, False, "bad_gold")
    try:
        found = _read(completion, truncated, thought_open, method)
    except RefusedError as refusal:
        return Score(0.0, False, str(refusal))
    if found == gold:
        return Score(1.0, True, "correct")
    return Score(float(format_reward), False, "wrong_value")


def read_answer(
    completion: str, *, truncated: bool = False, thought_open: bool = False, method: Method = "robust"
) -> str | None:
    """Return the answer that `score` compares with the gold one, normalised as the method does; None without one.

    Raises:
        ValueError: unknown method.
    """
    try:
        return _read(completion, truncated, thought_open, method)
    except RefusedError:
        return None


def gold_number(answer: str) -> str | None:
    """Return the number of a gold answer in its shortest form; None without one."""
    return canonical(answer.rpartition("#### ")[2].strip())


def _read(completion: str, truncated: bool, thought_open: bool, method: Method) -> str:
    if method == "robust":
        return read_number(answer_text(visible(completion, thought_open=thought_open), truncated=truncated))
    if method in _STRICT:
        match = _STRICT[method].search(completion)
        return _normalise(_found(match.group(1) if match else None, "no_marker"))
    if method == "flexible":
        match = _FLEXIBLE_REVERSED.search(completion[::-1])
        return _normalise(_found(match.group()[::-1] if match else None, "no_number"))
    raise ValueError(f'method "{method}" is not valid. Valid: "robust", "strict", "strict_cot", "flexible".')


def _found(text: str | None, nothing: str) -> str:
    if text is None:
        raise RefusedError(nothing)
    return text


def _normalise(text: str) -> str:
    """Return what lm-evaluation-harness ignores: commas, dollar signs, everything to the last `#### `, a final
    period, case."""
    text = text.replace(",", "").replace("$", "").rpartition("#### ")[2]
    return re.sub(r"\.$", "", text).lower()
