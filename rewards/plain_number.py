"""The one plain number in a short piece of text, or why there is none.

A number is read in six steps: markup is removed (LaTeX, Markdown, HTML, GSM8K's `<<9*2=18>>`); numbers are written as
one run of digits (12 500 and 12.5 thousand as 12500); of equations that go on with each other's results the last is
kept (16 - 7 = 9, so 9 * 2 = 18); the text ends after the sentence, or before the reason, that follows the first number;
of an equation the right side is kept; then the side must hold exactly one number, and nothing around it, or around its
sign, may change its value (operators, powers, abbreviated scales) or take it back (or, not, about). Remarks in brackets
after the number are ignored unless they do the same.
"""

import re
import unicodedata

from rewards.markup import without_markup

MAX_TEXT = 1000
"""Longest text read, in characters."""

_NUMBER = re.compile(r"[0-9]+(?:,[0-9]+)*(?:\.[0-9]+)?|(?<![A-Za-z.])\.[0-9]+")
_PLAIN = re.compile(r"([-+]?)([0-9]{1,3}(?:,[0-9]{3})+|[0-9]*)(?:\.([0-9]+))?")
_CURRENCY = "$¢£¤¥฿" + "".join(map(chr, range(0x20A0, 0x20C1)))

# Characters like dashes are refused in front of a number, where they might be a sign.
_DASH_NAME = re.compile(
    "MINUS|HYPHEN|DASH|HORIZONTAL|PROLONGED|OVERLINE|LOW LINE|BOX DRAWINGS|MONOGRAM|PARAGRAPHOS|SUSPENSION"
)
_NO_DASH_NAME = re.compile("ARROW|THEREFORE|VARIATION SELECTOR|MODIFIER FITZPATRICK")

# One space, of any kind, between groups of three digits.
_SPACED = re.compile(
    r"(?<![0-9.,/:])[1-9][0-9]{0,2}(?:[ \u00a0\u2000-\u200a\u202f\u205f\u3000][0-9]{3})+(?![0-9]|,[0-9])"
)
_NOT_DIGIT = re.compile("[^0-9]")
_ZEROS = {"hundred": 2, "thousand": 3, "lakh": 5, "million": 6, "crore": 7, "billion": 9, "trillion": 12}
_SCALE_WORDS = re.compile(rf"(?i){'|'.join(_ZEROS)}")
_SCALE = rf"(?:{'|'.join(_ZEROS)})s?\b"
_SCALED = re.compile(rf"(?i)(?<![0-9])(?<![0-9][.,])((?>{_NUMBER.pattern}))\s{{0,6}}-?((?:\s?{_SCALE}){{1,2}})(?!-)")

