"""GRPO over several engines: TRL's trainer, unchanged, comes to the run of one."""

import contextlib
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from grpo_stub import Bench, StubEngine, rows, same_run
from threads import threads

from eggroll_llm.engine.host import serve
from eggroll_llm.engine.interface import Completion, Decoding, Request
from eggroll_llm.engine.links import Link, Lost, Rules
from eggroll_llm.engine.messages import Message, Started, Stop, decode, encode
from eggroll_llm.engine.pool import EnginePool

LOADING = threading.Lock()  # transformers changes what torch does while it loads a model


class Killed(BaseException):
    """Ends the thread of an engine."""


class Stepped(StubEngine):
    """Answers one request at a time; `dies` when it is to sample with the fourth weights."""

    def __init__(self, model_dir: Path, dies: bool = False) -> None:
        super().__init__(model_dir)
        self.requests: list[tuple[int, Request]] = []
        self.dies = dies

    def submit(self, requests: Mapping[int, Request], decoding: Decoding) -> None:
        self.requests += requests.items()
        self.decoding = decoding

    def poll(self) -> list[tuple[int, Completion]]:
        if self.dies and self.loads >= 4 and self.decoding.logprobs:
            raise Killed
        key, request = self.requests.pop()
        return [(key, self._answer(request, self.decoding))]

    def _answer(self, request: Request, decoding: Decoding) -> Completion:
        """Greedy decoding knows no seed, and a pool sends none."""
        return super()._answer(request if decoding.temperature else replace(request, seed=None), decoding)

    def abort(self) -> None:
        self.requests.clear()


class ThreadLink:
    """An engine in a thread: a process would import transformers first."""

    def __init__(self, model_dir: Path, dies: bool, events: "queue.SimpleQueue[tuple[Any, bytes | Lost]]") -> None:
        self.inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self.arguments = model_dir, dies, events
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()

    def post(self, frame: bytes) -> None:
        self.inbox.put(frame)

    def kill(self) -> None:
        self.inbox.put(encode(Stop()))

    def work(self) -> None:
        model_dir, dies, events = self.arguments
        torch._C.set_num_threads(1)

        def build() -> Any:
            with LOADING:
                return Stepped(model_dir, dies)

        def read(wait: bool) -> Message | None:
            message: Message | None = decode(self.inbox.get()) if wait or not self.inbox.empty() else None
            return message

        try:
            hello = Started(host="here", node="here", pid=0, device="CPU", versions={})
            for event in serve(build, lambda: hello, read, 60.0):
                events.put((self, encode(event)))
            events.put((self, Lost("it has ended")))
        except Killed:
            events.put((self, Lost("killed")))


class Launcher:
    node = "here"

    def __init__(self, model_dir: Path) -> None:
        self.model_dir, self.links = model_dir, list[ThreadLink]()
        self.events: queue.SimpleQueue[tuple[Any, bytes | Lost]] = queue.SimpleQueue()

    def start(self, number: int) -> ThreadLink:
        self.links.append(ThreadLink(self.model_dir, len(self.links) < 2, self.events))
        return self.links[-1]

    def wait(self, links: Sequence[Link], timeout: float) -> list[tuple[Link, bytes | Lost]]:
        with contextlib.suppress(queue.Empty):
            link, event = self.events.get(timeout=timeout)
            return [(link, event)] if link in links else []
        return []

    def spare(self) -> int:
        return 0

    def avoid(self, node: str) -> None: ...

    def close(self) -> None:
        for link in self.links:
            link.thread.join(30)


def test_two_engines_train_as_one_and_replacements_have_the_current_weights(
    tmp_path: Path, tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are killed in a step. Log-probabilities, which depend on an engine's weights, weigh the loss."""
    bench = Bench(tmp_path, tiny_model("llama"), monkeypatch)
    rules = Rules(engines=2, least=1, restarts=3, timeout=0.0, trainable=False)
    with threads(1):
        bench.make_engine = lambda model_dir: Stepped(model_dir)
        bench.train("one")
        bench.make_engine = lambda model_dir: EnginePool(
            Launcher(model_dir), rules, dtype=torch.float32, max_sequences=4, say=bench.display.message
        )
        bench.train("two")
    one, two = tmp_path / "one", tmp_path / "two"
    same_run(one, two)
    lost = [row["step"] for row in rows(two)[1:] if row["engines/lost"]]
    assert sum(row["engines/lost"] for row in rows(two)[1:]) == 2
    assert lost[0] > 1
    assert {row["step"] for row in rows(two)[1:] if row["time/replay"]} == set(lost)
    assert rows(two)[lost[0]]["sampling/importance_sampling_ratio/mean"] != 1
