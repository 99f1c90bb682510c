r"""The answer of a completion where it may be any text: what the last marker holds, else all of it.

    \boxed{Paris}    \fbox{Paris}    <answer>Paris</answer>    #### Paris    Answer: Paris    The answer is Paris.

A marker of the last two kinds reaches to the end of its line, or of the next one with text where that is blank, or of
the box or tag around it. A box or tag that is not closed is no answer. What follows the first next turn (`turns`) that
comes after an answer is not read.
(`markers` is for answers that are numbers, and therefore can tell a heading or a remark from an answer.)
"""

import re
from collections.abc import Callable

from rewards.markers import BOX, closing_brace
from rewards.plain_number import RefusedError
from rewards.turns import last_match, next_turns

LONGEST = 1000
"""Characters of an answer; a longer one is none."""

_NEXT_LINE = re.compile(r"(?:[ \t*_]*\n)*")
"""What is passed over behind "Answer:" or ####, up to the next line that says something."""
_PROSE = re.compile(r"(?i)\banswer(?:\s{0,3}[*_]{0,2}[:=]|\s{1,3}is\b[ \t]{0,3}:?)[*_]{0,2}")


_STYLED = re.compile(r"\\(?:text|math)(?:bf|rm|it|sf|tt)?\s?\{([^{}]*)\}")


def unstyled(text: str) -> str:
    """Return the text with LaTeX's \\text{...}, \\mathbf{...} and their like replaced by what they hold."""
    return _STYLED.sub(r"\1", text)


def marked(text: str, read: Callable[[str], str], *, truncated: bool = False) -> str:
    """Return what `read` makes of the answer in a text, stripped; it raises RefusedError where that is none.

    Args:
        truncated: whether the text was cut off; then an answer that reaches its end may have gone on.

    Raises:
        RefusedError: of `read`, or "unclosed", "truncated", "too_long", or "no_answer" where there is nothing.
    """
    for turn in next_turns(text):
        try:
            return read(_marked(text[:turn]))
        except RefusedError as refusal:
            if str(refusal) == "several":
                raise
    return read(_marked(text, truncated=truncated))


def _marked(text: str, *, truncated: bool = False) -> str:
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
    prose, box = last_match(_PROSE, text), last_match(BOX, text)
    tag, hashes = text.rfind("<answer>"), text.rfind("####")
    starts = [-1 if found is None else found.start() for found in (prose, box)]
    start = max(*starts, tag, hashes)
    if start < 0:
        return 0, len(text)
    brace = -1 if box is None else closing_brace(text, box.end(), len(text))
    if box is not None and start == box.start():
        begin, end = box.end(), brace
    elif start == tag:
        begin = tag + len("<answer>")
        end = text.find("</answer>", begin)
    else:
        begin = prose.end() if prose is not None and start == prose.start() else hashes + len("####")
        if blank := _NEXT_LINE.match(text, begin):
            begin = blank.end()
        ends = (text.find("\n", begin), text.find("</answer>", begin), brace)
        return begin, min((end for end in ends if end >= begin), default=len(text))
    if end < 0:
        raise RefusedError("unclosed")
    return begin, end
