"""Flags such as `--es.sigma 0.003`, which override the recipe.

A flag's text is read as the type of its field, more leniently than TOML: `--steps 1e3`, `--es.antithetic Yes`.
Below a free-form table (`--task_options.data_dir DIR`) it is read as a TOML value or as True or False and otherwise as
a string.
"""

import copy
import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from eggroll_llm.config.parse import all_keys, convert, expected, field_types, unknown_key
from eggroll_llm.config.toml import Origin, check_values, format_value, is_unicode
from eggroll_llm.errors import ConfigError

_BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
FREE = ("task_options.", "chat.template_args.")
"""Tables whose keys and values are not ours."""
_EXACT = 2.0**53  # up to which a float is the integer that was written


def apply_overrides(cls: type, table: Mapping[str, Any], overrides: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Return a copy of the table with each dotted key set; dashes in keys count as underscores.

    Raises:
        ConfigError: unknown key, or text that is not of the field's type.
    """
    result = copy.deepcopy(dict(table))
    for flag, text in overrides:
        parts = flag.removeprefix("--").split(".")
        if not is_unicode(flag + text):
            raise ConfigError(f"{flag!a} {text!a}: not valid Unicode text. Remove the undecodable bytes.")
        path, kind = _resolve(cls, parts)
        origin = Origin(name=f"--{flag.removeprefix('--')}")
        read = _read(kind, text, origin.name)
        check_values({".".join(path): read}, origin, depth=len(path) - 1)
        value = convert(read, kind, ".".join(path), origin)
        target = result
        for part in path[:-1]:
            inner = target.setdefault(part, {})
            if not isinstance(inner, dict):
                raise ConfigError(
                    f"{origin.name} {text}: {part} is not a table in the recipe. Make it one, or drop the flag."
                )
            target = inner
        # A plain list is what TOML itself would have given.
        target[path[-1]] = list(value) if isinstance(value, tuple) else value
    return result


def flag_text(key: str, value: object) -> str:
    """Return the value of a setting as the text of its flag, from which the same value is read."""
    value = _plain(value)
    free = key.replace("-", "_").startswith(FREE)
    if isinstance(value, str) and (not free or toml_value(value) == value):
        return value
    return format_value(value, key)


def _plain(value: Any) -> Any:
    """Return a value with Python's own numbers and lists in place of those of numpy and torch."""
    if hasattr(value, "dtype") and hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def key_of(flag: str) -> str:
    """Return the dotted key of the setting that a flag names."""
    return flag.removeprefix("--").replace("-", "_")


def flags_by_key(overrides: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Return dotted key of a setting -> the flag that sets it, as it was written."""
    keys = {}
    for flag, _ in overrides:
        name = flag.removeprefix("--")
        table, dot, rest = name.partition(".")
        table = table.replace("-", "_")
        keys[f"{table}.{rest}" if table == "task_options" and dot else name.replace("-", "_")] = f"--{name}"
    return keys


def _resolve(cls: type, parts: Sequence[str]) -> tuple[list[str], Any]:
    """Return the field names and the type that the dotted key of a flag leads to."""
    key, kind = ".".join(parts).replace("-", "_"), cls
    path: list[str] = []
    for index, part in enumerate(parts):
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            kinds, name = field_types(kind), part.replace("-", "_")
            if name not in kinds:
                raise unknown_key(key, list(all_keys(cls)), f"--{'.'.join(parts)}", dash="--")
            path, kind = [*path, name], kinds[name]
        elif _is_mapping(kind) and part:
            return [*path, *parts[index:]], Any
        else:
            raise unknown_key(key, list(all_keys(cls)), f"--{'.'.join(parts)}", dash="--")
    if _is_mapping(kind) or (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        inner = next(iter(field_types(kind))) if dataclasses.is_dataclass(kind) else "KEY"
        example = f"--{'.'.join(path)}.{inner}"
        raise ConfigError(
            f"--{'.'.join(parts)}: {'.'.join(path)} is a table. Set one of its keys, e.g. {example} VALUE."
        )
    return path, kind


def _read(kind: Any, text: str, flag: str) -> object:
    """Return the text as a value of the kind. Raises ConfigError when it is not the number or boolean expected."""
    if kind is str:
        # Of no setting a sensible name, and `--log.wandb true` would make a project of it.
        if text.lower() in ("true", "false", "yes", "no"):
            raise ConfigError(f"{flag} {text}: a name is expected, not yes or no. Write {flag} NAME, or leave it out.")
        return text
    if get_origin(kind) is Literal:
        return next((choice for choice in get_args(kind) if choice.lower() == text.lower()), text)
    if kind in (bool, int, float):
        value = _BOOLEANS.get(text.strip().lower()) if kind is bool else _number(kind, text)
        if value is None:
            raise ConfigError(f"{flag} {text:.60}: {expected(kind)} is expected.")
        return value
    if get_origin(kind) is tuple:
        return _read_array(get_args(kind)[0], text, flag)
    return toml_value(text)


def _read_array(item: Any, text: str, flag: str) -> list[Any]:
    written = text.strip().startswith("[") and text.strip().endswith("]")
    items = toml_value(text if written else f"[{text}]")
    if isinstance(items, list) and (item is not str or written or (items and all(type(one) is str for one in items))):
        return items
    if item is str and not written:
        return [text] if text else []
    raise ConfigError(f"{flag} {text:.60}: an array is expected, each {expected(item)}. Write {flag} A,B.")


def _number(kind: Any, text: str) -> int | float | None:
    try:
        return kind(text)
    except ValueError:
        return None if kind is float else whole_number(text)


def whole_number(text: str) -> int | None:
    """Return the integer that a text spells, also as 1e3 or 1000.0; None when it spells none."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        value = float(text)
    except ValueError:
        return None
    return int(value) if value.is_integer() and abs(value) <= _EXACT else None


def toml_value(text: str) -> object:
    """Return a text as a TOML value, or itself where it is none."""
    text = {"True": "true", "False": "false"}.get(text, text)
    try:
        table = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    # Dates are no values of any setting, and text with line breaks could spell more keys than one.
    is_value = set(table) == {"value"} and isinstance(table["value"], bool | int | float | str | list | dict)
    return table["value"] if is_value else text


def _is_mapping(kind: Any) -> bool:
    family = get_origin(kind) or kind
    return isinstance(family, type) and issubclass(family, Mapping)
