"""A user's `score` in a process of its own: what loops, eats memory or exits there costs one completion, and no more.

The process (`worker`) imports the user's file and loads the problems itself. A completion is sent with the place of its
problem, so that problems may hold what JSON cannot; that a place means the same there is checked at the start. Many are
sent at once and answered one by one, each within the limit of time; the process has a limit of memory. One that is late
or ends is killed with all that it has started, the completion that it was at has failed, and a new one goes on with the
next. It ends with this process, however that ends.
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

from eggroll_llm.closing import Closing
from eggroll_llm.config import RewardConfig
from eggroll_llm.errors import TaskError
from eggroll_llm.tasks.base import SPLITS, Answer, Verdict
from eggroll_llm.tasks.user import UserTask
from eggroll_llm.toml_text import write_toml
from rewards import Score

START_SECONDS = 300.0  # patience with what the user's file imports and loads
_PIECE = 1 << 16
_LONGEST_REPLY = 1 << 20  # bytes; the worker cuts what it sends to less
# With the same sys.path as here, whatever folder this process was started in.
_START = """
import sys
numbers, sys.path[:] = map(int, sys.argv[1:4]), sys.argv[4:]
from eggroll_llm.tasks.worker import main
main(*numbers)
"""


class _EndedError(Exception):
    """The process is of no more use, and why."""


class UserProcess(Closing):
    """The process of a user's task, started when it is needed. Use as a context manager or call `close`."""

    def __init__(self, task: UserTask, limits: RewardConfig) -> None:
        self._task, self._limits = task, limits
        self._places = {id(problem): (split, i) for split in SPLITS for i, problem in enumerate(task.problems(split))}
        self._process: subprocess.Popen[bytes] | None = None
        self._requests = self._replies = -1
        self._waiting = False
        """Whether there are answers to come, which after an interruption nobody waits for."""

    def judge(self, answers: Sequence[Answer], *, voted: bool) -> Iterator[Verdict]:
        """Yield the verdict on each answer, to be taken to the end; `voted` asks for votes too.

        Raises TaskError when the task cannot be loaded in the process, or is not the same there.
        """
        lines = [self._line(answer, voted) for answer in answers]
        done = 0
        while done < len(lines):
            self.start()
            try:
                for reply in self._talk(lines[done:], self._limits.timeout_seconds):
                    verdict = self._verdict(reply)
                    done += 1
                    if verdict.out_of_memory:
                        self.close()
                        yield verdict
                        break
                    yield verdict
            except _EndedError as error:
                self.close()
                done += 1
                yield Verdict(failure=f"score() {error}")

    def start(self) -> None:
        """Start the process unless it is ready, and wait until it has loaded the task. Raises TaskError as `judge`."""
        if self._process is not None and not self._waiting and not _has_ended(self._process):
            return
        self.close()
        task, name = self._task, f"{self._task.path.absolute()}:{self._task.name}"
        memory = min(int(self._limits.memory_gib * 2**30), 2**62)
        hello = {"name": name, "options": write_toml(dict(task.options)), "memory": memory}
        self._popen()
        try:
            (ready,) = self._talk([_json_line(hello)], START_SECONDS)
            if failed := ready.get("failed"):
                raise TaskError(f"{task.path}: in the process that scores (reward.memory_gib = {self._gib}): {failed}")
            if ready.get("file") != task.hashes["file"]:
                raise TaskError(f"{task.path}: has changed since it was loaded. Start again.")
            if ready != task.hashes:
                raise TaskError(
                    f"{task.path}: problems() gives other problems each time. Make it give the same ones: seed what is "
                    "random, sort what comes from a set or a folder."
                )
        except _EndedError as error:
            self.close()
            raise TaskError(
                f"{task.path}: loading it once more, in the process that scores (reward.memory_gib = {self._gib}), "
                f"{error}. Make it load as it did before."
            ) from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Kill the process with what it has started; a second call does nothing."""
        self._end()

    def _popen(self) -> None:
        ours: list[int] = []
        theirs: list[int] = []
        try:
            for end in (1, 0):
                pipe = os.pipe()
                ours.append(pipe[end])
                theirs.append(pipe[1 - end])
            numbers = map(str, (os.getpid(), *theirs))
            # Of its own session: Ctrl-C ends the run, which then ends it.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _START, *numbers, *sys.path],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=theirs,
                start_new_session=True,
            )
        except BaseException:
            for descriptor in ours:
                os.close(descriptor)
            raise
        finally:
            for descriptor in theirs:
                os.close(descriptor)
        self._requests, self._replies = ours
        os.set_blocking(self._requests, False)

    def _end(self) -> int:
        """Kill it, and return the status that it ended with."""
        process, self._process = self._process, None
        if process is None:
            return 0
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for descriptor in (self._requests, self._replies):
            os.close(descriptor)
        return process.wait()

    def _line(self, answer: Answer, voted: bool) -> bytes:
        split, index = self._places[id(answer.problem)]
        request = {"split": split, "index": index, "text": answer.text, "truncated": answer.truncated, "voted": voted}
        return _json_line(request)

    def _talk(self, lines: Sequence[bytes], seconds: float) -> Iterator[dict[str, Any]]:
        """Write lines, and yield the reply to each within that time from the one before. Raises _EndedError."""
        unsent = memoryview(b"".join(lines))
        received = b""
        self._waiting = True
        with selectors.PollSelector() as selector:
            selector.register(self._replies, selectors.EVENT_READ)
            selector.register(self._requests, selectors.EVENT_WRITE)
            for _ in lines:
                deadline = time.monotonic() + seconds
                while b"\n" not in received:
                    ready = selector.select(max(0.0, deadline - time.monotonic()))
                    if not ready:
                        raise _EndedError(f"took longer than {seconds:g} s")
                    for key, _events in ready:
                        if key.fd == self._requests:
                            unsent = unsent[_write(self._requests, unsent[:_PIECE]) :]
                            if not unsent:
                                selector.unregister(self._requests)
                        elif piece := os.read(self._replies, _PIECE):
                            received += piece
                            if len(received) > _LONGEST_REPLY + _PIECE and b"\n" not in received:
                                raise _EndedError(_GARBLED)
                        else:
                            raise _EndedError(_described(self._end()))
                line, _, received = received.partition(b"\n")
                yield _object(line)
        self._waiting = False

    def _verdict(self, reply: dict[str, Any]) -> Verdict:
        try:
            vote, out_of_memory = reply["vote"], bool(reply.get("out_of_memory"))
            if "failed" in reply:
                hint = f" (reward.memory_gib = {self._gib})" if out_of_memory else ""
                return Verdict(failure=f"{reply['failed']}{hint}", vote=vote, out_of_memory=out_of_memory)
            reward, correct, detail = reply["score"]
            return Verdict(score=Score(float(reward), bool(correct), str(detail)), vote=vote)
        except (KeyError, TypeError, ValueError) as error:
            raise _EndedError(_GARBLED) from error

    @property
    def _gib(self) -> str:
        return f"{self._limits.memory_gib:g}"


_GARBLED = "wrote to a file descriptor that it had not opened"


def _has_ended(process: "subprocess.Popen[bytes]") -> bool:
    """Whether it has; its number stays taken, so that no other process can be killed by it."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _json_line(value: object) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise _EndedError(_GARBLED)
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
    if status >= 0:
        return f"ended its process with status {status}"
    name = next((known.name for known in signal.Signals if known == -status), f"signal {-status}")
    return f"ended its process by {name}" + (", as the kernel does when memory is short" if name == "SIGKILL" else "")
