"""The sentence under a dataclass field, as help text.

Python discards such strings, so they are read from the source, and only when `--help` needs them.
"""

import ast
import dataclasses
import inspect
import textwrap
import types
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from eggroll_llm.config.parse import field_types
from eggroll_llm.config.toml import format_value


@dataclass(frozen=True, kw_only=True, slots=True)
class FieldHelp:
    """One setting, for `--help`."""

    key: str
    """Dotted key."""
    kind: str
    """Type as a user would say it, or the choices."""
    default: str
    """Default as TOML; empty without one."""
    doc: str
    """The sentence under the field."""


def field_docs(cls: type) -> dict[str, str]:
    """Field name -> the string literal after the field in the source of the class, where there is one."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        definition = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(definition, ast.ClassDef)
        for statement, following in zip(definition.body, definition.body[1:], strict=False):
            if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
                continue
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                docs[statement.target.id] = inspect.cleandoc(str(following.value.value))
    return docs


def field_help(cls: type, where: str = "") -> list[FieldHelp]:
    """Return the help of every setting of a configuration dataclass, nested ones included, in order."""
    docs, kinds = field_docs(cls), field_types(cls)
    rows: list[FieldHelp] = []
    for field in dataclasses.fields(cls):
        key, kind = f"{where}.{field.name}" if where else field.name, kinds[field.name]
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            rows += field_help(kind, key)
            continue
        default = "" if field.default is dataclasses.MISSING else format_value(field.default, key)
        rows.append(FieldHelp(key=key, kind=_kind_name(kind), default=default, doc=docs.get(field.name, "")))
    return rows


def _kind_name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    if get_origin(kind) is types.UnionType:
        return " or ".join(map(_kind_name, get_args(kind)))
    names = {int: "integer", float: "number", bool: "true|false", str: "string"}
    return names.get(kind, "array" if get_origin(kind) is tuple else "table")
