"""Engines by real Ray: the same run, a killed actor, our signals, and nothing left when the driver is killed."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_engine import Bench, rows, same_run
from process_tree import ROOT, ProcessTree, wait_for

from eggroll_llm.system import installed
from eggroll_llm.system.processes import _descendants

pytestmark = [
    pytest.mark.skipif(bool(installed.missing("ray")), reason="needs the extra ray"),
    pytest.mark.slow,
]

RUN = ROOT / "tests" / "support" / "ray_run.py"


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[ProcessTree]:
    found = ProcessTree(tmp_path)
    yield found
    found.kill()


def start(tree: ProcessTree, folder: Path, how: str) -> "subprocess.Popen[str]":
    """Start a run of two engines by Ray in a process of its own."""
    path = [ROOT / "tests" / "support", *(Path(entry) for entry in sys.path if entry)]
    with (folder / "printed").open("w") as file:
        return tree.start([sys.executable, RUN, folder, how], path=path, stdout=file, stderr=file)


def test_actors_make_the_run_of_one_engine(tree: ProcessTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them is killed in the first step; nothing is left afterwards, and each has a log."""
    status, printed = start(tree, tmp_path, "kill").wait(240), (tmp_path / "printed").read_text()
    assert status == 0, printed
    Bench(tmp_path, monkeypatch).train("one")
    same_run(tmp_path / "one", tmp_path / "run")
    assert sum(row["engines/lost"] for row in rows(tmp_path / "run")[1:]) == 1
    lost = next(line for line in printed.splitlines() if " lost (" in line)
    assert "(ActorDiedError: The actor died unexpectedly before finishing this task; see " in lost
    assert sorted(path.name for path in (tmp_path / "run" / "engines").iterdir()) == ["01.log", "02.log"]
    assert tree.all_end()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_nothing_is_left_when_the_driver_is_ended(tree: ProcessTree, tmp_path: Path, number: signal.Signals) -> None:
    """In the middle of sampling. A first SIGTERM ends it in order, by our handler and not by Ray's."""
    process = start(tree, tmp_path, "wait")
    assert wait_for(lambda: (tmp_path / "sampling").exists() or process.poll() is not None)
    started = {pid for pid, _ in _descendants(process.pid)}  # Ray's write their names over their environment
    assert len(started) > 3, (tmp_path / "printed").read_text()
    os.kill(process.pid, number)
    assert process.wait(60) == (143 if number == signal.SIGTERM else -9)
    assert wait_for(lambda: not any(is_alive(pid) for pid in started), seconds=20)


def is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"
