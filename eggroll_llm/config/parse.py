"""TOML table -> frozen dataclass, with types checked and errors that say what to do.

Understood field types: int, float (an integer will do, true will not), bool, str, Literal of strings, tuples of
these, Mapping, nested dataclasses, and unions. Every error is a `ConfigError` with file, line where known, key, value,
what was expected, and for an unknown key the nearest valid one.
"""

import dataclasses
import datetime
import difflib
import math
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from eggroll_llm.config.hints import did_you_mean
from eggroll_llm.config.toml import Origin, format_value
from eggroll_llm.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Table = TypeVar("Table", bound="DataclassInstance")

_EXPECTED = {int: "an integer", float: "a number", bool: "true or false", str: "a string in quotes"}


def parse_table(cls: type[Table], table: Mapping[str, Any], origin: Origin, *, where: str = "") -> Table:
    """Return an instance of the dataclass `cls` from a TOML table.

    Args:
        cls: dataclass whose fields are the valid keys; a field without default is required.
        origin: what messages name.
        where: dotted key of the table in its file, empty for the whole file.

    Raises:
        ConfigError: unknown key, missing key, or a value of the wrong type.
    """
    return _parse_dataclass(cls, table, where, origin, valid=list(all_keys(cls, where)))


def all_keys(cls: type, where: str = "") -> Iterator[str]:
    """Return dotted names of the fields of a dataclass, those of nested dataclasses instead of the table itself."""
    for name, kind in field_types(cls).items():
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            yield from all_keys(kind, _join(where, name))
        else:
            yield _join(where, name)


