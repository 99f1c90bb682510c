"""Processes that a test starts, and whatever those start: known by a variable in their environment."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SECONDS = 120


class ProcessTree:
    """All processes with the mark of a folder."""

    def __init__(self, folder: Path) -> None:
        self._mark = ("EGGROLL_TEST_TREE", str(folder))

    def start(self, command: Sequence[object], *, path: Sequence[Path] = (), **options: Any) -> "subprocess.Popen[str]":
        """Start a process in the repository, whose modules are found first in `path` and then in the repository."""
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT)))} | options.pop("env", {})
        marked = environment | dict([self._mark])
        words = [str(word) for word in command]
        return subprocess.Popen(words, cwd=ROOT, env=marked, text=True, preexec_fn=listen, **options)

    def alive(self) -> list[int]:
        """Return those that run; one that waits to be collected does not."""
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if "=".join(self._mark).encode() in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
        return found

    def all_end(self) -> bool:
        """Whether all end within ten seconds."""
        return wait_for(lambda: not self.alive(), seconds=10)

    def kill(self) -> None:
        """End what a failed test has left."""
        for pid in self.alive():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)


def listen() -> None:
    """What a shell starts in the background ignores Ctrl-C, and so do its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for(condition: Callable[[], object], seconds: float = SECONDS) -> bool:
    """Whether the condition comes true in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False