# What explains a number before it, as 9 * 2 = 18, whose asterisk has been removed.
_OPERAND = rf"[{_CURRENCY}]?[0-9]"
_SUM = rf"{_OPERAND}(?:[0-9,.]*[0-9])?(?:\s?(?:[-+/]|\\times|\\cdot)\s?|\s{{1,4}}){_OPERAND}[^=\n]{{0,60}}"
_ABBREVIATED = ("sq", "cu", "ft", "yd", "mi", "lb", "lbs", "oz", "hr", "hrs", "min", "mins", "sec")
_UNIT_WITH_STOP = "".join(rf"(?<!\b{unit}\.)" for unit in _ABBREVIATED)
_SENTENCE_END = rf"(?<!\bMr)(?<!\bMs)(?<!\bDr)(?<!\bSt)(?<!\bMrs)(?:;|\.(?:{_UNIT_WITH_STOP}|(?=\s+[A-Z])))\s+"
_NEW_SENTENCE = re.compile(rf"{_SENTENCE_END}(?=[A-Za-z\"'(])")
_EQUATION = re.compile(rf"(?<![0-9,.]){_SUM}=")
# An equation in words: the sum of 9 and 9 is 18, 9 times 2 is 18, 12 + 6 equals 18.
_IN_WORDS = re.compile(
    rf"(?i)\A(?:([^0-9=]*\b(?:sum|product|difference)\sof\s[^0-9=]{{0,20}})(?>{_NUMBER.pattern})[^0-9=]{{0,20}}?"
    rf"\sand\s[^0-9=]{{0,20}}|([^0-9=]*)(?>{_NUMBER.pattern})[^0-9=.,;:]{{0,20}}?"
    rf"(?:\s(?:plus|minus|times|(?:divided|multiplied)\sby)\s|\s[-+/]\s|(?<=[0-9])[-+/]|\s{{2,4}})[{_CURRENCY}]?)"
    rf"(?>{_NUMBER.pattern})(?!\sof\b)[^0-9=.,;:]{{0,20}}?\s(?:is|equals)\b"
)
# A step whose result the next one goes on with: 16 - 7 = 9 eggs, so 9 * 2 = 18.
_CONJUNCTION = r"(?:and|so|then|thus|hence|therefore)\b,?\s+"
_STEP = re.compile(
    rf"(?i)[^0-9=]*+{_SUM}=[^A-Za-z0-9=]*+(?P<result>(?>{_NUMBER.pattern}))[^0-9=,;.]{{0,40}}?"
    rf"(?:[,;.]\s+(?:{_CONJUNCTION}){{0,2}}|\s(?:{_CONJUNCTION}){{1,2}})(?=(?P<next>{_SUM})=)"
)
# A number, which is not that of a list, and what explains it: 18 dollars. 9 * 2 = 18.
_EXPLAINED = re.compile(rf"([^A-Za-z0-9=]*(?![0-9][.)])(?>{_NUMBER.pattern})[^0-9=;.]{{0,40}}){_SENTENCE_END}{_SUM}=")
_RETRACTION = re.compile(
    r"(?i)[\"'(]?(?:(?:hm+|oh|um|uh|ah)[,.!\s\u2026]{1,3})?"
    r"(?:or|no|not|wait|oops|sorry|hold on|maybe|perhaps|actually|alternatively|otherwise)\b"
)
_REASON = re.compile(r"(?i),?\s(?:because|since|as|so|which|given|after|when|where|for a total)\b")
# What follows is concluded from the number, so that it is the answer: "She has 3, so there are 10 - 3 = 7." Only a tag
# or a box has several lines.
_CONCLUSION = re.compile(
    r"(?i)\n|(?:,?\s|^)(?:so|thus|hence|therefore|then|(?-i:Now)(?=[^=]*=)|for a total|in total|leaving|giving"
    r"|(?:this|that|which) (?:means|makes|gives|leaves|rounds))\b"
    r"|\A,?\s(?:as|which|after|when|where|given)\b(?=[^=]*=)"
)
_TAKEN_BACK = re.compile(r"(?i),?\s(?:which|that)\s(?:is|was)\s(?:not|wrong|incorrect|false)\b")
_BRACKETS = re.compile(r"\((?:[^()]|\([^()]*\))*\)|\[[^\[\]]*\]")
_LISTED = re.compile(rf"[^A-Za-z0-9]*((?>{_NUMBER.pattern}))[^0-9=,;]{{0,20}}[,;]\s+{_SUM}\Z")
_ENUMERATION = re.compile(r"(?i)[,;]\s|\b(?:and|or)\b")


def _one_of(words: str) -> str:
    return rf"\b(?:{'|'.join(words.split())})\b"


