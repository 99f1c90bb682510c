"""Several engines behind the interface of one: each has all the weights, and a step's requests are shared out.

    begin, update      to all: noise and weights are regenerated from a few numbers
    generate, stream   shared out by `Shares`; what a lost engine has not answered goes to the others
    score              likewise, by members
    state, export      from one

Every engine folds every update, so that nothing has to be sent but fitness. They must compute the same bits: what they
report of each update is compared, and so are the checksums of their weights when one is asked for. The majority is
right; where there is none, the run ends. Imports neither vLLM nor what starts engines.
"""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from eggroll_llm.engine.interface import Completion, Decoding, Request, Scored, Stream, UpdateTimes
from eggroll_llm.engine.links import Launcher, Replica, Rules
from eggroll_llm.engine.messages import Call, Done, Forget, Prompts, Refused, Scores, Scoring, Stop, Work
from eggroll_llm.engine.roster import REPLAYED_AT_ONCE, EngineLostError, Roster
from eggroll_llm.engine.sampling import in_order
from eggroll_llm.engine.shares import Shares
from eggroll_llm.engine.watchdog import Watchdog
from eggroll_llm.errors import EngineError
from eggroll_llm.es.estimate import UpdateSpec
from eggroll_llm.es.noise import NoiseSpec
from eggroll_llm.system.hardware import GIB

if TYPE_CHECKING:
    import torch
    from torch import Tensor

log = logging.getLogger(__name__)

AHEAD = 1.25
"""Requests that an engine is given at most, as a multiple of those that it answers at once."""
JUDGES = 8
"""Members that score together: one forward pass, if their tokens fit."""
REPLAY_AT_MOST = 100
"""Updates that an engine that joins may have to repeat, before the state of a checkpoint takes their place."""
CLOSE_SECONDS = 5.0

T = TypeVar("T")
Item = tuple[int, int, int | None, int | None]
"""Request, prompt, member and sampling seed."""


class _Job:
    """Requests under way."""

    def __init__(
        self, about: Prompts | Scoring, items: Sequence[Item], groups: Sequence[Sequence[int]], capacity: int
    ) -> None:
        self.about, self.items = about, items
        self.shares: Shares[Replica] = Shares(groups, capacity)
        self.knows: set[Replica] = set()
        """Those that have been told what it is about."""
        self.arrived: list[tuple[int, Any]] = []


def _groups(requests: Sequence[Request]) -> list[list[int]]:
    """Return the positions of requests, together those in a row of the same member, or of one prompt where none is."""
    groups: list[list[int]] = []
    last: object = None
    for i, request in enumerate(requests):
        whose = request.prompt_ids if request.member is None else request.member
        if not groups or whose != last:
            groups.append([])
        groups[-1].append(i)
        last = whose
    return groups


