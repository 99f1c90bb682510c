"""Rows of a data set: a file of JSONL, JSON, CSV, TSV or parquet, or the Hugging Face hub.

A file is taken as it is or refused; nothing is skipped or repaired silently. Errors name file and row.
"""

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eggroll_llm.config.toml import is_unicode
from eggroll_llm.errors import TaskError
from eggroll_llm.system.installed import remedy
from eggroll_llm.system.jsonl import parse_json

Row = tuple[str, dict[str, Any]]
"""Where a row stands, for messages, and what it holds."""

ENDINGS = (".jsonl", ".json", ".parquet", ".csv", ".tsv")
"""Of the names of files that can be read."""
_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_CONFIGURATIONS = re.compile(r"among the available configs: \[(.*?)\]")
_PARQUET = b"PAR1"  # how such a file begins and ends


def load_file(path: Path) -> list[Row]:
    """Return the rows of a file: CSV or TSV by its name, parquet, a JSON array of objects, or a JSON object a line.

    Raises TaskError when the file is missing, empty or damaged, or a row is not an object or not valid Unicode.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise TaskError(
            f"{path}: there is no such file. Give the path of a JSONL, JSON, CSV or parquet file, relative to the "
            "recipe's folder."
        ) from None
    except (OSError, ValueError) as error:
        raise TaskError(f"{path}: cannot be read: {error}.") from None
    if data.startswith(_PARQUET):
        return _parquet(path)
    if separator := _SEPARATORS.get(path.suffix.lower()):
        return _csv(data, path, separator)
    if not data.strip():
        raise TaskError(f"{path}:1: the file is empty. One JSON object per line is expected, or an array of them.")
    if data.startswith(b"\xef\xbb\xbf"):
        raise TaskError(f"{path}:1: the file starts with a byte order mark. Save it as UTF-8 without BOM.")
    if data.lstrip().startswith(b"["):
        rows = _array(data, path)
    else:
        _check_object_per_line(data, path)
        rows = _lines(data, path)
    if b"\\ud" in data.lower():
        _check_surrogates(rows)
    return rows


def missing_column(column: str, row: Mapping[str, Any], at: str, needed: str) -> TaskError:
    """Return the error for a row without a column, which says what the row has instead."""
    listed = ", ".join(ascii(key) for key in row) or "no keys"
    return TaskError(
        f"{at}: {column} is missing or null; the row has {listed:.200}. A row needs {needed}.{_rows_inside(row)}"
    )


def _rows_inside(row: Mapping[str, Any]) -> str:
    """Return a hint where an object looks like a whole data set: `{"data": [{...}, ...]}`."""
    for key, value in row.items():
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            return f" If {key!a:.80} holds the rows, write that array alone into the file."
    return ""


def _check_object_per_line(data: bytes, path: Path) -> None:
    """Raise TaskError for a file that is one JSON object over several lines, as tools write that indent."""
    if b"\n" not in data.strip():
        return
    try:
        whole = parse_json(data)
    except ValueError:
        return
    if isinstance(whole, dict):
        raise TaskError(
            f"{path}: the file is a single JSON object over several lines. One JSON object per line is expected, or an "
            f"array of them.{_rows_inside(whole)}"
        )


def _check_surrogates(rows: Sequence[Row]) -> None:
    """Raise TaskError for half a surrogate pair, which an escape of JSON can spell and no tokenizer takes."""
    for at, row in rows:
        for key, value in row.items():
            if not is_unicode(json.dumps([key, value], ensure_ascii=False)):
                raise TaskError(
                    f"{at}: {key!a} = {value!a:.80} is not valid Unicode text: it holds half of a surrogate pair. "
                    "Write the whole character, or remove the row."
                )


def _array(data: bytes, path: Path) -> list[Row]:
    try:
        rows = parse_json(data)
    except ValueError as error:
        raise TaskError(
            f"{path}: is not a JSON array in UTF-8 ({error}). Correct it, or fetch the file again."
        ) from None
    if not rows:
        raise TaskError(f"{path}: the array is empty. JSON objects are expected in it.")
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise TaskError(f"{path}[{index}]: {row!a:.80} is not a JSON object.")
    return [(f"{path}[{index}]", row) for index, row in enumerate(rows)]


def _parquet(path: Path) -> list[Row]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise TaskError(f"{path}: parquet needs pyarrow. {remedy('pyarrow')}. Or convert the file to JSONL.") from None
    try:
        rows = parquet.read_table(path).to_pylist()
    except Exception as error:  # pyarrow's own classes
        cause = str(error).partition("\n")[0]
        raise TaskError(
            f"{path}: cannot be read as parquet ({type(error).__name__}: {cause:.200}). Fetch the file again."
        ) from error
    if not rows:
        raise TaskError(f"{path}: the table is empty.")
    return [(f"{path}[{index}]", row) for index, row in enumerate(rows)]


def _csv(data: bytes, path: Path, separator: str) -> list[Row]:
    """Return rows whose values are all text; the first line has the names of the columns."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise TaskError(f"{path}:{line}: is not UTF-8. Save the file as UTF-8.") from None
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    rows: list[Row] = []
    longest = csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # of the process
    try:
        names = reader.fieldnames or []
        if len(set(names)) < len(names) or not all(names):
            raise TaskError(f"{path}:1: the first line has to name the columns, each once, and is {names!a:.80}.")
        for row in reader:
            at = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                count = "more" if None in row else "fewer"
                raise TaskError(
                    f"{at}: the row has {count} cells than line 1 names columns. Quote cells that hold a comma."
                )
            rows.append((at, dict(row)))
    except csv.Error as error:
        raise TaskError(f"{path}:{reader.line_num}: is not CSV ({error}). Correct the quotes.") from None
    finally:
        csv.field_size_limit(longest)
    if not rows:
        raise TaskError(f"{path}: the table is empty. A line of column names is expected, then one line a row.")
    return rows


def _lines(data: bytes, path: Path) -> list[Row]:
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
    """Return a split of a data set on the hub. `instead` says what to do where the hub is out of reach.

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
        cause, _, more = str(error).partition("\n")
        if names := _CONFIGURATIONS.search(more):
            raise TaskError(
                f"{name} has several configurations: {names[1]:.400}. Choose one by subset in [task_options] of task = "
                '"dataset", or with init --subset.'
            ) from error
        raise TaskError(
            f"{name} cannot be loaded from the hub ({type(error).__name__}: {cause}). Offline? "
            f"{instead[0].upper()}{instead[1:]}."
        ) from error
