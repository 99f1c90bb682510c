"""The text that a completion marks as its answer: what the last explicit marker holds.

    \\boxed{...}   <answer>...</answer>      up to the matching brace or tag; an unclosed one is no answer
    #### ...       up to the end of the line
    answer is ...  Answer: ...               up to the end of the line

A marker of the last two kinds counts only if a number follows it on its line, or stands on the next line with text:
first, after a list bullet or not, or anywhere if that is the last line. Headings (#### 2. Explanation), empty boxes
and tags that are only mentioned are passed over, and so are remarks with the word answer; what may be one counts only
where no other marker does (`prose`). Text after the first next turn that comes after an answer (`turns`) is not the
model's answer to this problem and is not read.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from rewards.plain_number import MAX_TEXT, NUMBER_WORD, RefusedError, read_number
from rewards.prose import CLAUSE, DIRECT, MARKDOWN, MENTION, REMARK, prose_marker, rank_of_clause
from rewards.turns import last_match, next_turns

MAX_MARKERS = 256
"""Markers looked at, from the last; more without a number are an attack on the clock."""

_LITERALS = ("####", "\\boxed", "\\fbox", "<answer>", "nswer", "NSWER")
BOX = re.compile(r"\\(?:boxed|fbox)\s{0,4}\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_REFERS = re.compile(
    r"(?i)\b(?:steps?|parts?|sections?|lines?|equations?|methods?|questions?)\s[0-9]|\bneed\b"
    r"|\b(?:not|never|cannot)\b|n['\u2019]t\b"
)
"""A sentence below a heading "Answer" that gives none: see step 3, we need 2 more facts."""
_ANSWER_HEADING = re.compile(r"(?i)[\W_]*+(?:(?:the|final)\s++){0,2}(?:answer)?[\W_]*")
# Four hashes are also a Markdown heading: "#### 2. Multiply". "#### 18. She sold all." ends like a sentence.
_HEADING = re.compile(
    r"(?i)\s*(?:(?:step|part|phase|question|problem|method|solution|approach)\s[0-9]|[a-z]{3,12}\s[0-9]{1,2}:\s*[a-z]"
    r"|(?:notes?|explanation|reasoning|breakdown|confidence|why|how)\b|(?:double[\s-])?(?:verification|check|proof)\b.*="
    r"|(?:[0-9]{1,3}(?:\.[0-9]{1,2})?[.)]\s+|(?:\([0-9]{1,3}\)|[0-9]{1,3}:)\s+(?=(?-i:[A-Z])))[a-z].*[^.!?\s]\s*$)"
)
_HEADED = re.compile(r"(?i)(?:#{1,6}\s{1,3}[*_]{0,3}|[*_]{2,3})(?:(?:the|my|your|final)\s){0,2}")
_LAST_LINE = re.compile(rf"[^\n]{{1,{MAX_TEXT}}}+[^0-9]{{0,{MAX_TEXT}}}+")
"""The last line with a number."""
_BELOW = re.compile(
    rf"[*_]{{0,3}}[ \t]{{0,3}}(?=\n\s{{0,20}}(?:{_LAST_LINE.pattern}\Z"
    r"|[*_$\\(\[{]{0,6}(?:boxed\{)?[-+\u2212]?[$£€¥]?[0-9][0-9,.]*+"
    r"(?:[*_$£€¥\\)\]}%!]|[^\S\n])*+(?:[A-Za-z]++[ .*_]*+){0,2}(?:\^[23])?[^\S\n]*+(?:\n|\Z)))"
)
"""What follows a heading "Answer" above a line that is the last, or a number and little else."""
_STEPS = re.compile(r"[^=\n]*=[^\n]*+(?:\n(?:[^0-9=\n]{0,30}|\s{0,20}+[^A-Za-z0-9=\n]{0,20})[0-9][^=\n]*=[^\n]*+)++")
"""Equations, each on a line of its own."""
_MENTION = re.compile(r"[\s.\u2026]*+")
"""All that is in a box or tag that is no answer: "I put it in <answer>...</answer> tags"."""
_CLOSING = r"[)\]}\"'*_`$%\\\u2019\u201d]"
_EXCLAMATION = re.compile(rf"(?<=[0-9])({_CLOSING}{{0,6}}+\s?)!+(?={_CLOSING}{{0,6}}+(?:\s|$))")
_NUMBER_FIRST = re.compile(r"[^A-Za-z0-9]*[0-9]")
_BEGUN = re.compile(r"\s*+[^\n]*?[0-9]")
_SENTENCE_END = re.compile(r"[0-9%)$}][.;!]\s|[0-9][^0-9]*[a-z)][.!]\s+[A-Z]")
# What means nothing between a box, or a tag, and what goes on with its number.
_LATEX = r"\\[()\[\],;:! ]|\\q?quad(?![a-z])|\\(?:text|math)(?:rm|bf|it|sf|tt)?\s?\{"
_GAP = rf"(?:\s|{_LATEX})*"
_CONTINUED = re.compile(
    rf"(?i)(?:[ \t$*)\]}}~]|{_LATEX})*(?:{_GAP}[,;(]?{_GAP}"
    r"(?:(?P<another>or)\b|(?:(?:which|that|this)\s)?(?:(?:is|was)\s)?(?:wrong|incorrect|false|not\s(?:correct|right))\b)"
    r"|and\s\D{0,12}[0-9]"
    r"|(?:(?:squared|cubed)(?!\s[a-z])|000)\b|and\sa\shalf(?=\W*$|[.,;!])|[0-9]+/[0-9]+(?![\w-])|\u00b1"
    r"|[\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u209f\u2150-\u215e]"
    r"|\s*(?:hundred|thousand|lakh|crore|[a-z]{1,6}illion|dozen)|\\[dt]?frac\s?\{?\s?[0-9]|\.[0-9]"
    r"|(?:[\^/×÷·*+\u2212-]|\\(?:times|cdot|div|pm|mp)(?![a-z]))[ \t]?(?:\{?[0-9]|\\[dt]?frac|\\sqrt)"
    r"|\\(?:pi|sqrt)(?![a-z])|\u03c0|\?[\s$*?!)\]]*+(?:\Z|no\b))"
    r"|\}[ \t]?\{[ \t]?[0-9]|:[0-9]{2}(?![0-9])|(?:,|\\[,;:]|\{,\})[0-9]{3}(?![0-9])|[\u2010-\u2013][0-9]|(?<=\})[0-9]"
    r"|(?:(?:\\[,;: ])?\\(?:text|mathrm)\s?\{\s?)?(?-i:[kKMBT]|bn)\b|e[0-9]"
)
# In front of a box: a digit or a sign that belongs to its number, or an operator after another number. In front of a
# tag a sign alone, as sentences go on with tags: 9 * 2 = 18<answer>18</answer>.
_DASH = r"\-\u2010-\u2015\u2212"
_SIGN = rf"(?<![A-Za-z])[+{_DASH}](?:\\?\$|(?:\\left\s?)?[(\[])?|\b(?:[Nn]egative|[Mm]inus)[ \t$\\]*"
_SIGNED = re.compile(rf"(?:{_SIGN})\Z")
_CHANGED = re.compile(
    rf"(?i)(?:[0-9]\$?|(?<![0-9.])0\.\$?|\b(?:half(?:\sof)?|twice|double|triple|{NUMBER_WORD}\stimes)[ \t$]*"
    rf"|{_SIGN}|\\(?:pm|neg|sqrt\s?(?:\[[^\[\]]*\])?\{{?)|\^\s?\{{?|\\[dt]?frac\s?\{{[^{{}}]*\}}\s?\{{"
    rf"|[0-9][ \t$]{{0,3}}(?:[+*/^×÷·{_DASH}]|\\(?:times|cdot|div))[ \t$]{{0,3}}"
    rf"|=[ \t$]{{0,3}}[{_DASH}][ \t$]{{0,3}})\Z"
)
_OR = r"\bor\b(?:\s(?:maybe|perhaps|possibly|even|else))?"
_ALTERNATIVE = re.compile(
    r"(?i)[0-9][^0-9\n]{0,20}\b(?:and\b[\s$*\\(\[{}]*"
    rf"|{_OR}(?:{_LATEX}|[a-z]\s?=|[\s$*\\(\[{{}}#])*+)$"
    rf"|(?:[0-9}}]|</answer>)(?:\\[)\]]|[\s$*.,;])*{_OR}(?:\\[(\[]|[\s$*])*\Z"
)
_NUMBER_OR = re.compile(
    r"(?i)(?<![0-9.,/])(?<![+/\u00d7\u00f7]\s)(?<!\\times\s)(?<!\\cdot\s)([0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?)"
    rf"(?:[\s$*,]|\\[)\]]){{1,6}}{_OR}(?:[\s$*]|\\[(\[]){{1,6}}\Z"
)
_BLANKS = re.compile(r"[ \t]{3,}")
_DENIED = re.compile(r"(?i)(?:\b(?:not|never)|n['\u2019]t)(?:\s(?:be|equal\sto))?[ \t$*\\(\[{}]*\Z")
_POINT = r"[-+*>\u2022\u2023\u2043\u2010-\u2015\u2212\u25aa\u25cf\u25e6\u00b7][ \t\u00a0]+(?=\S)"
_BULLET = re.compile(rf"[ \t]*{_POINT}")
_LISTED = re.compile(rf"\n[ \t]*{_POINT}")
_NEXT_BULLET = re.compile(rf"[^\n]*\n\s*{_POINT}")
_MATH = re.compile(r"\s*(?:\$\$|\\\[)\s*")
# Between two boxes, or two tags, that offer one number each: then the last is no correction of the first.
_JOINED = re.compile(rf"(?:{_LATEX}|\\\\|[\s$,;/&|}}-]|\b(?:or|and|to)\b)*")


class _UnclosedError(RefusedError):
    """A tag or box that holds a number is never closed: an answer was begun, so a later turn's does not count."""


