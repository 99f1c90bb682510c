"""The process that calls a user's `score`, at the other end of two pipes from `process`.

    {"name": "/home/me/sums.py:Sums", "source": "import ...", "modules": {"helper": ["/home/me/helper.py", "def ..."]},
     "options": "digits = 2\\n", "memory": 4294967296}
        -> {"train": "60303a...", "test": "fd61a0..."}                               or {"failed": "Traceback ..."}
    {"split": "train", "index": 5, "text": " 82", "options": {"truncated": false, "thought_open": false}, "voted": true}
        -> {"score": [1.0, true, "sum", {}], "vote": "82"}                or {"failed": "Traceback ...", "vote": "82"}

For a data set the first line holds {"dataset": {...}}, what `tasks.dataset.rewards.describe` returns, and the answer
is {}; the others hold "problem" in the place of split and index, and "ids" where a reward wants the tokens.

For an environment it holds {"verifiers": {...}}, the others are as for a data set, and it also sends its problems:

    {"problems": ["train", 0]} -> {"problems": [{"id": "train-1", ...}, ...], "left": 7373}

Lines of a batch, with "batch": 3, 2, 1, are answered when the last has come, a line each. "again" in the replies says
that the call of score_batch failed as a whole.

One JSON object per line, after the number of the request (`child`), on descriptors that nothing else uses. What the
user's code prints is shown on standard error, inert and limited in length; output of native code and child processes
goes to /dev/null.
"""

import codecs
import contextlib
import ctypes
import io
import json
import os
import resource
import signal
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from eggroll_llm.errors import UserError
from eggroll_llm.system.terminal import inert
from eggroll_llm.tasks.dataset.rewards import Rewards
from eggroll_llm.tasks.modules import unpacked
from eggroll_llm.tasks.task import Answer, Verdict, judge, short_traceback
from eggroll_llm.tasks.user import UserTask, WrongCountError, as_score, load_user_task
from eggroll_llm.tasks.verifiers.environment import Environment
from rewards import Score

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LONGEST = 10_000  # characters of a detail, of a vote, and of what is shown of the output


def main(parent: int, requests: int, replies: int) -> None:
    """Serve `parent`, the process of that number, until it ends or closes the pipe."""
    _die_with(parent)
    own = os.getpid()
    for descriptor in (requests, replies):
        os.set_inheritable(descriptor, False)
    output = _catch_output()
    sys.argv[1:] = []
    with open(requests, "rb") as lines, open(replies, "wb") as out:

        def reply(number: bytes, value: Mapping[str, Any]) -> None:
            if os.getpid() != own:  # a fork that the user's code did not end would serve beside this process
                os._exit(1)
            out.write(b"%b %b\n" % (number, json.dumps(value).encode()))
            out.flush()

        number, text = lines.readline().split(b" ", 1)
        try:
            hello = json.loads(text)
            _limit_memory(hello["memory"])
            task = _load(hello)
            reply(number, task.hashes)
        except BaseException as error:
            reply(number, {"failed": str(error) if isinstance(error, UserError) else short_traceback(error)})
        else:
            batch: dict[bytes, dict[str, Any]] = {}
            for line in lines:
                number, text = line.split(b" ", 1)
                request = json.loads(text)
                if isinstance(task, Environment) and "problems" in request:
                    reply(number, task.problems(*request["problems"]))
                    continue
                batch[number] = request
                if request.get("batch", 1) > 1:
                    continue
                output.begin()
                values = _batch(task, list(batch.values())) if "batch" in request else [_verdict(task, request)]
                for number, value in zip(batch, values, strict=True):
                    reply(number, value)
                batch.clear()
    os._exit(0)  # without waiting for what the user's code has left running


_Loaded = UserTask | Rewards | Environment


def _load(hello: Mapping[str, Any]) -> _Loaded:
    if "dataset" in hello:
        return Rewards(hello["dataset"])
    if "verifiers" in hello:
        return Environment(hello["verifiers"])
    return load_user_task(hello["name"], tomllib.loads(hello["options"]), Path(), read=unpacked(hello))


def _answer(task: _Loaded, request: Mapping[str, Any]) -> Answer:
    problem = task.problems(request["split"])[request["index"]] if isinstance(task, UserTask) else request["problem"]
    return Answer(text=request["text"], problem=problem, token_ids=request.get("ids", ()), **request["options"])


def _batch(task: _Loaded, requests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the replies to a batch."""
    answers = [_answer(task, request) for request in requests]
    try:
        values = task.score_batch(answers)
    except WrongCountError as error:
        return [{"failed": str(error), "vote": None} for _ in requests]
    except BaseException as error:
        failed = {"failed": "score_batch() failed", "vote": None, "again": True}
        return [failed | {"out_of_memory": isinstance(error, MemoryError)} for _ in requests]
    return [_verdict(task, r, partial(as_score, value)) for r, value in zip(requests, values, strict=True)]


def _verdict(task: _Loaded, request: Mapping[str, Any], scored: Callable[[], Score] | None = None) -> dict[str, Any]:
    answer = _answer(task, request)
    try:
        verdict = judge(task, answer, voted=request["voted"], catch=BaseException, scored=scored)
    except MemoryError:  # there was too little even for a traceback
        verdict = Verdict(failure="MemoryError", out_of_memory=True)
    vote = None if verdict.vote is None else verdict.vote[:_LONGEST]
    if verdict.score is None:
        return {"failed": verdict.failure, "vote": vote, "out_of_memory": verdict.out_of_memory}
    score = verdict.score
    return {"score": [score.reward, score.correct, score.detail[:_LONGEST], dict(score.parts)], "vote": vote}


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


class _Inert(io.RawIOBase):
    """Below the user's standard output and error. A loop that prints must not fill a terminal, a log or a disk."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        # A real text stream, for what user code does with one; kept here, as it closes this when it is collected.
        below = cast(BinaryIO, self)
        self.text = io.TextIOWrapper(below, "utf-8", "backslashreplace", line_buffering=True, write_through=True)
        self.begin()

    def begin(self) -> None:
        """Start another completion, with a fresh limit on its output."""
        self._left = _LONGEST

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return 2

    def write(self, data: "ReadableBuffer") -> int:
        piece = bytes(data)
        if self._left < 0:
            return len(piece)
        text = self._decoder.decode(piece)
        shown = "\n".join(inert(line, _LONGEST) for line in text[: self._left].split("\n"))
        self._left -= len(text)
        if self._left < 0:
            shown += f"\n(more than {_LONGEST} characters: the rest is not shown)\n"
        unsent = memoryview(shown.encode())
        with contextlib.suppress(OSError):
            while unsent:
                unsent = unsent[os.write(self._descriptor, unsent) :]
        return len(piece)


def _catch_output() -> _Inert:
    null = os.open(os.devnull, os.O_RDWR)
    try:
        shown = os.dup(2)
    except OSError:  # closed
        shown = null
    for descriptor in (1, 2):
        os.dup2(null, descriptor)
    output = _Inert(shown)
    sys.stdout = sys.stderr = output.text
    return output
