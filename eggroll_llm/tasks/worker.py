"""The process that calls a user's `score`, at the other end of two pipes from `process`.

    {"name": "/home/me/sums.py:Sums", "options": "digits = 2\\n", "memory": 4294967296}
        -> {"file": "9f86d0...", "train": "60303a...", "test": "fd61a0..."}          or {"failed": "Traceback ..."}
    {"split": "train", "index": 5, "text": " 82", "truncated": false, "voted": true}
        -> {"score": [1.0, true, "sum"], "vote": "82"}                or {"failed": "Traceback ...", "vote": "82"}

A line of JSON each, on descriptors that nothing else uses. What the user's code prints is shown on standard error,
inert and not without end; what it writes past Python, or starts, has /dev/null.
"""

import contextlib
import ctypes
import io
import json
import os
import resource
import signal
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eggroll_llm.errors import UserError
from eggroll_llm.inert import inert
from eggroll_llm.tasks.base import Answer, Verdict, judge, short_traceback
from eggroll_llm.tasks.user import UserTask, load_user_task

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LONGEST = 10_000  # characters of a detail, of a vote, and of what is shown of the output


def main(parent: int, requests: int, replies: int) -> None:
    """Serve `parent`, the process of that number, until it ends or closes the pipe."""
    _die_with(parent)
    for descriptor in (requests, replies):
        os.set_inheritable(descriptor, False)
    output = _catch_output()
    sys.argv[1:] = []
    with open(requests, "rb") as lines, open(replies, "wb") as out:

        def reply(value: Mapping[str, Any]) -> None:
            out.write(json.dumps(value).encode() + b"\n")
            out.flush()

        try:
            hello = json.loads(lines.readline())
            _limit_memory(hello["memory"])
            task = load_user_task(hello["name"], tomllib.loads(hello["options"]), Path())
            reply(task.hashes)
        except BaseException as error:
            reply({"failed": str(error) if isinstance(error, UserError) else short_traceback(error)})
        else:
            for line in lines:
                output.begin()
                reply(_verdict(task, json.loads(line)))
    os._exit(0)  # without waiting for what the user's code has left running


def _verdict(task: UserTask, request: Mapping[str, Any]) -> dict[str, Any]:
    problem = task.problems(request["split"])[request["index"]]
    answer = Answer(text=request["text"], problem=problem, truncated=request["truncated"])
    try:
        verdict = judge(task, answer, voted=request["voted"], catch=BaseException)
    except MemoryError:  # there was too little even for a traceback
        verdict = Verdict(failure="MemoryError", out_of_memory=True)
    vote = None if verdict.vote is None else verdict.vote[:_LONGEST]
    if verdict.score is None:
        return {"failed": verdict.failure, "vote": vote, "out_of_memory": verdict.out_of_memory}
    score = verdict.score
    return {"score": [score.reward, score.correct, score.detail[:_LONGEST]], "vote": vote}


def _die_with(parent: int) -> None:
    """Let the kernel kill this process when its parent ends, and before others when memory runs out."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
    if os.getppid() != parent:
        os._exit(1)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def _limit_memory(size: int) -> None:
    """Limit what is allocated, not the address space: torch maps many GiB without using them. No core files."""
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    size = size if most == resource.RLIM_INFINITY else min(size, most)
    resource.setrlimit(resource.RLIMIT_DATA, (size, size))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


class _Inert(io.TextIOBase):
    """Standard output and error of the user's code. A loop that prints must not fill a terminal, a log or a disk."""

    encoding = "utf-8"

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.begin()

    def begin(self) -> None:
        """Begin with another completion, of which as much is shown as of the one before."""
        self._left = _LONGEST

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return 2

    def write(self, text: str) -> int:
        if self._left < 0:
            return len(text)
        shown = "\n".join(inert(line, _LONGEST) for line in text[: self._left].split("\n"))
        self._left -= len(text)
        if self._left < 0:
            shown += f"\n(more than {_LONGEST} characters: the rest is not shown)\n"
        with contextlib.suppress(OSError):
            os.write(self._descriptor, shown.encode())
        return len(text)


def _catch_output() -> _Inert:
    null = os.open(os.devnull, os.O_RDWR)
    try:
        shown = os.dup(2)
    except OSError:  # closed
        shown = null
    for descriptor in (1, 2):
        os.dup2(null, descriptor)
    output = _Inert(shown)
    sys.stdout = sys.stderr = output
    return output
