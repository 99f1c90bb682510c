"""SIGTERM, SIGHUP and Ctrl-C: first signal: clean shutdown; second: immediate exit. No child process is left.

The first raises `Interrupted` where the main thread stands. What runs there may swallow it, such as a reward with a
bare `except:`, so `check`, which is called with every bit of progress and between steps, raises it again; apart from
that nothing more is raised, so cleanup is not disturbed. The second is seen by a thread, as the main
thread may be in native code that does not return.
"""

import atexit
import contextlib
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from eggroll_llm.system.processes import kill_descendants

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAME_SECONDS = 0.1  # timeout(1), for one, sends its signal to the process and to its group: that is not a second one

_number = 0
"""The first signal; 0 while there was none."""
_arrivals: list[float] = []
"""When signals were seen, by the thread."""


class Interrupted(KeyboardInterrupt):
    """A signal arrived, and the command must exit with `status`."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Handle them inside, except one that the process was started to ignore, as for a shell's background job.

    Whatever is raised after a signal becomes `Interrupted`. Children that are still there are killed then, and the
    interpreter exits without taking modules down, for which vLLM needs seconds that a second signal could not end.
    """
    global _number
    _arrivals.clear()
    wakeup = signal.set_wakeup_fd(_watched(), warn_on_full_buffer=False)
    before = {n: signal.signal(n, _handle) for n in NUMBERS if signal.getsignal(n) is not signal.SIG_IGN}
    try:
        yield
    except BaseException as error:
        if not _number:
            raise
        atexit.register(leave, 128 + _number)
        if isinstance(error, Interrupted):
            raise
        raise Interrupted(_number) from error
    finally:
        if _number:
            kill_descendants(os.getpid())
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        _number = 0


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Put the handlers back afterwards that a library replaces within."""
    before = {number: signal.getsignal(number) for number in NUMBERS}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                if handler is not None:
                    signal.signal(number, handler)


def check() -> None:
    """Raise `Interrupted` if a signal arrived that the last call may have swallowed."""
    if _number:
        raise Interrupted(_number)


def _handle(number: int, frame: FrameType | None) -> None:
    global _number
    if not _number:
        _number = number
        raise Interrupted(number)


def leave(status: int) -> NoReturn:
    """End the process without taking the interpreter down, which waits for threads of a user's task."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # it may be closed, or None
            stream.flush()
    os._exit(status)


@functools.cache
def _watched() -> int:
    """Start the thread, and return the descriptor that Python is to write the numbers of signals to."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    threading.Thread(target=_watch, args=(reading,), name="signals", daemon=True).start()
    os.register_at_fork(after_in_child=_forget)
    return writing


def _watch(reading: int) -> NoReturn:
    while True:
        number = os.read(reading, 1)[0]
        if number in NUMBERS:
            _arrivals.append(time.monotonic())
            # A terminal that is closed sends its signal twice, by the shell and by the kernel.
            if number != signal.SIGHUP and _arrivals[-1] - _arrivals[0] > SAME_SECONDS:
                kill_descendants(os.getpid())
                os._exit(128 + number)


def _forget() -> None:
    """A forked child ends by a signal as others do; what it wrote to the descriptor would be read by its parent."""
    signal.set_wakeup_fd(-1)
    _watched.cache_clear()
    for number in NUMBERS:
        if signal.getsignal(number) is _handle:
            signal.signal(number, signal.SIG_DFL)
