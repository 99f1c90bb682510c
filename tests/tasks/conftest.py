"""A user's task, from a file that a test writes."""

from collections.abc import Callable
from pathlib import Path

import pytest

from eggroll_llm.tasks.load import load_task
from eggroll_llm.tasks.user import UserTask


@pytest.fixture
def user_task(tmp_path: Path) -> Callable[[str], UserTask]:
    """Loads `Mine` of a source, which is written to mine.py."""

    def load(source: str) -> UserTask:
        (tmp_path / "mine.py").write_text(source)
        loaded = load_task("mine.py:Mine", {}, base_dir=tmp_path)
        assert isinstance(loaded, UserTask)
        return loaded

    return load
