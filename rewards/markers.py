"""The text that a completion marks as its answer: what the last explicit marker holds.

    \\boxed{...}   <answer>...</answer>      up to the matching brace or tag; an unclosed one is no answer
    #### ...       up to the end of the line
    answer is ...  Answer: ...               up to the end of the line

A marker of the last two kinds counts only if a number follows it on its line, or comes first on the next line
with text, after a list bullet or not. Headings (#### 2. Explanation) and remarks (the answer is correct) are passed
over. Text after the first next turn that comes after an answer (`turns`) is not the model's answer to this problem
and is not read.
"""

import re
from dataclasses import dataclass

from rewards.plain_number import MAX_TEXT, RefusedError, canonical, read_number
from rewards.turns import last_match, next_turns

MAX_MARKERS = 256
"""Markers looked at, from the last; more without a number are an attack on the clock."""

_LITERALS = ("####", "\\boxed", "\\fbox", "<answer>", "nswer", "NSWER")
BOX = re.compile(r"\\(?:boxed|fbox)\s{0,4}\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_PROSE = re.compile(
    r"(?i)[*_`\"']{0,3}(?:\s{1,3}\([^()\n]{0,60}\))?(?:\s{1,3}(?:to|for|of) (?:the|this|your) [a-z]{1,20})?"
    r"(?:\s{0,3}[*_`]{0,3}[:=\uff1a]|\s{1,3}(?:is|was|equals|(?:would|will|should|must) be)\b(?!n[\u2019']t))"
)
_REMARK = re.compile(
    r"(?i)[\s:]{0,8}(?:correct|right|wrong|based|rounded(?!\sto\s[a-z ]{1,40}[,:]\s{0,2}[$£€]?[0-9])|obtained"
    r"|consistent|reasonable|verified|confirmed|derived|(?:calculated|computed|found|determined)(?!\sto\sbe\b)|reached|given\sby"
    r"|in\s(?:dollars|cents|hours|minutes|units)(?!:)|positive(?!\s[0-9])"
    r"|the\s(?:product|sum|difference)\sof(?=[^=\n]*$))\b"
)
_CHECKED = re.compile(r"(?i)\b(?:check|verify)(?:ing)?[ \t](?:(?:the|my|our|this)[ \t]){1,2}(?:final[ \t])?\Z")