def field_types(cls: type) -> dict[str, Any]:
    """Return the resolved type of each field that the constructor takes, in order."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def unknown_key(key: str, valid: Sequence[str], where: str, dash: str = "") -> ConfigError:
    """Return the error for a key that does not exist; `dash` is put before key names (flags)."""
    tables = {name.rpartition(".")[0] for name in valid} - {""}
    problem = f"unknown flag {where}" if dash else f"{where}: unknown key {key}"
    table = key.rpartition(".")[0]
    if hint := did_you_mean(key, [*valid, *([] if dash else tables - {table})], dash):
        return ConfigError(f"{problem}.{hint}")
    prefix = f"{table}." if table else ""
    level = [prefix + name.removeprefix(prefix).partition(".")[0] for name in valid if name.startswith(prefix)]
    names = dict.fromkeys(level or valid)
    if not dash:
        return ConfigError(f"{problem}. Valid keys: {', '.join(names)}.")
    flags = (f"{dash}{name}" if name in valid else f"{dash}{name}.KEY" for name in names)
    return ConfigError(f"{problem}. " + (f"Valid: {', '.join(flags)}." if names else "This command has no flags."))


def convert(value: object, kind: Any, key: str, origin: Origin, valid: Sequence[str] = ()) -> Any:
    """Return the value as an instance of `kind`. Raises ConfigError when it is not one."""
    family, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if family is Literal:
        return _convert_choice(value, arguments, key, origin)
    if family is types.UnionType:
        return _convert_union(value, arguments, key, origin, valid)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            keys = ", ".join(field_types(kind))
            raise ConfigError(
                f"{origin.at(key)}: {key} = {_show(value)} is {_describe(value)}, but {key} is a table. "
                f"Write a table [{key}] with keys from: {keys}."
            )
        return _parse_dataclass(kind, value, key, origin, valid)
    if family is tuple:
        return _convert_array(value, arguments, key, origin)
    if isinstance(family or kind, type) and issubclass(family or kind, Mapping):
        if not isinstance(value, Mapping):
            raise _wrong(value, "a table", f"Write a table [{key}].", key, origin)
        inner = arguments[1] if arguments else Any
        return {name: convert(item, inner, _join(key, name), origin) for name, item in value.items()}
    return _convert_scalar(value, kind, key, origin)


def _parse_dataclass(
    cls: type[Table], table: Mapping[str, Any], where: str, origin: Origin, valid: Sequence[str]
) -> Table:
    kinds = field_types(cls)
    for name in table:
        if name not in kinds:
            key = _join(where, name)
            raise unknown_key(key, valid or [_join(where, kind) for kind in kinds], origin.at(key))
    values = {}
    for field in dataclasses.fields(cls):
        key, kind = _join(where, field.name), kinds[field.name]
        if field.name in table:
            values[field.name] = convert(table[field.name], kind, key, origin, valid)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            table_hint = f" in [{where}]" if where else ""
            raise ConfigError(f"{origin.at(key)}: {key} is missing. Add {field.name} = <{expected(kind)}>{table_hint}.")
    return cls(**values)


def _convert_scalar(value: object, kind: type, key: str, origin: Origin) -> object:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is kind:
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{origin.at(key)}: {key} = {value} is not finite. Write an ordinary number.")
        return value
    name = key.rpartition(".")[2]
    remedy = f"Write {name} = <{expected(kind)}>."
    if isinstance(value, Mapping):
        remedy = f"Write {name} = <{expected(kind)}> in place of the table."
    elif isinstance(value, str) and kind is not str and _reads_as(kind, value):
        remedy = f"Remove the quotes: {value.strip()}."
    elif kind is int and isinstance(value, float) and value.is_integer():
        remedy = f"Write {name} = {int(value)}."
    elif kind is str and isinstance(value, int | float) and not isinstance(value, bool):
        remedy = f'Put it in quotes: {name} = "{_show(value)}".'
    raise _wrong(value, expected(kind), remedy, key, origin)


def _convert_choice(value: object, choices: tuple[str, ...], key: str, origin: Origin) -> object:
    if value in choices:
        return value
    nearest = difflib.get_close_matches(str(value), choices, n=1)
    hint = f" Did you mean {format_value(nearest[0])}?" if nearest else ""
    listed = ", ".join(format_value(choice) for choice in choices)
    raise ConfigError(f"{origin.at(key)}: {key} = {_show(value)} is not a valid choice. Valid: {listed}.{hint}")


def _convert_union(value: object, kinds: tuple[Any, ...], key: str, origin: Origin, valid: Sequence[str]) -> object:
    for kind in kinds[:-1]:
        try:
            return convert(value, kind, key, origin, valid)
        except ConfigError:
            continue
    return convert(value, kinds[-1], key, origin, valid)


def _convert_array(value: object, arguments: tuple[Any, ...], key: str, origin: Origin) -> object:
    if not isinstance(value, list | tuple):
        raise _wrong(value, "an array", f"Write {key.rpartition('.')[2]} = [...].", key, origin)
    kinds = arguments
    if arguments[-1] is Ellipsis:
        kinds = (arguments[0],) * len(value)
    elif len(value) != len(arguments):
        raise ConfigError(
            f"{origin.at(key)}: {key} = {_show(value)} has {len(value)} entries, "
            f"but exactly {len(arguments)} are expected."
        )
    items = [
        convert(item, kind, f"{key}[{i}]", origin) for i, (item, kind) in enumerate(zip(value, kinds, strict=True))
    ]
    return tuple(items)


def _wrong(value: object, expected: str, remedy: str, key: str, origin: Origin) -> ConfigError:
    at = origin.at(key.partition("[")[0])
    return ConfigError(f"{at}: {key} = {_show(value)} is {_describe(value)}, but {expected} is expected. {remedy}")


def expected(kind: Any) -> str:
    """Return a description of values of that kind, in words."""
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(format_value(choice) for choice in get_args(kind))
    if get_origin(kind) is types.UnionType:
        return " or ".join(map(expected, get_args(kind)))
    return _EXPECTED.get(kind, "an array" if get_origin(kind) is tuple else "a table")


def _reads_as(kind: type, text: str) -> bool:
    if kind is bool:
        return text.strip() in ("true", "false")
    try:
        return math.isfinite(kind(text))
    except (ValueError, TypeError, OverflowError):
        return False


def _describe(value: object) -> str:
    kinds: list[tuple[Any, str]] = [
        (bool, "a boolean"),
        (int, "an integer"),
        (float, "a number"),
        (str, "a string"),
        (Mapping, "a table"),
        (list | tuple, "an array"),
        (datetime.date, "a date"),
        (datetime.time, "a time"),
    ]
    return next((name for kind, name in kinds if isinstance(value, kind)), f"a {type(value).__name__}")


def _show(value: object) -> str:
    try:
        text = format_value(value)
    except ConfigError:
        text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name
