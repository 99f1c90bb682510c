"""Which sentences with the word "answer" mark one: "The answer is 18.", "Answer: 18", but not "The answer is correct".

Each marker has a rank, and of a completion's markers the last one of the lowest rank counts.
"""

import re
from functools import lru_cache

from rewards.plain_number import MAX_TEXT, RefusedError, read_number

DIRECT, INDIRECT, REMARK, MENTION, CLAUSE = range(5)
"""A number or a sentence that gives one; what may be a remark (divisible by 9); what is one, but may have the answer
(let me check the answer: 18); an empty box or tag. CLAUSE: `rank_of_clause` says which of the first two it is."""

_LONGEST_CLAUSE = 300
MARKDOWN = str.maketrans("", "", '*_`"\\')
"""What is passed over in sentences and headings."""
_WORD = r"(?:\s[a-z]{1,20}+)"
_PROSE = re.compile(
    r"(?i)[*_`\"']{0,3}(?:\s{1,3}\([^()\n]{0,60}\))?"
    rf"(?:,?\s{{1,3}}(?:(?:to|for|of)\s(?:(?:the|this|your){_WORD}{{1,3}}|question\s[0-9]{{1,3}})|(?P<unit>in){_WORD}{{1,2}}"
    rf"|(?P<who>(?:that\s)?(?:we|I|you)){_WORD}{{1,4}}|therefore|then|thus|hence|here),?){{0,2}}"
    r"(?:\s{0,3}[*_`]{0,3}[:=\uff1a]|\s{1,3}(?:is|was|equals|(?:would|will|should|must)(?:\s(?:therefore|then|thus))?\sbe)"
    r"\b(?!n[\u2019']t)(?:\s{0,3}[:\uff1a])?)"
)
_DIRECT = re.compile(
    r"(?i)(?:\\[a-z]+|&[a-z]+;|</?[a-z]+>|[^A-Za-z0-9]|\b(?:[b-hj-z]|[a-z]{2,16}ly|that|it|this|is|be|now|then|so|thus"
    r"|hence|therefore|just|indeed|still|an?|the|total(?:\sof)?|(?:equal|close)\sto|also|again|about|around|approx|maybe"
    r"|perhaps|either|neither|both|between|almost|not|never|rather|instead|however|in\sfact|of\scourse|number|up\sto"
    r"|most|very|at\s(?:least|most)|(?:more|less)\sthan|over|under|half(?:\sof)?|twice|positive|negative|minus"
    r"|Rs|(?-i:[A-Z]{2,3}))\b){0,120}+[0-9]"
)
"""What "answer is" says of a number that comes first, and not words of a remark."""
_REMARK = re.compile(
    r"(?i)[\s:*_]{0,8}(?:[0-9]{1,3}\s?%\s)?(?:correct|right|wrong|based|obtained|consistent|reasonable|verified"
    r"|confirmed|derived|calculated|computed|found|determined|reached|given\sby"
    r"|(?:valid|accurate|checked|certain|sure|rounded|given)"
    r"(?![^\n]{0,60}[,:]\s{0,2}[$£€]?[0-9][0-9,.]*+[\s*.]*(?:\n|\Z))"
    r"|positive(?!\s[0-9])|in\s(?:dollars|cents|hours|minutes|units)(?!:))\b"
    r"(?!\sto\sbe\s(?!correct|right|valid|accurate|consistent|reasonable)|\sas\s[^A-Za-z\n]*[0-9])"
)
_CLAUSE = re.compile(
    r"(?i)[\s*_\"']*(?:that|he|she|it|they|we|I|you|there|his|her|its|their|our|your|an?|each|all|(?-i:[A-Z][a-z]+)"
    r"|(?:rounded|accurate)\sto|[a-z]{4,12}\s(?:to\sbe|as(?=\s[^A-Za-z\n]*[0-9])))\b"
    r"|[\s*_]*(?:incorrect|not\s(?:correct|right|accurate|valid))[*_]*[.,;:]\s"
    r"|[^.\n:=]{1,60}:[^\w\n=]*[0-9][0-9,.]*[^\w\n=]*(?:\n|\Z)"
)
"""A sentence that answers: "the answer is" that she makes $18, given as 18, as follows: 18."""
_PASSED = re.compile(
    r"(?i)[\s*_]{0,8}(?:correct|right(?!\snow|,)|wrong|verified|confirmed|valid|accurate)\b"
    r"(?![^\n]{0,200},\s[$£€]?[0-9][0-9.,]*+[\s*.]*(?:\n|\Z))"
)
"""A remark after a colon: Answer: correct, since 18 / 2 = 9."""
_NOT_ASSERTED = re.compile(
    r"(?i)\b(?:wrong|incorrect|confidence\sin(?:\s(?:the|this|my))?"
    r"|(?:if|suppose|assum(?:e|ing))(?:\sthat)?(?:\s(?:the|my|your))?)[ \t]\Z"
)
"""What makes "answer is" before it none: if the answer is, the wrong answer is, my confidence in this answer is."""
_IF_BEFORE = re.compile(r"(?i)\bif\b[^.!?\n]*\Z")
_OF_A_PART = re.compile(r"(?i)\b(?:first|second|third|extra|bonus|other|previous)\b")
_ABOUT_ANSWER = re.compile(
    r"(?i)\b(?:check(?:ed|ing)?|verif(?:y|ied|ying)|in|about)[ \t](?:(?:the|my|our|this)[ \t]){0,2}(?:final[ \t])?\Z"
)
_DOUBT = re.compile(
    r"(?i)(?:\b(?:I|we)(?:\s[a-z]{2,12}ly)?\sdoubt|(?:n['\u2019]t|\bnot)\s(?:think|believe|sure|true|certain)"
    r"|\b(?:maybe|perhaps|probably|possibly|I\sguess),?)"
    r"(?:[ \t](?:that|if|whether|the|my|our|final|correct)){0,3}[ \t]\Z"
)