@dataclass(frozen=True, slots=True)
class _Span:
    text: str
    complete: bool
    """Whether something after the span shows that it ended there."""
    rank: int = DIRECT
    """Of spans with different ranks the lowest counts, wherever it stands."""


_NOTHING = _Span("", complete=True, rank=MENTION)


def answer_text(text: str, *, truncated: bool) -> str:
    """Return the marked text.

    Args:
        truncated: whether the text was cut off; then a marked text that reaches its end may have gone on.

    Raises:
        RefusedError: no marker, or the last one is empty, not closed, continued after it, or cut off.
    """
    tries = iter(range(MAX_MARKERS))  # of all turns
    for turn in next_turns(text):
        try:
            span = _last(text, turn, tries)
            if span.rank != REMARK:  # with a turn after it, it is not the answer that is looked for
                return span.text
        except RefusedError as refusal:
            if str(refusal) == "hedged" or isinstance(refusal, _UnclosedError):
                raise
    span = _last(text, len(text), iter(range(MAX_MARKERS)))
    if truncated and not span.complete:
        raise RefusedError("truncated")
    return span.text


def _last(text: str, end: int, tries: Iterator[int]) -> _Span:
    starts = {literal: text.rfind(literal, 0, end) for literal in _LITERALS}
    best: _Span | None = None
    following = opened = end
    for _ in tries:
        literal, start = max(starts.items(), key=lambda item: item[1])
        if start < 0:
            break
        if literal == "<answer>":
            span = _tag(text, start, opened, end)
            opened = start
        elif literal in ("\\boxed", "\\fbox"):
            opening = BOX.match(text, start, end)
            span = _box(text, start, opening.end(), end) if opening else None
        else:
            span = None
            if (marker := _line_marker(text, literal, start, end)) is not None:
                span = _marked_line(text, start, marker, min(following, end), end)
                following = start
        if span is not None and (best is None or span.rank < best.rank):
            best = span
            if span.rank == DIRECT:
                break
        starts[literal] = text.rfind(literal, 0, start)
    if best is None:
        raise RefusedError("no_marker")
    return best


