"""Ends the process when the engine makes no progress.

vLLM runs in this process, and nothing reaches a thread that waits forever in native code: no exception, and a signal
only after the call. Everything a run needs to resume is on disk at any time, so ending the process costs one step.

A thread looks `LOOKS` times per limit whether a call has begun or ended since. It counts looks, not seconds, so that a
process that was stopped for an hour (Ctrl-Z) is not taken for one that hangs. A call that hangs without releasing
Python's interpreter lock stops that thread as well. So a second process looks in the same way, over memory that both
share, and two looks later: it kills the children, and ends this process by SIGABRT, on which `faulthandler` prints
where every thread stands, as it needs no lock. The exit status is then 134 in a shell: only the process itself could
set another. (`faulthandler.dump_traceback_later` with exit=True counts seconds, and leaves the children.)
"""

import contextlib
import faulthandler
import mmap
import os
import resource
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from eggroll_llm.system.invocation import child_python, command
from eggroll_llm.system.processes import kill_descendants

EXIT_STATUS = 124
"""As timeout(1) has it."""
LOOKS = 10
LATER = 2
"""Looks after `LOOKS` at which the second process acts."""
LAST_WORDS_SECONDS = 10.0
"""Seconds for the message; its reader or the run directory may hang, too."""
READER_SECONDS = 1.0
"""For what a reader of standard error may delay: the message of the second process, and the stack of every thread."""
_BYTES = 8  # of the counter that both processes see


class Looks:
    """Counts the looks at a counter, odd within a call, in which the same call was under way."""

    def __init__(self) -> None:
        self._seen = self._count = 0

    def look(self, turns: int) -> int:
        """Return at how many looks in a row, this one included, but not the one that first saw it."""
        self._count = self._count + 1 if turns == self._seen and turns % 2 else 0
        self._seen = turns
        return self._count


class Watchdog:
    """A context manager around each call that could hang; from one thread, not nested."""

    def __init__(self, seconds: float) -> None:
        """The process ends when a call takes longer than `seconds`, up to a tenth more; 0 sets no limit."""
        self.seconds = seconds
        self.describe: Callable[[str], str] = lambda problem: f"{problem} {_again()}"
        """Return what happened, where it happened and how to resume."""
        self._turns = 0  # odd within a call
        self._shared: mmap.mmap | None = None
        self._looks = Looks()
        self._thread: threading.Thread | None = None
        self._second: subprocess.Popen[bytes] | None = None
        self._closed = threading.Event()

    def __enter__(self) -> None:
        if self.seconds and self._thread is None:
            self._start_second()
            self._thread = threading.Thread(target=self._watch, name="watchdog of the engine", daemon=True)
            self._thread.start()
        self._turn()

    def __exit__(self, *_: object) -> None:
        self._turn()

    @property
    def watching(self) -> bool:
        """Return whether a call is under way."""
        return bool(self._turns % 2)

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        if self._second is not None:
            self._second.kill()
            self._second.communicate()
            self._second = None

    def look(self) -> bool:
        """Return whether the same call was under way at this look and the `LOOKS` before it."""
        return self._looks.look(self._turns) >= LOOKS

    def _turn(self) -> None:
        self._turns += 1
        if self._shared is not None:
            self._shared[:] = self._turns.to_bytes(_BYTES)

    def _start_second(self) -> None:
        """Start the process that watches where no thread of this one can."""
        if not faulthandler.is_enabled():
            faulthandler.enable(file=2)
        descriptor = os.memfd_create("watchdog")
        try:
            os.ftruncate(descriptor, _BYTES)
            self._shared = mmap.mmap(descriptor, _BYTES)
            numbers, words = (os.getpid(), descriptor, self.seconds), f"error: {_problem(self.seconds)} {_again()}\n"
            # Of its own session: Ctrl-C and Ctrl-Z are not meant for it. It ends with the pipe.
            self._second = subprocess.Popen(
                [*child_python(), "-m", "eggroll_llm.engine.watchdog", *map(str, numbers), words],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                pass_fds=[descriptor],
                start_new_session=True,
            )
        finally:
            os.close(descriptor)

    def _watch(self) -> None:
        while not self._closed.wait(self.seconds / LOOKS):
            if self.look():
                self._end_process()

    def _end_process(self) -> None:
        try:
            end = threading.Timer(LAST_WORDS_SECONDS, _end)
            end.daemon = True
            end.start()
            # Not print: the thread that hangs may hold the stream's lock.
            os.write(2, f"error: {self.describe(_problem(self.seconds))}\n".encode(errors="backslashreplace"))
        finally:
            _end()


def main(parent: int, descriptor: int, seconds: float, last_words: str) -> None:
    """Be the second process: watch `parent` until it ends, or closes the pipe on standard input."""
    shared, looks = mmap.mmap(descriptor, _BYTES, access=mmap.ACCESS_READ), Looks()
    while not select.select([0], [], [], seconds / LOOKS)[0] and os.getppid() == parent:
        # A process that is stopped makes no progress and does not hang.
        turns = 0 if _is_stopped(parent) else int.from_bytes(shared[:])
        if looks.look(turns) >= LOOKS + LATER:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                _end_hanging(parent, last_words.encode(errors="backslashreplace"))
            return


def _end_hanging(parent: int, last_words: bytes) -> None:
    writing = threading.Thread(target=os.write, args=(2, last_words), daemon=True)
    writing.start()
    writing.join(READER_SECONDS)
    kill_descendants(parent)
    resource.prlimit(parent, resource.RLIMIT_CORE, (0, 0))  # the stacks are enough; its memory may be gigabytes
    os.kill(parent, signal.SIGABRT)
    if not select.select([0], [], [], READER_SECONDS)[0]:  # the pipe closes when it has ended
        os.kill(parent, signal.SIGKILL)


def _problem(seconds: float) -> str:
    return (
        f"the inference engine made no progress for engine.timeout_seconds = {seconds:g} seconds, so the process "
        "exits; raise the limit if the engine is slow rather than hung."
    )


def _again() -> str:
    return f"Resume a run with: {command('resume', 'RUN')}; repeat the command of an evaluation with --out."


def _is_stopped(pid: int) -> bool:
    with contextlib.suppress(OSError):  # it has ended, which the pipe tells
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] in "Tt"
    return True


def _end() -> None:
    kill_descendants(os.getpid())
    os._exit(EXIT_STATUS)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4])
