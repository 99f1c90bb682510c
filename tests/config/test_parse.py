# ruff: noqa: E501  (messages are compared whole, one a line)
"""Tables to dataclasses: types, refusals, field docs."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import pytest

from eggroll_llm.config.help import field_docs
from eggroll_llm.config.parse import parse_table
from eggroll_llm.config.toml import Origin
from eggroll_llm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Inner:
    """Options within options."""

    depth: int = 1
    """How deep."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """A task's options, as a task would declare them."""

    name: str
    """A name."""
    sizes: tuple[int, ...] = (1, 2)
    """Some sizes."""
    pair: tuple[int, float] = (0, 0.0)
    limit: int = 0
    style: Literal["a", "b"] = "a"
    level: int | str = 0
    extra: Mapping[str, float] = dataclasses.field(default_factory=dict)
    inner: Inner = dataclasses.field(default_factory=Inner)


def test_parse_table_converts_every_supported_type() -> None:
    table = {
        "name": "n", "sizes": [3], "pair": [1, 2], "limit": 5, "style": "b", "level": "high",
        "extra": {"k": 1}, "inner": {"depth": 2},
    }  # fmt: skip
    parsed = parse_table(Options, table, Origin(name="r.toml"), where="task_options")
    assert parsed == Options(
        name="n", sizes=(3,), pair=(1, 2.0), limit=5, style="b", level="high", extra={"k": 1.0},
        inner=Inner(depth=2),
    )  # fmt: skip
    assert type(parsed.extra["k"]) is float
    assert parse_table(Options, {"name": "n"}, Origin(name="r.toml")) == Options(name="n")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "r.toml:1: o.name is missing. Add name = <a string in quotes> in [o]."),
        ({"name": "n", "sizes": 3}, "r.toml:2: o.sizes = 3 is an integer, but an array is expected. Write sizes = [...]."),
        ({"name": "n", "sizes": [1, "2"]}, 'r.toml:2: o.sizes[1] = "2" is a string, but an integer is expected. '
         "Remove the quotes: 2."),
        ({"name": "n", "pair": [1]}, "r.toml:1: o.pair = [1] has 1 entries, but exactly 2 are expected."),
        ({"name": "n", "limit": "5"}, 'r.toml:1: o.limit = "5" is a string, but an integer is expected. Remove the quotes: 5.'),
        ({"name": "n", "limit": True}, "r.toml:1: o.limit = true is a boolean, but an integer is expected. "
         "Write limit = <an integer>."),
        ({"name": "n", "inner": {"dept": 1}}, "r.toml:1: unknown key o.inner.dept. Did you mean o.inner.depth?"),
        ({"name": "n", "depth": 1}, "r.toml:1: unknown key o.depth. Did you mean o.inner.depth?"),
        ({"name": "n", "inner": 1}, "r.toml:1: o.inner = 1 is an integer, but o.inner is a table. Write a table [o.inner] with "
         "keys from: depth."),
        ({"name": "n", "style": True}, 'r.toml:1: o.style = true is not a valid choice. Valid: "a", "b".'),
    ],
)  # fmt: skip
def test_parse_table_refusals(table: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as info:
        parse_table(Options, table, Origin(name="r.toml", text="[o]\nsizes = 3\n"), where="o")
    assert str(info.value) == message


def test_docs_are_the_strings_under_the_fields() -> None:
    assert field_docs(Options) == {"name": "A name.", "sizes": "Some sizes."}
    assert field_docs(Inner) == {"depth": "How deep."}
