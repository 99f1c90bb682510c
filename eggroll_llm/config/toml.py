"""TOML as text: reading with line numbers in the errors, finding the line of a key, writing.

The standard library reads TOML (`tomllib`) but neither writes it nor says where a key stood, and both are
needed: a run directory holds the resolved configuration, and an error message names the line.

Source: TOML 1.0.0, https://toml.io/en/v1.0.0
"""

import datetime
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eggroll_llm.errors import ConfigError

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_HEADER = re.compile(r"\s*\[\[?([^\[\]]+)\]\]?\s*(?:#.*)?$")
_ASSIGNMENT = re.compile(
    r"""\s*((?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*'))*)\s*="""
)
_KEY_PART = re.compile(r"""[A-Za-z0-9_-]+|"[^"]*"|'[^']*'""")
_INTEGERS = range(-(2**63), 2**63)  # those that TOML guarantees
_DEEPEST = 32
"""Levels of tables and arrays, keys of a dotted key included."""
_ESCAPES = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\t": "\\t", "\n": "\\n", "\f": "\\f", "\r": "\\r"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Where a table came from, for messages."""

    name: str
    """File name, or the flag."""
    text: str = ""
    """Source text, searched for the line of a key; may be empty."""
    flags: Mapping[str, str] = field(default_factory=dict)
    """Dotted keys that the command line has set, with the flag of each as it was written."""

    def flag(self, key: str) -> str:
        """Return the flag that has set a dotted key, or a table that it is in; empty when none has."""
        parts = key.split(".")
        prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
        return next((self.flags[prefix] for prefix in prefixes if prefix in self.flags), "")

    def at(self, key: str) -> str:
        """Return the flag that set a dotted key, else `file:line` of it or of its nearest table, else `file`."""
        if flag := self.flag(key):
            return flag
        line = key_line(self.text, key) if self.text else 0
        return f"{self.name}:{line}" if line else self.name


class Sourced(dict[str, Any]):
    """A table of free keys that knows where each was set, for the messages of whoever interprets them."""

    origin = Origin(name="task_options")
    flags: frozenset[str] = frozenset()
    """Keys that the command line has set."""

    def origin_of(self, key: str) -> Origin:
        """Return the file or flag that set a key."""
        return Origin(name=f"--task_options.{key}") if key in self.flags else self.origin


def read_toml(path: Path) -> tuple[dict[str, Any], Origin]:
    """Return table and origin of the file.

    Raises:
        ConfigError: the file is missing, unreadable, not UTF-8 or not TOML, or `check_values` refuses a value.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file. Check the path (recipes end in .toml).") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a directory. Name the .toml file in it.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8. Save the file as UTF-8.") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}). Check its permissions.") from None
    except ValueError:
        raise ConfigError(f"{str(path)!r}: not a usable file name. Name a .toml file.") from None
    try:
        table, origin = tomllib.loads(text), Origin(name=str(path), text=text)
    except RecursionError:
        raise ConfigError(f"{path}: {_TOO_DEEP}") from None
    except ValueError as error:
        match = re.fullmatch(r"(.*) \(at (?:line (\d+), column \d+|end of document)\)", str(error), re.DOTALL)
        if not match:  # the one mistake that tomllib leaves to int(), which gives no line
            raise ConfigError(f"{path}: {_TOO_LARGE}") from None
        lines = text.rstrip().split("\n")
        number = int(match[2] or len(lines))
        line = lines[number - 1].strip() if number <= len(lines) else ""
        raise ConfigError(f"{path}:{number}: TOML syntax error: {match[1]}{f', in: {line}' if line else ''}") from None
    check_values(table, origin)
    return table, origin


_TOO_DEEP = f"values are nested more than {_DEEPEST} levels deep. Flatten them."
_TOO_LARGE = "integers have 64 bits. Write a smaller number."


def check_values(table: Mapping[str, Any], origin: Origin, *, depth: int = 0) -> None:
    """Raise ConfigError for an integer of more than 64 bits, and for values nested too deeply.

    Checked where text becomes values, so that all other code may recurse into them and print them. The table itself
    stands `depth` levels deep.
    """
    level: list[tuple[str, object]] = list(table.items())
    for _ in range(depth, _DEEPEST):
        for key, value in level:
            if isinstance(value, int) and value not in _INTEGERS:
                raise ConfigError(f"{origin.at(key)}: {key}: {_TOO_LARGE}")
        level = [inner for key, value in level for inner in _inside(key, value)]
        if not level:
            return
    raise ConfigError(f"{origin.at(level[0][0])}: {_TOO_DEEP}")


def _inside(key: str, value: object) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        yield from ((f"{key}.{name}", item) for name, item in value.items())
    elif isinstance(value, list):
        yield from ((key, item) for item in value)


def key_line(text: str, key: str) -> int:
    """Return the 1-based line that sets the dotted key, or its longest prefix with a line; 0 without one.

    A scan of lines, not a parser: a key of an inline table is found at the line of that table.
    """
    wanted = tuple(key.split("."))
    table: tuple[str, ...] = ()
    best_length, best_line, inside = 0, 0, ""
    for number, line in enumerate(text.split("\n"), start=1):
        if inside:
            inside = "" if inside in line else inside
            continue
        if header := _HEADER.fullmatch(line):
            found = table = _key_parts(header[1])
        elif assignment := _ASSIGNMENT.match(line):
            found = table + _key_parts(assignment[1])
        else:
            continue
        inside = next((mark for mark in ('"""', "'''") if line.count(mark) % 2), "")
        if best_length < len(found) <= len(wanted) and wanted[: len(found)] == found:
            best_length, best_line = len(found), number
    return best_line


