"""Untrusted text in Markdown: code spans and fences that show it, whatever is in it."""

import re


def plain(text: str) -> str:
    """Return the text in one line."""
    return " ".join(text.split())


def code(text: str) -> str:
    """Return a code span."""
    text = plain(text)
    ticks = "`" * (_longest_run(text) + 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def fenced(text: str, language: str) -> str:
    """Return a code block of lines that end in a newline."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text}{fence}"


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
