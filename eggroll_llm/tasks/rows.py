"""Rows of a data set: a JSONL file, or the Hugging Face hub.

A file is taken as it is or refused; nothing is skipped or repaired in silence. Errors name file and line.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eggroll_llm.errors import TaskError
from eggroll_llm.installed import remedy
from eggroll_llm.nesting import parse_json


def read_jsonl(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(file:line, row) of every line.

    Raises:
        TaskError: the file is missing or empty, or a line is not a JSON object in UTF-8 that ends with a
        plain newline.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise TaskError(
            f"{path}: there is no such file. Give the path of a JSONL file, relative to the recipe's folder."
        ) from None
    except (OSError, ValueError) as error:
        raise TaskError(f"{path}: cannot be read: {error}.") from None
    if not data.strip():
        raise TaskError(f"{path}:1: the file is empty. One JSON object per line is expected.")
    if data.startswith(b"\xef\xbb\xbf"):
        raise TaskError(f"{path}:1: the file starts with a byte order mark. Save it as UTF-8 without BOM.")
    rows = []
    lines = data.split(b"\n")
    for number, line in enumerate(lines[:-1] if not lines[-1] else lines, start=1):
        at = f"{path}:{number}"
        if line.endswith(b"\r"):
            raise TaskError(f"{at}: the line ends with CR LF. Convert the file to LF line ends (dos2unix).")
        rows.append((at, _row(line, at, last=number == len(lines))))
    return rows


def _row(line: bytes, at: str, *, last: bool) -> dict[str, Any]:
    if not line.strip():
        raise TaskError(f"{at}: the line is empty. Remove it.")
    try:
        row = parse_json(line)
    except ValueError as error:
        cause = "the last line is cut off" if last else "the line is not JSON in UTF-8"
        raise TaskError(
            f"{at}: {cause} ({error}): {_excerpt(line)}. Correct or remove it, or fetch the file again."
        ) from None
    if not isinstance(row, dict):
        raise TaskError(f"{at}: the line is not a JSON object: {_excerpt(line)}.")
    return row


def _excerpt(line: bytes) -> str:
    text = ascii(line.decode("utf-8", errors="replace"))
    return text if len(text) <= 80 else text[:60] + "..." + text[-17:]


def load_hub(name: str, split: str, config: str | None = None, *, instead: str) -> Sequence[Any]:
    """A split of a data set on the hub. `instead` says what to do where the hub is out of reach.

    Raises:
        TaskError: the package `datasets` is missing, or the data set cannot be loaded.
    """
    try:
        import datasets
    except ImportError:
        raise TaskError(
            f"{name} is on the hub, which needs the package datasets. {remedy('datasets')}, or {instead}."
        ) from None
    try:
        return datasets.load_dataset(name, config, split=split)
    except Exception as error:  # The hub's client raises anything from OSError to its own classes.
        cause = str(error).partition("\n")[0]
        raise TaskError(
            f"{name} cannot be loaded from the hub ({type(error).__name__}: {cause}). Offline? "
            f"{instead[0].upper()}{instead[1:]}."
        ) from error
