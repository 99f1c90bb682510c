"""One JSON object a line: strictly valid whatever the values, and cut back to a step.

JSON knows neither NaN nor half a surrogate pair, and model output contains both. Everything outside ASCII is
escaped, so that control sequences in a completion do nothing to the terminal that shows the file.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eggroll_llm.errors import RunDirError

_DAMAGED = "is damaged. Delete the line, or restore the file."


def parse_json(data: bytes | str) -> Any:
    """Return what JSON, as text or in UTF-8, holds. Raises ValueError for anything else, and for what is too deep."""
    try:
        return json.loads(data if isinstance(data, str) else data.decode())
    except RecursionError:
        raise ValueError("values are nested too deeply") from None


def to_json(value: object) -> str:
    """Return the value on one line; non-finite numbers become null, half surrogate pairs U+FFFD."""
    return json.dumps(_plain(value), allow_nan=False)


def number(row: Mapping[str, Any], key: str) -> float:
    """Return a value of a row of metrics; NaN where it is missing or was not finite."""
    value = row.get(key)
    try:
        return float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        return math.nan


def whole(row: Mapping[str, Any], key: str) -> int:
    """Return a whole number of a row of metrics; 0 where it is missing or was not finite."""
    value = number(row, key)
    return round(value) if math.isfinite(value) else 0


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file with one on each line; a last line that was cut short is left out.

    Raises RunDirError, naming file and line, for anything else.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise RunDirError(f"{path}: cannot be read ({error.strerror}). Name a directory that training wrote.") from None
    rows = []
    for at, line in enumerate(lines, start=1):
        try:
            row = parse_json(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise RunDirError(f"{path}:{at}: {_DAMAGED}")
        rows.append(row)
    return rows


def last_step(path: Path) -> int | None:
    """`step` of the last complete line; None without one."""
    steps = [step for _, step in _complete_lines(path) if step is not None]
    return steps[-1] if steps else None


def cut_after_step(path: Path, step: int) -> str | None:
    """Return the file's text without lines of later steps or lines cut short; None when that is all of it.

    Raises RunDirError, naming file and line, for one without a step before one that is kept.
    """
    if not path.is_file():
        return None
    lines = _complete_lines(path)
    while lines and (lines[-1][1] is None or lines[-1][1] > step):
        lines.pop()
    if damaged := next((at for at, (_, line_step) in enumerate(lines, start=1) if line_step is None), None):
        raise RunDirError(f"{path}:{damaged}: {_DAMAGED}")
    kept = "".join(line for line, line_step in lines if line_step is not None and line_step <= step)
    return None if kept.encode() == path.read_bytes() else kept


def _complete_lines(path: Path) -> list[tuple[str, int | None]]:
    """(line, its step) of every line with a newline; None for a line that holds no step."""
    if not path.is_file():
        return []
    lines = path.read_bytes().decode("utf-8", errors="replace").split("\n")[:-1]
    return [(line + "\n", _step(line)) for line in lines]


def _step(line: str) -> int | None:
    try:
        row = parse_json(line)
    except ValueError:
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return step if isinstance(step, int) else None


def _plain(value: object) -> Any:
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, Mapping):
        return {_plain(str(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if callable(item := getattr(value, "item", None)):
        try:
            number = item()
        except (TypeError, ValueError, RuntimeError):  # it holds several, or is something else
            return _plain(str(value))
        return _plain(number)
    return _plain(str(value))