def write_toml(table: Mapping[str, Any]) -> str:
    """Return TOML text that `tomllib` reads back as the same table; keys whose value is None are left out.

    Raises:
        ConfigError: a value that TOML cannot hold.
    """
    return "\n".join(_table_lines(table, ())).strip("\n") + "\n"


def format_value(value: object, key: str = "value") -> str:
    """Return one value as TOML text. Raises ConfigError, naming the key, for what TOML cannot hold."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) and value not in _INTEGERS:
        raise ConfigError(f"{key}: {_TOO_LARGE}")
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return _format_string(value, key)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, Mapping):
        return (
            "{" + ", ".join(f"{_format_key(k, key)} = {format_value(v, f'{key}.{k}')}" for k, v in value.items()) + "}"
        )
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return "[" + ", ".join(format_value(item, key) for item in value) + "]"
    raise ConfigError(
        f"{key}: a {type(value).__name__} cannot be written as TOML. Use numbers, strings, lists or tables."
    )


def _table_lines(table: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    """Plain values first: after a table header every assignment would belong to that table."""
    prefix = ".".join(path)
    lines = []
    for key, value in table.items():
        if value is not None and not isinstance(value, Mapping):
            lines.append(f"{_format_key(key, prefix)} = {format_value(value, '.'.join((*path, str(key))))}")
    for key, value in table.items():
        if isinstance(value, Mapping):
            inner = (*path, _format_key(key, prefix))
            lines += ["", f"[{'.'.join(inner)}]", *_table_lines(value, inner)]
    return lines


def _format_key(key: object, where: str) -> str:
    if not isinstance(key, str):
        raise ConfigError(f"{where}: key {key!r} is not a string. Use strings as keys.")
    return key if _BARE_KEY.fullmatch(key) else _format_string(key, where)


def is_unicode(text: str) -> bool:
    """Return whether UTF-8 can hold a text: undecodable words of the command line have halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _format_string(value: str, key: str) -> str:
    if not is_unicode(value):
        raise ConfigError(f"{key} = {value!a}: not valid Unicode text. Remove the undecodable bytes.")
    # More than TOML asks for is escaped, so that nothing acts on the terminal that shows the text.
    return '"' + "".join(_ESCAPES.get(c) or (c if c.isprintable() else f"\\U{ord(c):08X}") for c in value) + '"'


def _key_parts(dotted: str) -> tuple[str, ...]:
    return tuple(part.strip("\"'") for part in _KEY_PART.findall(dotted))
