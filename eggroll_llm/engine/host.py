"""The loop around an engine in a process of its own: messages in, events out, whatever carries them."""

import time
from collections.abc import Callable, Iterator
from itertools import count

from eggroll_llm.engine.interface import Request, SteppedEngine
from eggroll_llm.engine.messages import (
    Alive,
    Broken,
    Call,
    Done,
    Event,
    Failure,
    Forget,
    Message,
    Prompts,
    Refused,
    Reply,
    Scores,
    Scoring,
    Started,
    Stop,
    Work,
)
from eggroll_llm.engine.parcels import Parcels
from eggroll_llm.errors import EngineError, ModelError
from eggroll_llm.system.hardware import peak_memory

Read = Callable[[bool], Message | None]
"""Returns the next message: waits for one if the argument says so, else returns None when there is none."""


def serve(build: Callable[[], SteppedEngine], hello: Callable[[], Started], read: Read, beat: float) -> Iterator[Event]:
    """Build an engine and yield what it has to say, until `Stop` or a failure.

    While it samples or scores, at least one event comes every `beat` seconds, if the engine makes progress.
    """
    try:
        engine = build()
    except Exception as error:
        yield Broken(Failure.of(error))
        return
    host = _Host(engine, beat)
    try:
        yield hello()
        yield from host.run(read)
    except EngineError as error:
        yield Broken(Failure.of(error))
    finally:
        host.parcels.discard_export()
        engine.close()


class _Host:
    def __init__(self, engine: SteppedEngine, beat: float) -> None:
        self._engine, self.parcels, self._beat = engine, Parcels(engine), beat
        self._job: Prompts | Scoring | None = None
        self._keys = count()  # of the engine, never used again
        self._requests: dict[int, int] = {}  # key -> request of the job
        self._judges: dict[int, int | None] = {}  # request of the job -> member that scores

    def run(self, read: Read) -> Iterator[Event]:
        spoke = time.monotonic()
        while True:
            # Read between any two steps: work is added without waiting for the rest of the batch.
            message = read(not (self._requests or self._judges))
            while message is not None:
                if isinstance(message, Stop):
                    self._engine.abort()
                    return
                if isinstance(message, Call):
                    yield self._answer(message)
                    spoke = time.monotonic()
                else:
                    self._take(message)
                message = read(False)
            if self._judges:
                yield from self._score(spoke)
                spoke = time.monotonic()
            if self._requests:
                if done := self._step():
                    yield done
                elif time.monotonic() < spoke + self._beat:
                    continue
                else:
                    yield Alive()
                spoke = time.monotonic()

    def _answer(self, call: Call) -> Reply:
        value, failure, start = None, None, time.perf_counter()
        try:
            called = self.parcels if hasattr(Parcels, call.method) else self._engine
            value = getattr(called, call.method)(*call.args, **call.keywords)
        except Exception as error:
            failure = Failure.of(error)
        return Reply(call.id, value, failure, peak_memory(), time.perf_counter() - start)

    def _take(self, message: Prompts | Scoring | Work | Forget) -> None:
        match message:
            case Prompts() | Scoring():
                self._job = message
            case Work(items=items) if isinstance(self._job, Scoring):
                self._judges |= {request: member for request, _, member, _ in items}
            case Work(items=items):
                assert isinstance(self._job, Prompts)
                prompts, requests = self._job.prompts, {}
                for request, prompt, member, seed in items:
                    key = next(self._keys)
                    self._requests[key] = request
                    requests[key] = Request(prompt_ids=prompts[prompt], member=member, seed=seed)
                self._engine.submit(requests, self._job.decoding)
            case Forget():
                self._engine.abort()
                self._requests.clear()
                self._judges.clear()

    def _score(self, spoke: float) -> Iterator[Event]:
        assert isinstance(self._job, Scoring)
        judges, self._judges = self._judges, {}
        passes = self._engine.scoring(self._job.completions, list(judges.values()), self._job.temperature)
        while True:
            try:
                next(passes)
            except StopIteration as end:
                yield Scores.of(self._job.job, list(judges), end.value)
                return
            except ModelError as error:
                yield Refused(self._job.job, Failure.of(error))
                return
            if time.monotonic() >= spoke + self._beat:
                yield Alive()
                spoke = time.monotonic()

    def _step(self) -> Done | None:
        answered = self._engine.poll()
        if not answered:
            return None
        assert self._job is not None
        return Done.of(self._job.job, [(self._requests.pop(key), completion) for key, completion in answered])
