"""Parts of a page from the templates beside this file; every text that comes from a run is untrusted.

The markup is in parts.html and report.html; jinja2 escapes everything inserted there, after `_finalize` has made
control and direction characters visible. A content security policy forbids the rest.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from eggroll_llm.system.terminal import inert_lines
from eval.tables import Grid

HERE = Path(__file__).parent
TEXT_LIMIT = 4000  # characters of one text; a completion can be a megabyte
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def inert_text(value: object, limit: int = TEXT_LIMIT) -> Markup:
    """Return text for HTML in which nothing acts on a browser or on the order of letters; its lines are kept."""
    return escape(inert_lines(str(value), limit))


def _finalize(value: object) -> Markup:
    """Make what a template prints inert, unless it is markup already."""
    return value if isinstance(value, Markup) else inert_text(value)


_TEMPLATES = Environment(
    loader=FileSystemLoader(HERE),
    autoescape=True,
    finalize=_finalize,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_PARTS: Any = _TEMPLATES.get_template("parts.html").module
"""The macros of parts.html; each returns Markup."""


def render(
    kind: str,
    title: str,
    headline: Markup,
    body: Iterable[Markup],
    *,
    script: str = "",
    footer: str = "This page is complete in itself: it loads nothing and runs no script.",
) -> str:
    """Return a page. One with a `script`, which is ours, needs a policy in the header of the answer that carries it."""
    return _TEMPLATES.get_template("report.html").render(
        kind=kind,
        title=title,
        policy="" if script else POLICY,
        style=Markup((HERE / "report.css").read_text(encoding="utf-8")),
        headline=headline,
        parts=[part for part in body if part],
        script=Markup(script),
        footer=footer,
    )


def part(name: str, *values: object) -> Markup:
    """Return a part of a page, made by the macro `name`."""
    return Markup(getattr(_PARTS, name)(*values).strip("\n"))


def section(title: str, *parts: Markup) -> Markup:
    """Return a section with the parts that are not empty; nothing when all are."""
    shown = [part for part in parts if part]
    return part("section", title, shown) if shown else Markup()


def table(grid: Grid, shares: Sequence[float] = ()) -> Markup:
    """Return a table; `shares` (0 to 1) are drawn as bars next to its rows."""
    return part("table", grid, shares)