def _tag(text: str, start: int, opened: int, end: int) -> _Span | None:
    """Return what the tag holds; None where it is neither closed, before `opened`, nor an answer that was begun."""
    begin = start + len("<answer>")
    close = text.find("</answer>", begin, opened)
    if close < 0 and not _BEGUN.match(text, begin, min(end, begin + MAX_TEXT)):
        return None
    if close < 0:
        raise _UnclosedError("unclosed")
    if _MENTION.fullmatch(text, begin, close):
        return _NOTHING
    if _SIGNED.search(text, max(0, start - 16), start):
        raise RefusedError("not_plain")
    content = _LISTED.sub("\n", _enclosed(text, start, begin, close, close + len("</answer>"), end))
    lines = {line.strip() for line in content.split("\n")} - {""}
    return _Span(lines.pop() if len(lines) == 1 else content, complete=True)


def _box(text: str, start: int, begin: int, end: int) -> _Span:
    brace = closing_brace(text, begin, end)
    if brace < 0:
        begun = _NUMBER_FIRST.match(text, begin, min(end, begin + 64))
        raise (_UnclosedError if begun else RefusedError)("unclosed")
    if _MENTION.fullmatch(text, begin, brace):
        return _NOTHING
    if _CHANGED.search(text, max(0, start - 32), start):
        raise RefusedError("not_plain")
    return _Span(_enclosed(text, start, begin, brace, brace + 1, end), complete=True)


