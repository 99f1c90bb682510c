"""The process of a user's task: lines go out and come back on two pipes, each within a time limit.

    3 {"split": "train", "index": 5, "text": " 82", "options": {"truncated": false, ...}, "voted": true}
        -> 3 {"score": [1.0, true, "sum", {}], "vote": "82"}

Each line starts with a running number that its reply repeats, so a reply to another line is noticed.
"""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from eggroll_llm.system.processes import kill_descendants

_PIECE = 1 << 16
_LONGEST_REPLY = 1 << 20  # bytes; the worker cuts what it sends to less
_ENDING_SECONDS = 1.0  # from the end of a process's descriptors to its own
# With the same sys.path as here, whatever folder this process was started in.
_START = """
import sys
numbers, sys.path[:] = map(int, sys.argv[1:4]), sys.argv[4:]
from eggroll_llm.system.invocation import find_own_packages_first
find_own_packages_first()
from eggroll_llm.tasks.sandbox.worker import main
main(*numbers)
"""
GARBLED = "wrote to a file descriptor that it had not opened"


class EndedError(Exception):
    """The process cannot be used any more; the message says why."""


class CancelledError(Exception):
    """Whoever waits for the process is to stop."""


class Child:
    """The process and its pipes; can be started again after `close`."""

    def __init__(self, cancel: int | None = None) -> None:
        """`cancel` is a file descriptor: when it becomes readable, `talk` stops waiting."""
        self._cancel = cancel
        self._process: subprocess.Popen[bytes] | None = None
        self._requests = self._replies = -1
        self._sent = 0
        self._waiting = False
        """Whether replies are outstanding; after an interruption nobody reads them."""

    @property
    def is_ready(self) -> bool:
        """Return whether it runs, with nothing left to answer."""
        return self._process is not None and not self._waiting and not _has_ended(self._process)

    def start(self) -> None:
        """Start it, after `close`; after an exception it is to be closed."""
        theirs: list[int] = []
        try:
            # Each number is kept before anything else can fail or be interrupted, for `close` to find it.
            reading, self._requests = os.pipe()
            theirs.append(reading)
            self._replies, writing = os.pipe()
            theirs.append(writing)
            os.set_blocking(self._requests, False)
            numbers = map(str, (os.getpid(), *theirs))
            # Of its own session: Ctrl-C ends the run, which then ends it.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _START, *numbers, *sys.path],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=theirs,
                start_new_session=True,
            )
        finally:
            for descriptor in theirs:
                os.close(descriptor)

    def talk(self, lines: Sequence[bytes], seconds: float) -> Iterator[dict[str, Any]]:
        """Write lines, and yield the reply to each within that time from the one before.

        Raises EndedError, and CancelledError when it is cancelled.
        """
        first, self._sent = self._sent, self._sent + len(lines)
        unsent = memoryview(b"".join(b"%d %b\n" % numbered for numbered in enumerate(lines, start=first)))
        received = b""
        self._waiting = True
        with selectors.PollSelector() as selector:
            selector.register(self._replies, selectors.EVENT_READ)
            selector.register(self._requests, selectors.EVENT_WRITE)
            if self._cancel is not None:
                selector.register(self._cancel, selectors.EVENT_READ)
            for number in range(first, self._sent):
                deadline = time.monotonic() + seconds
                while b"\n" not in received:
                    # Also while there is something to read: it may never come to the end of a line.
                    if (left := deadline - time.monotonic()) <= 0:
                        raise EndedError(self._why_late(seconds))
                    for key, _events in selector.select(left):
                        if key.fd == self._cancel:
                            raise CancelledError
                        if key.fd == self._requests:
                            unsent = unsent[_write(self._requests, unsent[:_PIECE]) :]
                            if not unsent:
                                selector.unregister(self._requests)
                        elif piece := os.read(self._replies, _PIECE):
                            received += piece
                        else:
                            raise EndedError(self._why_ended())
                    if len(received) > _LONGEST_REPLY:
                        raise EndedError(GARBLED)
                line, _, received = received.partition(b"\n")
                yield _reply(line, number)
        self._waiting = False

    def _why_late(self, seconds: float) -> str:
        """Another process, started by it, may hold the pipe open after its end."""
        if self._process is not None and _has_ended(self._process):
            return _described(self.close())
        return f"took longer than {seconds:g} s"

    def _why_ended(self) -> str:
        """The pipe is closed, by the end of the process as a rule, which then is about to come."""
        deadline = time.monotonic() + _ENDING_SECONDS
        while self._process is not None and not _has_ended(self._process):
            if time.monotonic() > deadline:
                return "closed a file descriptor that it had not opened"
            time.sleep(0.01)
        return _described(self.close())

    def close(self) -> int:
        """Kill it with what it has started, and return the status that it ended with; a second call does nothing.

        To be repeated when it was interrupted.
        """
        if (process := self._process) is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGSTOP)  # so that it starts nothing while others are looked for
            kill_descendants(process.pid)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        # Forgotten before they are closed: later the numbers may be those of other files.
        descriptors = self._requests, self._replies
        self._requests = self._replies = -1
        for descriptor in descriptors:
            if descriptor >= 0:
                os.close(descriptor)
        status = process.wait() if process is not None else 0
        self._process, self._waiting = None, False
        return status


def _has_ended(process: "subprocess.Popen[bytes]") -> bool:
    """Return whether it has; its number stays taken, so that no other process can be killed by it."""
    try:
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:  # where SIGCHLD is ignored, the kernel has taken its number back
        return True


def _reply(line: bytes, number: int) -> dict[str, Any]:
    """Return what the reply of that number says. Raises EndedError when this is another line."""
    repeated, _, text = line.partition(b" ")
    try:
        value = json.loads(text) if repeated == b"%d" % number else None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise EndedError(GARBLED)
    return value


def _write(descriptor: int, data: memoryview) -> int:
    """Write what fits and return how much did; of a pipe that nobody reads any more, all."""
    try:
        return os.write(descriptor, data)
    except BlockingIOError:
        return 0
    except BrokenPipeError:  # the other pipe tells why
        return len(data)


def _described(status: int) -> str:
    """Return how a process ended that nobody here has killed."""
    if status >= 0:
        return f"ended its process with status {status}"
    name = next((known.name for known in signal.Signals if known == -status), f"signal {-status}")
    return f"ended its process by {name}" + (", as the kernel does when memory is short" if name == "SIGKILL" else "")
