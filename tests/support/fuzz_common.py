"""What the checks of files share: a reader's own error is an answer, anything else a finding."""

from collections.abc import Callable
from typing import Any

from eggroll_llm.errors import UserError

SECONDS = 1.0
"""Processor time in which a file of some kilobytes is read."""
DEEP = 1200
"""Levels, more than a parser can take that calls itself for each."""
HARD_JSON = [
    *(b"[" * depth + b"]" * depth for depth in (90, 300, 900, 980, DEEP)),
    *(b'{"a":' * depth + b"1" + b"}" * depth for depth in (90, 300, 900, 980, DEEP)),
    *(b"9" * 4000, b"9" * 4500, b"1" + b"0" * 400, b"1e999", b"-0", b"NaN"),
    *(b'"\\ud800"', b"null", b"true", b"[]", b"{}"),
]
"""Values at and beyond what Python's reader, writer and floats can hold."""


def refused(read: Callable[[], Any], error: type[UserError]) -> Any:
    """What is read, or None where that is refused with an error of exactly this class, which says something."""
    try:
        return read()
    except error as refusal:
        if type(refusal) is not error or not str(refusal).strip():
            raise
        return None
