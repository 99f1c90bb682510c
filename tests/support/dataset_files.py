"""Rows of a data set, and files of them."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

SUMS = [{"question": f"{a} + {b} = ?", "answer": str(a + b)} for a in range(10) for b in range(10)]


def write(path: Path, rows: Sequence[Any] = SUMS) -> Path:
    """Write rows in the format that the ending of the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        table = pytest.importorskip("pyarrow").Table.from_pylist(rows)
        pytest.importorskip("pyarrow.parquet").write_table(table, path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
