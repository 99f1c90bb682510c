"""What the checks of files share: a reader's own error is an answer, anything else a finding."""

from collections.abc import Callable
from typing import Any

from eggroll_llm.errors import UserError

SECONDS = 1.0
"""Processor time in which a file of some kilobytes is read."""
DEEP = 1200
"""Levels, more than a parser can take that calls itself for each."""


def refused(read: Callable[[], Any], error: type[UserError]) -> Any:
    """What is read, or None where that is refused with an error of exactly this class, which says something."""
    try:
        return read()
    except error as refusal:
        if type(refusal) is not error or not str(refusal).strip():
            raise
        return None