_CONCLUDING = re.compile(r"(?i)\b(?:(?:so|thus|hence|therefore)\b,?\s(?:(?:the|my|our)\s)?(?:final\s)?|final\s)\Z")
"""In front of "answer is" it shows that a sentence answers, whatever its words."""
_CORRECTING = re.compile(r"(?i)\b(?:wait|actually|mistake|oops|sorry|correction|instead)\b")
"""In front of "the answer is" it shows that this is no remark on an earlier answer."""


def prose_marker(text: str, after: int, before: str, end: int) -> tuple[int, int] | None:
    """Return where what "answer is" says begins, and its rank; None if this marks nothing.

    Args:
        after: where the word "answer" ends.
        before: some text in front of it.

    Raises:
        RefusedError: the answer is doubted.
    """
    phrase = _PROSE.match(text, after, end)
    if phrase is None:
        return None
    said, begin, before = phrase.group(), phrase.end(), before.translate(MARKDOWN)
    colon, near = said[-1] in ":=\uff1a", min(end, begin + MAX_TEXT)
    if phrase["who"] and (colon or said.endswith("was")):
        return None  # To find the answer, we subtract: 16 - 7 = 9
    if colon and _ABOUT_ANSWER.search(before):
        return begin, REMARK
    if (_PASSED if colon else _REMARK).match(text, begin, near) or _NOT_ASSERTED.search(before):
        return None
    if _DOUBT.search(before):
        raise RefusedError("hedged")
    direct = colon or _CORRECTING.search(before) or _DIRECT.match(text, begin, near)
    on_condition = "would" in said and (
        _IF_BEFORE.search(before) or re.search(r"\bif\b", text[begin:near].partition("\n")[0])
    )
    if phrase["unit"] or on_condition or _OF_A_PART.search(said):
        return begin, INDIRECT
    if not direct and not _CONCLUDING.search(before) and not _CLAUSE.match(text, begin, near):
        return begin, INDIRECT
    return begin, DIRECT if direct else CLAUSE


@lru_cache(maxsize=512)  # it is asked for again where a next turn may begin
def rank_of_clause(sentence: str) -> int:
    """Return whether a sentence gives one number, and be it with a hedge, and so counts as a number alone does."""
    if len(sentence) > _LONGEST_CLAUSE:
        return INDIRECT
    try:
        read_number(sentence)
    except RefusedError as refusal:
        return DIRECT if str(refusal) == "hedged" else INDIRECT
    return DIRECT
