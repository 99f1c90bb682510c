"""A stand-in for Ray: engines in processes forked from a server that has everything imported, and a pipe to each."""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_engine import FakeEngine
from torch import Tensor

from eggroll_llm.config.schema import RunConfig
from eggroll_llm.engine.host import serve
from eggroll_llm.engine.interface import Completion, SteppedEngine, UpdateTimes
from eggroll_llm.engine.links import Link, Lost, Rules
from eggroll_llm.engine.messages import Message, Started, decode, encode
from eggroll_llm.engine.pool import EnginePool
from eggroll_llm.errors import EngineError, ModelError
from eggroll_llm.es.estimate import UpdateSpec

NODE = "here"
SLOW = 0.05
FORKS = multiprocessing.get_context("forkserver")


def start_server() -> None:
    """Start what engines are forked from; on the path of Python 3.11's are not the folders that pytest has added."""
    FORKS.set_forkserver_preload(["pipe_link", "pipe_server"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()


@dataclass(frozen=True)
class Fault:
    """What is wrong with an engine, from the `after`-th call of a method on."""

    method: str
    after: int = 1
    kind: str = "die"
    """die (as of kill -9), hang, fail (EngineError), refuse (ModelError), lie (a weight changes, once), miscalculate
    (updates), slow."""


@dataclass(frozen=True)
class Plan:
    """The engines that a launcher starts, one after another."""

    config: RunConfig
    journal: Path
    faults: Mapping[int, Fault] = field(default_factory=dict)
    """By how many were started before."""
    hosts: Mapping[int, str] = field(default_factory=dict)
    node: str = NODE
    versions: Mapping[int, str] = field(default_factory=dict)
    seconds: float = 0.0
    """That each answer takes."""


class Faulty(FakeEngine):
    """The stand-in engine with a fault."""

    def __init__(self, plan: Plan, index: int) -> None:
        super().__init__(plan.config, plan.journal)
        self.plan, self.fault, self.calls = plan, plan.faults.get(index), 0

    def _meet(self, method: str) -> None:
        if self.fault is None or self.fault.method != method:
            return
        self.calls += 1
        if self.calls < self.fault.after:
            return
        match self.fault.kind:
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hang":
                time.sleep(600)
            case "fail":
                raise EngineError("out of memory")
            case "refuse":
                raise ModelError("attention is not known")
            case "lie" if self.calls == self.fault.after:
                next(iter(self.masters.state().values()))[0, 0] += 0.125  # masters come first
            case "miscalculate":
                fold = self.masters._fold

                def wrong(matrix: Tensor, *others: Any) -> None:
                    fold(matrix, *others)
                    matrix[0, 0] += 1e-3

                self.masters._fold = wrong
            case "slow":
                time.sleep(SLOW)

    def poll(self) -> list[tuple[int, Completion]]:
        member = self.submitted[-1][1].member if self.submitted else None
        self._meet("evaluate" if member is None else "sample")
        time.sleep(self.plan.seconds)
        return super().poll()

    def update(self, spec: UpdateSpec) -> UpdateTimes:
        self._meet("update")
        return super().update(spec)

    def replay(self, specs: Sequence[UpdateSpec]) -> None:
        self._meet("replay")
        super().replay(specs)

    def score(self, *args: Any, **keywords: Any) -> Tensor:
        self._meet("score")
        return super().score(*args, **keywords)

    def checksum(self) -> str:
        self._meet("checksum")
        return super().checksum()

    def begin(self, *args: Any, **keywords: Any) -> float:
        self._meet("begin")
        return super().begin(*args, **keywords)


class PipeLink:
    def __init__(self, build: Callable[[], SteppedEngine], hello: Started, beat: float) -> None:
        self.connection, theirs = FORKS.Pipe()
        self.process = FORKS.Process(target=work, args=(theirs, build, hello, beat), daemon=True)
        self.process.start()
        theirs.close()
        self.sent: list[bytes] = []

    def post(self, frame: bytes) -> None:
        self.sent.append(frame)
        with contextlib.suppress(OSError):
            self.connection.send_bytes(frame)

    def kill(self) -> None:
        self.process.kill()


def work(connection: Connection, build: Callable[[], SteppedEngine], hello: Started, beat: float) -> None:
    torch.set_num_threads(1)

    def read(block: bool) -> Message | None:
        message: Message | None = decode(connection.recv_bytes()) if block or connection.poll() else None
        return message

    with contextlib.suppress(EOFError, ConnectionError):  # the driver has ended
        for event in serve(build, lambda: hello, read, beat):
            connection.send_bytes(encode(event))


@dataclass(frozen=True)
class Build:
    plan: Plan
    index: int

    def __call__(self) -> SteppedEngine:
        return Faulty(self.plan, self.index)


class PipeLauncher:
    node = NODE

    def __init__(self, plan: Plan, *, beat: float = 60.0) -> None:
        start_server()
        self.plan, self.beat = plan, beat
        self.links: list[PipeLink] = []
        self.more = 0
        self.avoided: list[str] = []

    def start(self, number: int) -> PipeLink:
        index, plan = len(self.links), self.plan
        host = plan.hosts.get(index, f"node-{number}")
        versions = {"torch": plan.versions.get(index, "2")}
        hello = Started(host=host, node=plan.node, pid=0, device="CPU", versions=versions)
        self.links.append(PipeLink(Build(plan, index), hello, self.beat))
        return self.links[-1]

    def wait(self, links: Sequence[Link], timeout: float) -> list[tuple[Link, bytes | Lost]]:
        of = {link.connection: link for link in links if isinstance(link, PipeLink)}
        return [(of[ready], self._received(of[ready])) for ready in wait(list(of), timeout)]  # type: ignore[index]

    def _received(self, link: PipeLink) -> bytes | Lost:
        try:
            return link.connection.recv_bytes()
        except (EOFError, ConnectionError):
            link.process.join(10)
            code = link.process.exitcode
            return Lost(f"killed by signal {-code}" if code and code < 0 else f"exit status {code}")

    def spare(self, engines: int, given_up: Mapping[str, int]) -> int:
        more, self.more = self.more, 0
        return max(0, more - sum(given_up.values()))

    def avoid(self, node: str) -> None:
        self.avoided.append(node)

    def close(self) -> None:
        for link in self.links:
            link.process.kill()
            link.process.join()
            link.connection.close()


def pool(
    plan: Plan, engines: int, *, say: Callable[[str], None] = lambda text: None, sequences: int = 13, **rules: Any
) -> EnginePool:
    """Return a pool of the stand-in engines of a plan."""
    settings: dict[str, Any] = {"least": 1, "restarts": 3, "timeout": 0.0, "trainable": True, **rules}
    launcher = PipeLauncher(plan, beat=settings["timeout"] / 10 or 60.0)
    return EnginePool(
        launcher, Rules(engines=engines, **settings), dtype=torch.float32, max_sequences=sequences, say=say
    )
