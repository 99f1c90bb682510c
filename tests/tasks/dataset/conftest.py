"""Task "dataset" from rows that a test writes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from dataset_files import SUMS, write

from eggroll_llm.tasks.dataset.task import DatasetTask
from eggroll_llm.tasks.load import load_task


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., DatasetTask]:
    """Loads rows, the sums where there are none, with options; `code` is what my.py holds."""

    def load_rows(rows: Sequence[Any] = SUMS, code: str = "", **options: Any) -> DatasetTask:
        write(tmp_path / "data.jsonl", rows)
        (tmp_path / "my.py").write_text(code)
        task = load_task("dataset", {"dataset": "data.jsonl", "rewards": "exact"} | options, base_dir=tmp_path)
        assert isinstance(task, DatasetTask)
        return task

    return load_rows