class EnginePool:
    """Engines in other processes, as one `Engine`."""

    def __init__(
        self,
        launcher: Launcher,
        rules: Rules,
        *,
        dtype: "torch.dtype",
        max_sequences: int,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Start the engines and wait for them. Raises what keeps one from starting; `say` gets what happens to them."""
        self.dtype = dtype
        self.watchdog = Watchdog(0)  # each engine has its own, and the roster watches them
        self._launcher = launcher
        self._capacity = max(1, int(AHEAD * max_sequences))
        self._job: _Job | None = None
        self._jobs = count(1)
        self._sampling_seconds = self._idle_seconds = 0.0  # of all engines together
        self._roster = Roster(
            launcher,
            rules,
            say,
            on_live=self._feed,
            on_lost=self._take_back,
            on_done=self._receive,
            has_work=self._is_working,
        )
        try:
            self._roster.start()
        except BaseException:
            self.close()
            raise

    def begin(self, noise: NoiseSpec, population: int, *, antithetic: bool = True) -> float:
        """Make the members of a step available everywhere; return the seconds that their noise took the slowest."""
        self._roster.add(self._launcher.spare(len(self._roster.replicas), self._roster.given_up))
        seconds = self._roster.call("begin", noise, population, antithetic=antithetic)
        self._roster.past.begin = Call(-1, "begin", (noise, population), {"antithetic": antithetic})
        return max(seconds.values())

    def generate(self, requests: Sequence[Request], decoding: Decoding) -> list[Completion]:
        """Return the completion of each request, in their order. Raises EngineError when too few engines are left."""
        return in_order(self.stream(requests, decoding), len(requests))

    def stream(self, requests: Sequence[Request], decoding: Decoding) -> Stream:
        """Yield (position of the request, completion) as they finish; closing it early leaves the pool usable."""
        prompt_of = {prompt: i for i, prompt in enumerate(dict.fromkeys(request.prompt_ids for request in requests))}
        seeded = decoding.temperature > 0
        items = [
            (i, prompt_of[request.prompt_ids], request.member, request.seed if seeded else None)
            for i, request in enumerate(requests)
        ]
        about = Prompts(next(self._jobs), tuple(prompt_of), decoding)
        yield from self._answers(_Job(about, items, _groups(requests), self._capacity))

    def score(self, completions: Sequence[Scored], members: Sequence[int | None], temperature: float = 1.0) -> "Tensor":
        """Return the log-probabilities [members, tokens] of completions; the members are shared out.

        Raises ModelError, with the pool usable, for attention that is not known.
        """
        import torch

        about = Scoring(next(self._jobs), tuple(completions), temperature)
        items = [(i, 0, member, None) for i, member in enumerate(members)]
        groups = [range(i, min(i + JUDGES, len(members))) for i in range(0, len(members), JUDGES)]
        rows = dict(self._answers(_Job(about, items, groups, self._capacity)))
        return torch.stack([rows[i] for i in range(len(members))])

    def _answers(self, job: _Job) -> Generator[tuple[int, Any]]:
        """Share a job out and yield (request, answer) as they come."""
        self._job = job
        self._roster.begin_work()
        try:
            for replica in self._roster.live:
                self._feed(replica)
            while job.shares.unanswered:
                start = time.perf_counter()
                self._roster.round()
                self._count_seconds(job, time.perf_counter() - start)
                arrived, job.arrived = job.arrived, []
                yield from arrived
        finally:
            self._job = None
            if job.shares.unanswered:
                self._roster.post_all(Forget())

    def update(self, spec: UpdateSpec) -> UpdateTimes:
        """Fold a step's fitness into the weights of all. Raises NonFiniteUpdate, and EngineError when they differ."""
        spec = dataclasses.replace(spec)  # without the tensor that it has cached
        times: dict[Replica, UpdateTimes] = self._roster.call("update", spec, changes=True)
        self._roster.past.updates.append(spec)
        report = self._agreed({replica: each.report for replica, each in times.items()})
        slowest = max(times.values(), key=lambda each: each.update + each.serve)
        return UpdateTimes(report=report, update=slowest.update, serve=slowest.serve)

    def replay(self, specs: Sequence[UpdateSpec]) -> None:
        """Apply recorded updates everywhere."""
        for i in range(0, len(specs), REPLAYED_AT_ONCE):
            part = [dataclasses.replace(spec) for spec in specs[i : i + REPLAYED_AT_ONCE]]
            self._roster.call("replay", part, changes=True)
            self._roster.past.updates += part

    def checksum(self) -> str:
        """Return the checksum of the weights of all. Raises EngineError when no majority has the same."""
        return self._agreed(self._roster.call("checksum"))

    def state(self) -> Mapping[str, "Tensor"]:
        """Return masters and optimizer state of one engine."""
        state: Mapping[str, Tensor] = self._with_one(self._fetch_state)
        if len(self._roster.past.updates) > REPLAY_AT_MOST:
            self._roster.past.loaded(Call(-1, "load_state", (state,)))
        return state

    def load_state(self, state: Mapping[str, "Tensor"]) -> None:
        """Restore what `state` returned, everywhere."""
        self._load("load_state", state)

    def load_weights(self, weights: Mapping[str, "Tensor"]) -> None:
        """Serve other weights everywhere."""
        self._load("load_weights", {name: tensor.detach().cpu() for name, tensor in weights.items()})

    def export(self, directory: Path) -> None:
        """Write the served model as a Hugging Face directory, by an engine that sees it if there is one."""

        def export(replica: Replica) -> None:
            if self._is_near(replica):
                self._roster.ask(replica, "export", directory)
            else:
                self._fetch_export(replica, directory)

        self._with_one(export)

    def metrics(self) -> dict[str, float]:
        """Return the number of engines, and what happened since the last call: losses, idleness, replays, bytes."""
        roster = self._roster
        row = {
            "engines": len(roster.live),
            "engines/lost": roster.lost,
            "engines/idle": self._idle_seconds / self._sampling_seconds if self._sampling_seconds else 0.0,
            "time/replay": roster.replay_seconds,
            "wire/out": roster.bytes_out,
            "wire/in": roster.bytes_in,
            "memory/peak_gib": max((replica.peak for replica in roster.replicas), default=0) / GIB,
        }
        roster.lost = roster.bytes_out = roster.bytes_in = 0
        roster.replay_seconds = 0.0
        self._sampling_seconds = self._idle_seconds = 0.0
        return row

    def close(self) -> None:
        """End the engines. Raises nothing: what it may follow is more important."""
        try:
            self._roster.close(Stop(), CLOSE_SECONDS)
        except Exception as error:
            log.warning("closing the engines: %s: %s", type(error).__name__, error)
        finally:
            self._launcher.close()
            self.watchdog.close()

    def _feed(self, replica: Replica) -> None:
        """Give an engine its share of the job."""
        job = self._job
        if job is None or not (taken := job.shares.take(replica, len(self._roster.live))):
            return
        if replica not in job.knows:
            job.knows.add(replica)
            self._roster.post(replica, job.about)
        self._roster.post(replica, Work(job.about.job, tuple(job.items[request] for request in taken)))

    def _take_back(self, lost: Replica) -> int:
        """Give the work of a lost engine to the others."""
        if self._job is None or not (count := self._job.shares.lost(lost)):
            return 0
        for replica in self._roster.live:
            self._feed(replica)
        return count

    def _receive(self, replica: Replica, done: Done | Scores | Refused) -> None:
        job = self._job
        if job is None or done.job != job.about.job:
            return  # what was closed before it was answered
        if isinstance(done, Refused):
            raise done.failure.raised()
        job.arrived += [(i, answer) for i, answer in done.answers if job.shares.answered(replica, i)]
        self._feed(replica)

    def _is_working(self, replica: Replica) -> bool:
        return self._job is not None and self._job.shares.held(replica) > 0

    def _count_seconds(self, job: _Job, seconds: float) -> None:
        live = self._roster.live
        self._sampling_seconds += seconds * len(live)
        self._idle_seconds += seconds * sum(job.shares.held(replica) == 0 for replica in live)

    def _load(self, method: str, tensors: Mapping[str, "Tensor"]) -> None:
        self._roster.call(method, tensors, changes=True)
        self._roster.past.loaded(Call(-1, method, (tensors,)))

    def _is_near(self, replica: Replica) -> bool:
        return replica.started is not None and replica.started.node == self._launcher.node

    def _fetch_state(self, replica: Replica) -> dict[str, "Tensor"]:
        names: list[str] = self._roster.ask(replica, "pack_state")
        return {name: self._roster.ask(replica, "take", name) for name in names}

    def _fetch_export(self, replica: Replica, directory: Path) -> None:
        files: Mapping[str, int] = self._roster.ask(replica, "pack_export")
        directory.mkdir(parents=True, exist_ok=True)
        for name, size in files.items():
            with (directory / name).open("wb") as file:
                while file.tell() < size:
                    file.write(self._roster.ask(replica, "read", name, file.tell()))
        self._roster.ask(replica, "discard_export")

    def _with_one(self, ask: Callable[[Replica], T]) -> T:
        """Ask one engine, one that sees our files first; another when it is lost meanwhile."""
        self._roster.begin_work()
        while True:
            while not self._roster.live:
                self._roster.round()
            first = sorted(self._roster.live, key=lambda replica: not self._is_near(replica))[0]
            with contextlib.suppress(EngineLostError):
                return ask(first)

    def _agreed(self, said: Mapping[Replica, T]) -> T:
        """Return what most engines say, and lose the others. Raises EngineError without a majority."""
        saying: dict[str, list[Replica]] = {}
        for replica, value in said.items():
            saying.setdefault(repr(value), []).append(replica)
        right, *wrong = sorted(saying.values(), key=len, reverse=True)
        if 2 * len(right) <= len(said):
            there = "; ".join(f"{', '.join(map(str, same))}: {value}" for value, same in saying.items())
            raise EngineError(
                f"the engines computed different weights, and no majority the same ({there}): use equal processors and "
                "versions, or one engine"
            )
        for replica in (replica for same in wrong for replica in same):
            self._roster.deviates(replica, right)
        return said[right[0]]
