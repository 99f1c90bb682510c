r"""The answer of a completion where it may be any text: what the last marker holds, else all of it.

    \boxed{Paris}    <answer>Paris</answer>    #### Paris    Answer: Paris    The answer is Paris.

A marker of the last two kinds reaches to the end of its line. A box or tag that is not closed is no answer.
(`markers` is for answers that are numbers, and therefore can tell a heading or a remark from an answer.)
"""

import re
from collections import deque

from rewards.plain_number import RefusedError

LONGEST = 1000
"""Characters of an answer; a longer one is none."""

_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_PROSE = re.compile(r"(?i)\banswer(?:\s{0,3}[*_]{0,2}[:=]|\s{1,3}is\b[ \t]{0,3}:?)[*_]{0,2}")


def marked(text: str, *, truncated: bool = False) -> str:
    """Return the answer in a text, stripped.

    Args:
        truncated: whether the text was cut off; then an answer that reaches its end may have gone on.

    Raises:
        RefusedError: "unclosed", "truncated", "too_long", or "no_answer" where there is nothing.
    """
    begin, end = _span(text)
    if truncated and end >= len(text):
        raise RefusedError("truncated")
    answer = text[begin : min(end, begin + 4 * LONGEST)].strip()
    if not answer:
        raise RefusedError("no_answer")
    if len(answer) > LONGEST:
        raise RefusedError("too_long")
    return answer


def _span(text: str) -> tuple[int, int]:
    """Return where the answer begins and ends."""
    prose = next(iter(deque(_PROSE.finditer(text), maxlen=1)), None)
    starts = {mark: text.rfind(mark) for mark in ("\\boxed{", "<answer>", "####")}
    starts["prose"] = prose.start() if prose else -1
    mark, start = max(starts.items(), key=lambda item: item[1])
    if start < 0:
        return 0, len(text)
    begin = prose.end() if prose and mark == "prose" else start + len(mark)
    if mark == "<answer>":
        end = text.find("</answer>", begin)
    elif mark == "\\boxed{":
        end = _closing_brace(text, begin)
    else:
        newline = text.find("\n", begin)
        return begin, newline if newline >= 0 else len(text)
    if end < 0:
        raise RefusedError("unclosed")
    return begin, end


def _closing_brace(text: str, begin: int) -> int:
    depth = 1
    for brace in _BRACE.finditer(text, begin):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return brace.start()
    return -1