_ANSWER_HEADING = re.compile(r"(?i)[\W_]*(?:(?:the|final)\s+){0,2}(?:answer)?[\W_]*")
# Four hashes are also a Markdown heading: "#### 2. Multiply". "#### 18. She sold all." ends like a sentence.
_HEADING = re.compile(
    r"(?i)[\s*]*(?:(?:step|part|phase|question|problem)\s[0-9]|(?:note|explanation|reasoning)\b|(?:verification|check|proof)\b.*="
    r"|[0-9]{1,3}[.)]\s+[a-z].*[^.!?\s]\s*$)"
)
_HEADED = re.compile(r"(?i)(?:#{1,6}\s{1,3}[*_]{0,3}|[*_]{2,3})(?:(?:the|my|your|final)\s){0,2}")
_BELOW = re.compile(
    r"[*_]{0,3}[ \t]{0,3}(?=\n\s{0,20}[*_$\\(\[{]{0,6}(?:boxed\{)?[-+\u2212]?[$£€¥]?[0-9][0-9,.]*[\s*_$£€¥\\)\]}%]*"
    r"(?:[A-Za-z]+[ .*_]*){0,2}(?:\^[23])?\s*(?:\n|\Z))"
)
"""What follows a heading "Answer" above a line that is a number and little else."""
_EXCLAMATION = re.compile(r"(?<=[0-9])!(?=\s|$)")
_NUMBER_FIRST = re.compile(r"[^A-Za-z0-9]*[0-9]")
_SENTENCE_END = re.compile(r"[0-9%)*$}][.;!]\s")
# What means nothing between a box, or a tag, and what goes on with its number.
_LATEX = r"\\[()\[\],;:! ]|\\q?quad(?![a-z])|\\(?:text|math)(?:rm|bf|it|sf|tt)?\s?\{"
_GAP = rf"(?:\s|{_LATEX})*"
_CONTINUED = re.compile(
    rf"(?i)(?:[ \t$*)\]}}~]|{_LATEX})*(?:{_GAP}[,;]?{_GAP}(?P<another>or)\b|and\s\D{{0,12}}[0-9]"
    r"|(?:(?:squared|cubed)(?!\s[a-z])|000)\b|and\sa\shalf(?=\W*$|[.,;!])|[0-9]+/[0-9]+(?![\w-])|\u00b1"
    r"|[\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u209f\u2150-\u215e]"
    r"|\s*(?:hundred|thousand|lakh|crore|[a-z]{1,6}illion|dozen)|\\[dt]?frac\s?\{?\s?[0-9]|\.[0-9]"
    r"|(?:[\^/×÷·*+\u2212-]|\\(?:times|cdot|div)(?![a-z]))[ \t]?\{?[0-9])"
    r"|\}[ \t]?\{[ \t]?[0-9]|:[0-9]{2}(?![0-9])|(?:,|\\[,;:]|\{,\})[0-9]{3}(?![0-9])|[\u2010-\u2013][0-9]|(?<=\})[0-9]"
    r"|(?:(?:\\[,;: ])?\\(?:text|mathrm)\s?\{\s?)?(?-i:[kKMBT]|bn)\b|e[0-9]"
)
# In front of a box: a digit or a sign that belongs to its number, or an operator after another number.
_DASH = r"\-\u2010-\u2015\u2212"
_CHANGED = re.compile(
    rf"(?:[0-9]\$?|(?<![0-9.])0\.\$?|\b(?:[Hh]alf(?:\sof)?|[Tt]wice|[Dd]ouble|[Tt]riple)[ \t$]*"
    rf"|(?<![A-Za-z])[+{_DASH}]\\?\$?|\\(?:pm|sqrt|neg)|\b(?:[Nn]egative|[Mm]inus)[ \t$\\]*"
    rf"|[0-9][ \t$]{{0,3}}(?:[+*/^×÷·{_DASH}]|\\(?:times|cdot|div))[ \t$]{{0,3}}"
    rf"|=[ \t$]{{0,3}}[{_DASH}][ \t$]{{0,3}})\Z"
)
_OR = r"\bor\b(?:\s(?:maybe|perhaps|possibly|even|else))?"
_ALTERNATIVE = re.compile(
    r"(?i)[0-9][^0-9\n]{0,20}\b(?:and\b[\s$*\\(\[{}]*"
    rf"|{_OR}(?:{_LATEX}|[a-z]\s?=|[\s$*\\(\[{{}}#])*+)$"
    rf"|(?:[0-9}}]|</answer>)(?:\\[)\]]|[\s$*.,;])*{_OR}(?:\\[(\[]|[\s$*])*\Z"
)
_NUMBER_OR = re.compile(rf"(?i)(?<![0-9.,/])([0-9][0-9,]*(?:\.[0-9]+)?)[\s$]{{1,3}}{_OR}[\s$]{{1,3}}\Z")
_BLANKS = re.compile(r"[ \t]{3,}")
_DENIED = re.compile(r"(?i)(?:\b(?:not|never)|n['\u2019]t)(?:\s(?:be|equal\sto))?[ \t$*\\(\[]*\Z")
_BULLET = re.compile(r"[ \t]*[-+*\u2022\u2023\u2043\u2010-\u2015\u2212\u25aa\u25cf\u25e6\u00b7][ \t\u00a0]+(?=\S)")
_LISTED = re.compile(rf"\n{_BULLET.pattern}")
_NEXT_BULLET = re.compile(rf"[^\n]*\n\s*{_BULLET.pattern}")
_MATH = re.compile(r"\s*(?:\$\$|\\\[)\s*")
# Between two boxes, or two tags, that offer one number each: then the last is no correction of the first.
_BETWEEN_BOXES = re.compile(rf"\}}(?:{_LATEX}|\\\\|[\s$,;/])*\Z")
_BETWEEN_TAGS = re.compile(r"</answer>\s*[,/][\s,/]*\Z")


class _UnclosedError(RefusedError):
    """A tag or box that holds a number is never closed: an answer was begun, so a later turn's does not count."""


@dataclass(frozen=True, slots=True)
class _Span:
    text: str
    complete: bool
    """Whether something after the span shows that it ended there."""


def answer_text(text: str, *, truncated: bool) -> str:
    """Return the marked text.

    Args:
        truncated: whether the text was cut off; then a marked text that reaches its end may have gone on.

    Raises:
        RefusedError: no marker, or the last one is empty, not closed, continued after it, or cut off.
    """
    for turn in next_turns(text):
        try:
            return _last(text, turn).text
        except RefusedError as refusal:
            if str(refusal) == "hedged" or isinstance(refusal, _UnclosedError):
                raise
    span = _last(text, len(text))
    if truncated and not span.complete:
        raise RefusedError("truncated")
    return span.text


def _last(text: str, end: int) -> _Span:
    starts = {literal: text.rfind(literal, 0, end) for literal in _LITERALS}
    following = end
    for _ in range(MAX_MARKERS):
        literal, start = max(starts.items(), key=lambda item: item[1])
        if start < 0:
            break
        if literal == "<answer>":
            return _tag(text, start, end)
        if literal in ("\\boxed", "\\fbox"):
            if opening := BOX.match(text, start, end):
                return _box(text, start, opening.end(), end)
        elif (begin := _line_marker(text, literal, start, end)) is not None:
            span = _line(text, begin, min(following, end))
            if span is not None and literal != "####":  # In a sentence 18! is no factorial.
                return _Span(_EXCLAMATION.sub(".", span.text), span.complete)
            if span is not None and not _HEADING.match(span.text):
                if _is_alternative(text[max(0, start - 64) : start]):
                    raise RefusedError("hedged")
                return span
            following = start
        starts[literal] = text.rfind(literal, 0, start)
    raise RefusedError("no_marker")


