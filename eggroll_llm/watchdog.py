"""Ends the process when the engine makes no progress.

vLLM runs in this process, and nothing reaches a thread that waits in native code for ever: no exception, and a signal
only after the call. All that a run needs to go on is on disk at any time, so that ending the process costs one step.

A thread looks `LOOKS` times per limit whether a call has begun or ended since. It counts looks, not seconds, so that a
process that was stopped for an hour (Ctrl-Z) is not taken for one that hangs. A call that hangs without giving Python's
interpreter lock free stops the watchdog as well.
"""

import os
import threading
from collections.abc import Callable

from eggroll_llm.descendants import kill_descendants

EXIT_STATUS = 124
"""As timeout(1) has it."""
LOOKS = 10
LAST_WORDS_SECONDS = 10.0
"""For the message, whose reader or whose run directory may hang too."""


class Watchdog:
    """A context manager around each call that could hang; from one thread, not nested."""

    def __init__(self, seconds: float) -> None:
        """The process ends when a call takes longer than `seconds`, up to a tenth more; 0 sets no limit."""
        self.seconds = seconds
        self.describe: Callable[[str], str] = lambda problem: f"{problem} {_AGAIN}"
        """Complete what happened with where it happened and how to go on."""
        self._turns = 0  # odd within a call
        self._seen = self._looks = 0
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()

    def __enter__(self) -> None:
        if self.seconds and self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="watchdog of the engine", daemon=True)
            self._thread.start()
        self._turns += 1

    def __exit__(self, *_: object) -> None:
        self._turns += 1

    @property
    def watching(self) -> bool:
        """Whether a call is under way."""
        return bool(self._turns % 2)

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def look(self) -> bool:
        """Whether the same call was under way at this look and the `LOOKS` before it."""
        turns = self._turns
        self._looks = self._looks + 1 if turns == self._seen and turns % 2 else 0
        self._seen = turns
        return self._looks >= LOOKS

    def _watch(self) -> None:
        while not self._closed.wait(self.seconds / LOOKS):
            if self.look():
                self._end_process()

    def _end_process(self) -> None:
        try:
            end = threading.Timer(LAST_WORDS_SECONDS, _end)
            end.daemon = True
            end.start()
            problem = (
                f"the inference engine has made no progress for engine.timeout_seconds = {self.seconds:g} seconds, and "
                "the process ends; raise it if the engine is slow and does not hang."
            )
            # Not print: the thread that hangs may hold the stream's lock.
            os.write(2, f"error: {self.describe(problem)}\n".encode(errors="backslashreplace"))
        finally:
            _end()


def _end() -> None:
    kill_descendants(os.getpid())
    os._exit(EXIT_STATUS)


_AGAIN = "A run continues with --on-existing resume, an evaluation that has --out with the same command."