_DIGIT_WORDS = "one two three four five six seven eight nine ten eleven twelve"
NUMBER_WORD = (
    rf"(?:{_one_of(_DIGIT_WORDS)}|\b(?:thir|four|fif|six|seven|eigh|nine)teen\b"
    r"|\b(?:twen|thir|four?|fif|six|seven|eigh|nine)ty\b)"
)
_SCALE_WORD = re.compile(
    r"(?i)\b(?:hundred|thousand|[a-z]{1,9}illion|mill|mio|mrd|lakh|lac|crore|dozen)(?:ths|s)?\b"
    r"|\b(?:million(?:en|es)|millon(?:es)?|milh(?:\u00e3o|\u00f5es)|milliard(?:en?|s)?|mille|tausend)\b"
    r"|\b(?:\u0442\u044b\u0441(?:\u044f\u0447[\u0430-\u044f]*)?|\u043c\u0438\u043b\u043b\u0438[\u0430-\u044f]+|\u043c\u043b\u043d|\u043c\u043b\u0440\u0434)\b"
    r"|\A\s?[\ucc9c\ub9cc\uc5b5\uc870](?:\uc6d0|\W|\Z)|"
    + _one_of("halves thirds fourths fifths sixths sevenths eighths ninths tenths elevenths twelfths")
    + "|"
    + _one_of("twentieths squared cubed factorial")
    + r"|\b(?:doubled|tripled|halved|below\s(?:zero|freezing))\b"
    + r"|\band[\s-]+(?:an?|one|two|three)[\s-]+(?:half|third|quarter|fourth|fifth|eighth|tenth)"
)
_SCALE_LETTER = re.compile(
    r"\s*(?:[kKB]|M(?!&)|T(?!-[A-Za-z]|\s[Ss]hirt)|MM|[bBtT][nN]|[mM][lL]?[nN]|trn|[bm]il|thou|grand|k(?:USD|EUR|GBP))\b"
    r"(?!\.\s?[A-Za-z])"
)
_SCALE_LETTER_OF_MONEY = re.compile(r"\s*(?:mm|[mb])\b")
_NUMBER_GOES_ON = re.compile(rf"(?i)[\s,]*(?:and\s+)?(?:{NUMBER_WORD}|{_SCALE}|{_one_of('half dozen')})")
_CHANGED_AFTER = re.compile(
    rf"(?i:\s*(?:divided|multiplied|π|pi\b|{NUMBER_WORD}\s*(?:[.,;!]|$)"
    rf"|(?:times|over|plus|minus|mod|point|(?:more|less|fewer)\s+than)\s+{NUMBER_WORD}))"
    r"|-\s*$|\s-\s?[b-hj-z]\b|-[xyz]\b|\s*(?:[\^×÷·⋅±√!<>≈~&]|/(?!\s{0,3}[A-Za-z])|\+|[xX][0-9A-Fa-f]{2})"
)
_CHANGED_BEFORE = re.compile(
    r"(?i)(?:[\^/·⋅±√!&⌊⌈]|[a-z]\(|(?-i:(?<![A-Za-z'\u2019])[b-hj-z])\s?-?|"
    + _one_of(
        "half thirds? quarters? (?:fif|six|seven|eigh|nin|ten)ths? twice double triple quadruple thrice"
        " root square cube log ln sqrt exp"
    )
    + r"(?:\(|\s+(?:of|as\s[a-z]+\sas)(?:\s+the)?(?:\s*+[(\[])?|\s+the)?[\s\"'\u2018\u201c]*+"
    + r"|\b(?:half|quarter)\s+past|\A\W*(?:a\s+)?quarter\s+to"
    + r"|(?:\b(?:reciprocal|inverse|opposite|negative|per\s?cent)|%)\s+of(?:\s+the)?"
    + rf"|(?:{NUMBER_WORD}|{_SCALE}|{_one_of('dozen')})"
    r"(?:-|\s+(?:and|times|plus|minus|less|over|short\s+of|(?:divided|multiplied)\s+by))?)\s*$"
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_TEENS = ("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
_WORTH = {word: worth for worth, word in enumerate((*_DIGIT_WORDS.split(), *_TEENS), start=1)}
_WORTH |= {word: worth for worth, word in zip(range(20, 100, 10), _TENS, strict=True)}
_SPELLED = re.compile(rf"(?i){NUMBER_WORD}(?:[\s,-]*(?:\band\b|{NUMBER_WORD}|{_SCALE}))*")
# "18 students play football or basketball" offers no other number.
_OR = (
    rf"\bor\b(?=\W*(?:\Z|[0-9]|{NUMBER_WORD}|{_SCALE}|"
    + _one_of("an? so more less fewer higher lower greater above below about around thereabouts near not none zero")
    + "|"
    + _one_of("nothing neither maybe perhaps possibly even else rather twice half double dozen something anything")
    + "|"
    + _one_of("slightly just almost nearly close only under over up down some any several few much many roughly")
    + "))"
)
_HEDGE = re.compile(
    rf"(?i){_OR}|\bI\sguess\b|" + _one_of("maybe perhaps possibly probably likely approx approximately roughly")
)
_NOT = r"(?:\b(?:not|never|neither|nor|cannot)\b|n['\u2019]t\b)"
# A sentence may deny something else, "18 students did not vote".
_DENIED_BEFORE = re.compile(
    rf"(?i){_NOT}(?:\s+(?:be|equal|to|necessarily|exactly|quite|just|only|simply|really|actually))*\s*$"
)
_DENIED_AFTER = re.compile(
    rf"(?i)\W*(?:{_NOT}|(?:(?:which|that|this)\s+)?(?:is|was|has|would\sbe)\s*(?:{_NOT}|(?:wrong|incorrect|false)\b)"
    r"|(?:wrong|incorrect|false)\W*$)"
)
_DENIED_IN_REMARK = re.compile(rf"(?i){_NOT}(?!\s(?:includ|count)ing\b)|\b(?:wrong|incorrect|guess|unsure|estimate)\b")
_HEDGE_BEFORE = re.compile(
    "(?i)"
    + _one_of("nearly almost circa")
    + r"|\b(?:about|around)(?:\s+(?:(?:a|the)\b\s*)?(?:(?:total|sum|product|difference)(?:\s+of)?)?)?[\s:\"'+-]*$"
    + r"|\b(?:either|both|between)\s*$|\b(?:not\s(?:sure|certain)|unsure),?\s*$"
    + r"|\b(?:(?:any|every)thing|except|besides|but|near|approaching"
    + r"|(?:could|might|may)\s+be|close\s+to|far\s+from|short\s+of|ca?\.)\s*$"
    + r"|\b(?:at least|at most|up to|(?:more|less|fewer|greater|other) than)\b"
    + r"(?!\s+\S+.*\b(?:by|is|are|was|were|equals)\W*$)"
    + r"|(?<!\bleft\s)\b(?:over|under)\s*$|[<>≈~≤≥≠\u223c≃≅]"
)
_BESIDE = re.compile(r"(?i)\b(?:below|above)\s*$")
_HEDGE_AFTER = re.compile(
    r"(?i)\s*\?|\A[\s-]*ish\b|\bgive or take\b|\bat (?:least|most)\b"
    + r"|\band\s(?:up|more|above)\W*$|(?<![A-F+])\+\s*$|"
    + _one_of("plus minus")
    + rf"|\band\s+{NUMBER_WORD}"
)
_MINUS_WORD = re.compile(r"(?i)\b(?:negative|minus)[\s:\"']*$")
_CODE = "(?:USD?|Rs|INR|EUR|GBP|CAD|AUD|NZD|HKD|SGD|CHF|JPY|CNY|RMB|MXN|BRL|SEK|NOK|DKK|PLN|ZAR)"
_CURRENCY_CODE = re.compile(rf"(?:^|[^A-Za-z]){_CODE}$")
_MONEY_AFTER = re.compile(rf"(?i)\s*(?:mm|[mb])\s*(?:[{_CURRENCY}]|{_CODE}\b|(?:dollar|euro|pound|rupee)s?\b)")
_PER_SCALE = re.compile(r"(?i)\A\s*(?:per|a|each|every|/|for\s(?:an?|one))\s*(?:dozen|hundred|thousand)\b")
_OPENING = r"\s(\[\"'\u2018\u201a\u201b\u201c\u201e\u201f\u00ab\u2039\u300c"
_CLOSING = ")]\"'\u2019\u201d\u00bb"
# From where they begin, as a search from each of many signs would take quadratic time.
_CURRENCY_BEFORE = re.compile(
    rf"(?<![{_CURRENCY}{_OPENING}])(?:(?<![A-Za-z])[A-Z]{{1,2}}\$|[{_CURRENCY}{_OPENING}]|(?<![A-Za-z]){_CODE}\.?)+$"
)


class RefusedError(Exception):
    """There is no plain number; the message is a word of `rewards.gsm8k.DETAILS`."""


def canonical(text: str) -> str | None:
    """Return a plain number in its shortest form, "1,234.50" as "1234.5"; None for anything else."""
    match = _PLAIN.fullmatch(text)
    if match is None or not (match[2] or match[3]):
        return None
    whole = match[2].replace(",", "").lstrip("0") or "0"
    fraction = (match[3] or "").rstrip("0")
    digits = f"{whole}.{fraction}" if fraction else whole
    return f"-{digits}" if match[1] == "-" and digits != "0" else digits


def read_number(text: str) -> str:
    """Return the plain number of the text, as `canonical` writes it.

    Raises:
        RefusedError: there is none, more than one, or one that is changed or taken back.
    """
    if len(text) > MAX_TEXT:
        raise RefusedError("not_plain")
    text = _SPACED.sub(lambda spaced: _NOT_DIGIT.sub("", spaced.group()), without_markup(text))
    text = _without_steps(_IN_WORDS.sub(r"\1\2=", _SCALED.sub(_written_out, text)))
    answer, rest = _split_reason(text)
    side = _right_side(_without_equations_in_remarks(answer))
    match = _NUMBER.search(side)
    if match is None:
        raise RefusedError("no_number")
    before, after = side[: match.start()], _without_remarks(side[match.end() :], match.group())
    after = _PER_SCALE.sub(" ", after)
    if _NUMBER.search(after):
        raise RefusedError("several_numbers")
    sign, before = _without_sign(before)
    _check_surroundings(before, after)
    # Not "18. She has 3, so she keeps 15."
    if _EQUATION.search(answer) or re.search("[A-Za-z]", before + after) or not _NEW_SENTENCE.match(rest):
        _check_conclusion(answer, rest, match.group())
    value = canonical(sign + match.group())
    if value is None:
        raise RefusedError("not_plain")
    return value


def _written_out(scaled: re.Match[str]) -> str:
    """Return the digits of "1.45 million"; as it is where that is no plain number, or goes on in words."""
    number = canonical(scaled[1])
    if number is None or _NUMBER_GOES_ON.match(scaled.string, scaled.end()):
        return scaled.group()
    zeros = sum(_ZEROS[word.lower()] for word in _SCALE_WORDS.findall(scaled[2]))
    whole, _, fraction = number.partition(".")
    digits = whole + fraction[:zeros].ljust(zeros, "0")
    return f"{digits}.{fraction[zeros:]}" if fraction[zeros:] else digits


def _without_steps(text: str) -> str:
    """Return the text from the last on of some equations that go on with each other's results.

    One that goes back to a number of the step before checks it: 9 * 2 = 18, and 18 / 2 = 9.
    """
    while (step := _STEP.match(text)) and not _HEDGE.search(step.group()):
        if canonical(step["result"]) not in map(canonical, _NUMBER.findall(step["next"])):
            break
        then = _NUMBER.search(text, step.end("next"), step.end("next") + 40)
        if then and canonical(then.group()) in map(canonical, _NUMBER.findall(step.group().rpartition("=")[0])):
            break
        text = text[step.end() :]
    return text


def _split_reason(text: str) -> tuple[str, str]:
    """Return the text up to the end of the sentence, or the reason, after the first number; and the rest."""
    first = _NUMBER.search(text)
    if first is None:
        return text, ""
    end = len(text)
    sentence = _NEW_SENTENCE.search(text, first.end())
    if (explained := _EXPLAINED.match(text)) and (sentence is None or explained.end(1) < sentence.start()):
        return explained[1], text[explained.end(1) :]
    if sentence is not None:
        if _RETRACTION.match(text, sentence.end()):
            raise RefusedError("hedged")
        end = sentence.start()
    reason = _REASON.search(text, first.end(), end)
    end = reason.start() if reason else end
    return text[:end], text[end:]


def _check_conclusion(answer: str, rest: str, number: str) -> None:
    """Refuse a number that the rest takes back, or from which it goes on to conclude another."""
    if _TAKEN_BACK.match(rest):
        raise RefusedError("hedged")
    stated = set(map(canonical, _NUMBER.findall(answer)))
    for step in _EQUATION.finditer(rest) if _EQUATION.search(answer) else ():
        result = _NUMBER.search(rest, step.end())
        goes_on = canonical(number) in map(canonical, _NUMBER.findall(step.group()))
        if goes_on and result and canonical(result.group()) not in stated:
            raise RefusedError("several_numbers")
    conclusion = _CONCLUSION.search(rest)
    if conclusion is None:
        return
    concluded = _NUMBER.findall(rest[conclusion.end() :].rpartition("=")[2])
    if concluded and canonical(number) not in map(canonical, concluded):
        raise RefusedError("several_numbers")


def _without_equations_in_remarks(text: str) -> str:
    """Return the text whose remarks after the first number have no equals sign, as it is the side of no equation."""
    first = _NUMBER.search(text)
    end = first.end() if first else len(text)
    return text[:end] + _BRACKETS.sub(lambda remark: remark.group().replace("=", ":"), text[end:])


def _right_side(text: str) -> str:
    if re.search(r"[=<>!]=|=<", text):
        raise RefusedError("not_plain")
    *left, right = text.split("=")
    if any(_ENUMERATION.search(side) for side in left[1:]) or any(
        _HEDGE.search(side) or _DENIED_BEFORE.search(side) for side in left
    ):
        raise RefusedError("hedged")
    stated = {canonical(bare) for side in left if _NUMBER.fullmatch(bare := side.strip(f" \t\r\n()%{_CURRENCY}"))}
    numbers = {canonical(number.group()) for number in _NUMBER.finditer(right)}
    if left and (listed := _LISTED.match(left[0])):
        operands = {canonical(number) for number in _NUMBER.findall(left[0][listed.end(1) :])}
        stated |= {canonical(listed[1])} - operands
    if stated - numbers:
        raise RefusedError("several_numbers")
    return right


def _without_remarks(after: str, number: str) -> str:
    """Return the text after the number without brackets; a bracket that offers another number or a hedge is
    refused."""
    for bracket in _BRACKETS.findall(after):
        content = bracket[1:-1].strip(f" \t.:{_CURRENCY}?%")
        other = _NUMBER.fullmatch(content) and canonical(content) != canonical(number)
        denied = _HEDGE.search(content) or _DENIED_IN_REMARK.search(content)
        own = set(map(canonical, _NUMBER.findall(content))) <= {canonical(number)}  # not 60 (5 dozen)
        number_word = (own and _SCALE_WORD.search(content)) or _SPELLED.fullmatch(content)
        if other or denied or "?" in bracket or (number_word and not _spells(content, number)):
            raise RefusedError("hedged")
    return _BRACKETS.sub(" ", after)


def _spells(words: str, number: str) -> bool:
    """Return whether words spell this number out: "seventy thousand"."""
    if not _SPELLED.fullmatch(words):
        return False
    total = group = 0
    for word in re.findall("[a-z]+", words.lower()):
        if zeros := _ZEROS.get(word.removesuffix("s")):
            group = max(1, group) * 10**zeros
            if zeros > 2:
                total, group = total + group, 0
        else:
            group += _WORTH.get(word, 0)
    return canonical(number) == str(total + group)


def _check_surroundings(before: str, after: str) -> None:
    words, behind = _CURRENCY_BEFORE.sub("", before), after.lstrip(f"{_CLOSING}{_CURRENCY}")
    hedged = _HEDGE.search(before) or _HEDGE_BEFORE.search(words) or _BESIDE.search(before)
    hedged = hedged or _HEDGE.search(after) or _HEDGE_AFTER.search(behind)
    if hedged or _DENIED_BEFORE.search(words) or _DENIED_AFTER.match(after):
        raise RefusedError("hedged")
    money = re.search(rf"[^{_OPENING}]", before[len(words) :]) or _MONEY_AFTER.match(after)
    glued = before[-1:].isalpha() and not _CURRENCY_CODE.search(before)
    changed = (
        glued
        or "\\" in before
        or "\\" in after
        or _CHANGED_BEFORE.search(before.rstrip(f" {_CURRENCY}"))
        or _CHANGED_AFTER.match(behind)
        or _SCALE_LETTER.match(behind)
        or _SCALE_WORD.search(after)
        or (money and _SCALE_LETTER_OF_MONEY.match(after))
    )
    # Digits that are not ASCII, fractions like ½, superscripts: int() and float() understand some of them.
    foreign = any(unicodedata.numeric(c, None) is not None for c in before + after if not c.isascii())
    foreign = foreign or bool(unicodedata.combining(after[:1] or " "))  # struck through
    if changed or foreign:
        raise RefusedError("not_plain")


def _without_sign(before: str) -> tuple[str, str]:
    """Return the sign in front of the number and the text without it: "-$18", "$-18", "minus 18".

    The dash of "Total - 18" is none.
    """
    head = _CURRENCY_BEFORE.sub("", before)
    tail = before[len(head) :]
    if word := _MINUS_WORD.search(head):
        return "-", head[: word.start()] + tail
    if _is_other_dash(head[-1:]):
        raise RefusedError("not_plain")
    if not head.endswith(("-", "+")):
        return "", before
    sign, head = head[-1], head[:-1]
    spaced = any(map(str.isspace, tail)) and head.rstrip()[-1:].isalpha()
    if not _CURRENCY_CODE.search(head) and (head[-1:].isalpha() or spaced):
        if sign == "+":
            raise RefusedError("not_plain")
        return "", before
    if _CURRENCY_BEFORE.sub("", head).endswith(("-", "+")):
        raise RefusedError("not_plain")
    return sign, head + tail


def _is_other_dash(character: str) -> bool:
    if not character or character.isascii():
        return False
    name = unicodedata.name(character, "")
    symbol = unicodedata.category(character) in ("Pd", "Pc", "Sm", "Sk", "Mn", "Me")
    return bool(_DASH_NAME.search(name)) or (symbol and not _NO_DASH_NAME.search(name))