def closing_brace(text: str, begin: int, end: int) -> int:
    """Return where the brace is that closes one before `begin`; -1 where there is none."""
    depth = 1
    for brace in _BRACE.finditer(text, begin, min(end, begin + 2 * MAX_TEXT)):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return brace.start()
    return -1


def _enclosed(text: str, start: int, begin: int, close: int, after: int, end: int) -> str:
    content = text[begin:close]
    if len(content) > MAX_TEXT:
        content = content.strip()[: MAX_TEXT + 1]
    earlier = text[max(0, start - 64) : start]
    number, alternative = _number(content), _NUMBER_OR.search(earlier)
    offered = alternative[1] if alternative else _offered_before(text, start)
    if offered is None and (_is_alternative(earlier) or _DENIED.search(earlier)):
        raise RefusedError("hedged")
    if offered is not None and _number(offered) != number and not (alternative and "%" in text[after : after + 4]):
        raise RefusedError("hedged")
    rest = _BLANKS.sub("  ", text[after - 1 : min(after + 2 * MAX_TEXT, end)])
    if continued := _CONTINUED.match(rest, 1, 65):
        other = rest[continued.end() :].partition("\n")[0]
        if not continued["another"] or len(other) > MAX_TEXT or _number(other) != number:
            raise RefusedError("hedged")
    return content


def _is_alternative(earlier: str) -> bool:
    """Return whether what follows this text is offered besides an answer that is marked in it."""
    return any(literal in earlier for literal in _LITERALS) and bool(_ALTERNATIVE.search(earlier))


def _offered_before(text: str, start: int) -> str | None:
    """Return what the box or tag holds that this one follows in a list; None where there is none."""
    earlier = text[max(0, start - MAX_TEXT) : start]
    tagged, tag, gap = earlier.rpartition("</answer>")
    if tag and gap.strip() and _JOINED.fullmatch(gap):
        return tagged.rpartition("<answer>")[2] if "<answer>" in tagged else None
    opening = last_match(BOX, earlier)
    close = closing_brace(earlier, opening.end(), len(earlier)) if opening else -1
    if opening is None or close < 0 or not _JOINED.fullmatch(earlier, close + 1):
        return None
    return None if _MENTION.fullmatch(earlier, opening.end(), close) else earlier[opening.end() : close]


