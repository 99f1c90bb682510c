"""What is no part of a number's text: LaTeX, Markdown, HTML, and characters that only look different."""

import html
import re

DASHES = "\u02d7\u2010\u2011\u2012\u2013\u2014\u2015\u207b\u2212\u2796\ufe58\ufe63\uff0d"
"""Hyphens, dashes and minus signs: in front of a number each is a sign, between two a minus."""
_INVISIBLE = dict.fromkeys([0xFEFF, *range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x2065)], " ")
_CHARACTERS = str.maketrans(_INVISIBLE | dict.fromkeys(map(ord, DASHES), "-") | {0xD7: "*", 0xF7: "/", 0xFF0B: "+"})
_UNIT = (
    "(?:[cdkm]?m|(?:[cdkm]|centi|deci|kilo|milli)?(?:meter|metre)s?|units?|feet|foot|inch(?:es)?|yards?|miles?"
    "|ft|in|yd|mi)"
)
_MARKUP: list[tuple[re.Pattern[str], str]] = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"<<[^<>]{0,200}=[^<>]{0,200}>>", ""),
        # Mathematics, not money.
        (r"(?<![\\$])\$(?=[^\s$])([^$\n]{0,200}\\[^$\n]{0,200})(?<=[^\s\\])\$(?![0-9$])", r"\1 "),
        (r"(?i)<(?:del|strike|sub)>(?=[^<]{0,20}[0-9])", "~"),
        (r"<{1,2}([^<>=A-Za-z]{0,20}[0-9][^<>=]{0,60})>{1,2}", r" \1 "),  # a placeholder of the prompt, copied
        (
            r"(?<=[A-Za-wz])[\s}$.]{0,3}(?:\^\s?[{(]?\s?(?:\\text\s?\{)?-?[1-4](?![0-9])\s?[})]{0,2}|[²³]"
            r"|\\textsuperscript\s?\{[23]\}|<sup>[23]</sup>)",
            " ",
        ),
        (r"(?<=[A-Za-wz])\*\*[23]\b(?!\*)", " "),  # no bold number
        (rf"(?<=[0-9\s]){_UNIT}[23]\b", " "),
        (rf"(?i)(?<=[0-9\s]){_UNIT}\s(?:squared|cubed)\b", " "),
        (r"</?[A-Za-z][^<>]{0,60}>|<\|[^<>|]{0,30}\|>", " "),
        (r"(?:\\text\s?)?\{\\?,\}", ","),
        (r"\\!", ""),
        (r"(?<=[0-9])\\(?:[,:; ]|thinspace\s?)(?=[0-9]{3}(?![0-9]))", ","),
        (r"\^\s?\{?\s?\\circ\s?\}?|\\(?:text)?degree(?![A-Za-z])", " degrees "),
        (
            r"\\(?:text(?:bf|it|rm|sf|tt)?|math(?:rm|bf|it|sf|tt)|boldsymbol|operatorname|bm|[mh]box|emph|underline|unit"
            r"|f?box(?:ed)?)\s?(?=\{)",
            " ",
        ),
        (r"\\[dt]?frac(?=[\s{}A-Za-z]{2,60}(?:[^\s{}A-Za-z0-9]|\Z))", " "),
        (r"(?<=[A-Za-z])\}?\s?\\cdot(?=[\s{]{0,3}[A-Za-z])", " "),
        (r"\\(?:text)?color\s?\{[A-Za-z]{1,20}\}", " "),
        (r"\\(?:pounds|euro|textdollar|rm|bf|it|sf|tt|small|[lL]arge|LARGE|[hH]uge)(?![A-Za-z])", " "),
        (r"\\(?:left|right|displaystyle|quad|qquad)(?![A-Za-z])|\\[,:; ()\[\]\\]", " "),
        (r"(?:(?<=[0-9}])|(?<=\\\$))~|(?<=\{)~(?=[A-Za-z])", " "),
        (r"\\(?=[$%#&_])", ""),
        (r"[*_`{}#|]", " "),
        (r"=+>|-+>|[→⇒⟹]", "="),
    ]
]


def without_markup(text: str) -> str:
    """Return the text without markup: what meant nothing is a space, and dashes and operators are ASCII."""
    text = html.unescape(text).translate(_CHARACTERS)
    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)
    return text
