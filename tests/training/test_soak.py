"""A run that is killed at any instant, resumed, killed again and resumed ends like one that was not, bit for bit.

By SIGKILL, before each change that a run makes on the disk and in the middle of each line, and at random instants.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "support" / "soak.py"

pytestmark = [pytest.mark.slow, pytest.mark.soak]


def soak(*arguments: object) -> dict[str, int]:
    """What the soak counted; it checks the outcome of each run."""
    result = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    print(result.stdout)
    assert result.returncode == 0, result.stderr[-5000:]
    counted: dict[str, int] = json.loads(result.stdout.splitlines()[-1])
    return counted


def test_a_run_of_es_killed_at_any_instant_ends_like_one_that_was_not(tmp_path: Path) -> None:
    """At every third change of the disk, in turn, and after ten random delays."""
    killed = soak("es", tmp_path)
    assert killed["changes"] > 200
    assert killed["at a change"] == (killed["changes"] - 1) // 3
    assert killed["after a delay"] == 10
    assert killed["again"] > 60


def test_a_run_of_grpo_killed_at_some_instants_ends_like_one_that_was_not(
    tmp_path: Path, tiny_model: Callable[[str], Path]
) -> None:
    """At some of the changes, and after three random delays."""
    killed = soak("grpo", tmp_path, tiny_model("llama"))
    assert killed["at a change"] >= 5
    assert killed["after a delay"] == 3