def _number(text: str) -> str | None:
    """Return the number of the text, or the text itself where it has no plain one."""
    try:
        return read_number(text)
    except RefusedError:
        return text


def _line_marker(text: str, literal: str, start: int, end: int) -> tuple[int, int] | None:
    """Return where the text after `####` or after "answer is" begins, and its rank; None if this is neither."""
    if literal == "####":
        return start + len(literal), DIRECT
    if start == 0 or text[start - 1] not in "aA" or text[start - 2 : start - 1].isalpha():
        return None
    line = text.rfind("\n", 0, start) + 1
    if _HEADED.fullmatch(text, line, start - 1) and (rest := _BELOW.match(text, start + len(literal), end)):
        return rest.end(), DIRECT
    return prose_marker(text, start + len(literal), text[max(0, start - 64) : start - 1], end)


def _marked_line(text: str, start: int, marker: tuple[int, int], stop: int, end: int) -> _Span | None:
    """Return what the line of a marker says, up to `stop`; None if that is a heading or has no number."""
    begin, rank = marker
    try:
        span = _line(text, begin, stop, end)
    except RefusedError:
        if rank == DIRECT:
            raise
        span = None
    if span is None:
        return None
    if rank == REMARK and "=" in span.text:
        return None
    if rank == CLAUSE:
        rank = rank_of_clause(span.text)
    if not text.startswith("####", start):  # In a sentence 18! is no factorial.
        return _Span(_EXCLAMATION.sub(r"\1.", span.text), span.complete, rank)
    if _HEADING.match(span.text.translate(MARKDOWN)):
        return None
    if _is_alternative(text[max(0, start - 64) : start]):
        raise RefusedError("hedged")
    return span


def _line(text: str, begin: int, stop: int, end: int) -> _Span | None:
    """Return the rest of the line, or the next line that says something; None if there is no number."""
    span = _until_newline(text, begin, stop)
    if re.search("[0-9]", span.text):
        return span
    position, in_math = begin, False
    for _ in range(4):
        if not _ANSWER_HEADING.fullmatch(span.text):
            return None
        position = text.find("\n", position, stop) + 1
        if not position:
            return None
        span = _until_newline(text, position, stop)
        if _NUMBER_FIRST.match(span.text):
            return span if in_math else _first_below(text, position, stop, span)
        if _LAST_LINE.fullmatch(text, position, end) and not _HEADING.match(span.text.translate(MARKDOWN)):
            says = re.search("[0-9]", span.text) and not _REFERS.search(span.text)
            complete = end < len(text) or bool(text[position + len(span.text) : end].strip())
            return _Span(span.text, complete=complete) if says else None
        in_math = in_math or bool(_MATH.fullmatch(span.text))
    return None


def _first_below(text: str, position: int, end: int, span: _Span) -> _Span:
    """Return the first line below a heading: with the equations after it, or without the bullet of a list that has no
    other numbers."""
    if not _BULLET.match(span.text):
        steps = _STEPS.match(text, position, min(end, position + MAX_TEXT))
        return _Span(re.sub(r"\.?\n\s*", ". ", steps.group()), complete=steps.end() < len(text)) if steps else span
    another = _NEXT_BULLET.match(text, position, end)
    if another and re.search("[0-9]", _until_newline(text, another.end(), end).text):
        raise RefusedError("several_numbers")
    return _Span(_BULLET.sub("", span.text, count=1), span.complete)


def _until_newline(text: str, begin: int, end: int) -> _Span:
    stops = [stop for stop in (text.find("\n", begin, end), text.find("</answer>", begin, end)) if stop >= 0]
    stop = min(stops, default=end)
    line = text[begin:stop]
    if len(line) > MAX_TEXT and len(line := _BLANKS.sub("  ", line)) > MAX_TEXT:
        line = line[: max(line.rfind(" ", 0, MAX_TEXT), 0)]  # A number must not be cut in two.
    return _Span(line, complete=stop < len(text) or bool(_SENTENCE_END.search(line.translate(MARKDOWN))))