def _tag(text: str, start: int, end: int) -> _Span:
    begin = start + len("<answer>")
    close = text.find("</answer>", begin, end)
    if close < 0:
        raise _unclosed(text, begin, end)
    content = _enclosed(text, start, begin, close, close + len("</answer>"), end)
    return _Span(_LISTED.sub("\n", content), complete=True)


def _box(text: str, start: int, begin: int, end: int) -> _Span:
    brace = closing_brace(text, begin, end)
    if brace < 0:
        raise _unclosed(text, begin, end)
    if _CHANGED.search(text, max(0, start - 16), start):
        raise RefusedError("not_plain")
    return _Span(_enclosed(text, start, begin, brace, brace + 1, end), complete=True)


def _unclosed(text: str, begin: int, end: int) -> RefusedError:
    return (_UnclosedError if _NUMBER_FIRST.match(text, begin, min(end, begin + 64)) else RefusedError)("unclosed")


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
    listed = _listed_before(text, start)
    if _is_alternative(earlier) or _DENIED.search(earlier):
        raise RefusedError("hedged")
    alternative = _NUMBER_OR.search(earlier)
    if alternative and canonical(alternative[1]) != _number(content) and "%" not in text[after : after + 4]:
        raise RefusedError("hedged")
    rest = _BLANKS.sub("  ", text[after - 1 : min(after + 2 * MAX_TEXT, end)])
    if continued := _CONTINUED.match(rest, 1, 65):
        other = rest[continued.end() :].partition("\n")[0]
        if not continued["another"] or len(other) > MAX_TEXT or _number(other) != _number(content):
            raise RefusedError("hedged")
    if listed is not None and _number(listed) != _number(content):
        raise RefusedError("hedged")
    return content


def _is_alternative(earlier: str) -> bool:
    """Return whether what follows this text is offered besides an answer that is marked in it."""
    return any(literal in earlier for literal in _LITERALS) and bool(_ALTERNATIVE.search(earlier))


def _listed_before(text: str, start: int) -> str | None:
    """Return what the box or tag holds that this one follows in a list; None where there is none."""
    window = max(0, start - MAX_TEXT)
    earlier = text[window:start]
    if _BETWEEN_TAGS.search(earlier):
        content = earlier.rpartition("</answer>")[0].rpartition("<answer>")
        return content[2] if content[1] else None
    if not _BETWEEN_BOXES.search(earlier):
        return None
    opening = last_match(BOX, earlier)
    close = closing_brace(earlier, opening.end(), len(earlier)) if opening else -1
    return earlier[opening.end() : close] if opening and close == earlier.rfind("}") else None


def _number(text: str) -> str | None:
    """Return the number of the text, or the text itself where it has no plain one."""
    try:
        return read_number(text)
    except RefusedError:
        return text


def _line_marker(text: str, literal: str, start: int, end: int) -> int | None:
    """Return where the text after `####` or after "answer is" begins; None if this is neither."""
    if literal == "####":
        return start + len(literal)
    if start == 0 or text[start - 1] not in "aA" or text[start - 2 : start - 1].isalpha():
        return None
    phrase = _PROSE.match(text, start + len(literal), end)
    line = text.rfind("\n", 0, start) + 1
    if _HEADED.fullmatch(text, line, start - 1) and (rest := _BELOW.match(text, start + len(literal), end)):
        return rest.end()
    if phrase is None or _REMARK.match(text, phrase.end(), end):
        return None
    checked = phrase.group()[-1] in ":=\uff1a" and _CHECKED.search(text, max(0, start - 40), start - 1)
    return None if checked else phrase.end()


def _line(text: str, begin: int, end: int) -> _Span | None:
    """Return the rest of the line, or the next line that says something; None if there is no number."""
    span = _until_newline(text, begin, end)
    if re.search("[0-9]", span.text):
        return span
    position, in_math = begin, False
    for _ in range(4):
        if not _ANSWER_HEADING.fullmatch(span.text):
            return None
        position = text.find("\n", position, end) + 1
        if not position:
            return None
        span = _until_newline(text, position, end)
        if _NUMBER_FIRST.match(span.text):
            return span if in_math else _without_bullet(text, position, end, span)
        in_math = in_math or bool(_MATH.fullmatch(span.text))
    return None


def _without_bullet(text: str, position: int, end: int, span: _Span) -> _Span:
    """Return the span without the bullet of a list that has no other numbers."""
    if not _BULLET.match(span.text):
        return span
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
    return _Span(line, complete=stop < len(text) or bool(_SENTENCE_END.search(line)))
