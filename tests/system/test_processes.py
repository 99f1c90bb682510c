"""Killing what a process has started reaches all of it, and neither the process nor anything beside it."""

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from process_tree import ProcessTree, wait_for

from eggroll_llm.system.processes import kill_descendants

# Sleepers: a child; a child in a session of its own; one in a group of its own; one whose parent has ended, in that
# parent's group; one whose parent has ended, with what was started in its session.
ROOT = """
import subprocess, time
def start(command, **options):
    return subprocess.Popen(["sh", "-c", command], stdout=subprocess.PIPE, **options)
children = [
    start("exec sleep 600"),
    start("exec sleep 600", start_new_session=True),
    start("exec sleep 600", process_group=0),
    start("sleep 600 & echo", process_group=0),
    start("(sleep 600 & echo); exec sleep 600", start_new_session=True),
]
for child in children[3:]:
    child.stdout.readline()
children[3].wait()
print(flush=True)
time.sleep(600)
"""


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[ProcessTree]:
    found, started = ProcessTree(tmp_path), []
    start = found.start

    def noted(command: Sequence[object], **options: Any) -> "subprocess.Popen[str]":
        started.append(start(command, **options))
        return started[-1]

    found.start = noted  # type: ignore[method-assign]
    yield found
    found.kill()
    for process in started:
        process.communicate()


@pytest.mark.parametrize("leads", [True, False], ids=["leads a session", "leads none"])
def test_all_of_them_are_reached(tree: ProcessTree, leads: bool) -> None:
    """Of a root that leads no session, an orphan in a group of its own is not known to descend from it."""
    beside = tree.start(["sleep", "600"])
    process = tree.start([sys.executable, "-c", ROOT], stdout=subprocess.PIPE, start_new_session=leads)
    assert process.stdout is not None
    process.stdout.readline()
    assert wait_for(lambda: len(tree.alive()) == 2 + 6, seconds=10)
    kill_descendants(process.pid)
    assert wait_for(lambda: len(tree.alive()) == 2 + (not leads), seconds=10)
    assert {beside.pid, process.pid} <= set(tree.alive())


BUSY = """
import signal
from eggroll_llm.system.processes import end_with_parent
signal.signal(signal.SIGTERM, signal.SIG_IGN)
end_with_parent()
print(flush=True)
while True:
    pass
"""
PARENT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {BUSY!r}])"


def test_a_busy_process_ends_with_its_parent(tree: ProcessTree) -> None:
    process = tree.start([sys.executable, "-c", PARENT], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(1.5)
    assert len(tree.alive()) == 2  # it does not end while there is one
    process.kill()
    assert tree.all_end()


def test_a_process_without_any_is_left_alone(tree: ProcessTree) -> None:
    process = tree.start(["sleep", "600"])
    kill_descendants(process.pid)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.2)
