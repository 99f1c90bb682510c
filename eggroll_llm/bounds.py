"""Bounds of settings: written at the field, as `Annotated[int, Ge(1)]`, and checked here."""

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, get_type_hints

from annotated_types import Ge, Gt, Le, Lt

_KINDS: dict[type, tuple[str, Any, str, str]] = {
    Ge: ("ge", operator.ge, "must be at least {}", "{} or more"),
    Gt: ("gt", operator.gt, "must be above {}", "more than {}"),
    Le: ("le", operator.le, "must be at most {}", "{} or less"),
    Lt: ("lt", operator.lt, "must be below {}", "less than {}"),
}
"""Kind of bound -> where its limit is, how it compares, and its wording as a problem and as a remedy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Violation:
    """A setting that is out of bounds."""

    field: str
    value: float
    problem: str
    """The rule that is broken, such as "must be at least 1"."""
    remedy: str
    """What the field may be set to, such as "1 or more"."""


def violations(settings: object) -> Iterator[Violation]:
    """Yield the fields of a dataclass that are out of bounds. Nested dataclasses are not looked at."""
    kind: Any = type(settings)
    for field, bounds in _bounds(kind).items():
        value = getattr(settings, field)
        for bound in bounds:
            name, holds, problem, remedy = _KINDS[type(bound)]
            limit = getattr(bound, name)
            if not holds(value, limit):
                said = "a positive number" if bound == Gt(0) else remedy.format(limit)
                yield Violation(field=field, value=value, problem=problem.format(limit), remedy=said)


def check_bounds(settings: object) -> None:
    """Raise ValueError for the first field that is out of bounds."""
    for found in violations(settings):
        raise ValueError(f"{found.field} = {found.value!r}: {found.problem}")


@cache
def _bounds(kind: Any) -> dict[str, tuple[Any, ...]]:
    hints = get_type_hints(kind, include_extras=True)
    return {field: hint.__metadata__ for field, hint in hints.items() if hasattr(hint, "__metadata__")}
