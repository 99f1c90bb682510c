"""The engines of a pool: started, brought up to the present, watched, replaced when they are lost.

An engine that starts late (a replacement in the middle of a step, or one for a machine that was added) gets what the
others have had: weights that were loaded, the updates since, the noise of the step, and the call under way. Its inbox
keeps the order, so that it may fall behind and catch up. It counts when the checksum of its weights is that of an
engine that counts, both taken at the same place in that order.
"""

import dataclasses
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

from eggroll_llm.engine.links import Launcher, Lost, Replica, Rules, Slot
from eggroll_llm.engine.messages import (
    Broken,
    Call,
    Done,
    Event,
    Failure,
    Message,
    Refused,
    Reply,
    Scores,
    Started,
    decode,
    encode,
)
from eggroll_llm.engine.watchdog import LATER, LOOKS
from eggroll_llm.errors import ConfigError, EngineError
from eggroll_llm.es.estimate import UpdateSpec

TICK = 0.5  # seconds at most that are waited at a time
REPLAYED_AT_ONCE = 10  # updates in one call, which has to end within the time limit


class EngineLostError(Exception):
    """The engine that was asked has been lost before it answered."""


class Past:
    """What an engine has to be sent to be where the others are; kept on disk where it is large."""

    def __init__(self) -> None:
        self.begin: Call | None = None
        self.updates: list[UpdateSpec] = []
        self._weights: Any = None

    def loaded(self, call: Call) -> None:
        """Take weights that were loaded as what all begins with. Raises EngineError where they cannot be kept."""
        self.close()
        frame = encode(call)
        try:
            self._weights = tempfile.TemporaryFile()  # noqa: SIM115 - `close` closes it
            self._weights.write(frame)
            self._weights.flush()
        except OSError as error:
            raise EngineError(
                f"{tempfile.gettempdir()}: cannot keep {len(frame)} bytes of weights, for engines that join later "
                f"({error.strerror}): set TMPDIR to a folder with room"
            ) from error
        self.updates.clear()

    def close(self) -> None:
        """Forget weights that were loaded."""
        if self._weights is not None:
            self._weights.close()
        self._weights = None

    def calls(self, ids: Iterator[int]) -> Iterator[Call]:
        """Yield the calls that repeat it."""
        if self._weights is not None:
            self._weights.seek(0)
            call = decode(self._weights.read())
            yield dataclasses.replace(call, id=next(ids))
        for i in range(0, len(self.updates), REPLAYED_AT_ONCE):
            yield Call(next(ids), "replay", (self.updates[i : i + REPLAYED_AT_ONCE],))
        if self.begin:
            yield dataclasses.replace(self.begin, id=next(ids))


class Roster:
    """Every engine there is, and the calls that all of them get."""

    def __init__(
        self,
        launcher: Launcher,
        rules: Rules,
        say: Callable[[str], None],
        *,
        on_live: Callable[[Replica], None],
        on_lost: Callable[[Replica], int],
        on_done: Callable[[Replica, Done | Scores | Refused], None],
        has_work: Callable[[Replica], bool],
    ) -> None:
        """Know how to start engines, and start none. `on_lost` returns how many requests go to others."""
        self.launcher, self.rules, self.say = launcher, rules, say
        self.replicas: list[Replica] = []
        self.past = Past()
        self.on_live, self.on_lost, self.on_done, self.has_work = on_live, on_lost, on_done, has_work
        self.lost = self.bytes_out = self.bytes_in = 0
        self.replay_seconds = 0.0
        """Spent by engines that joined, on what the others had had."""
        self._ids, self._numbers = count(), count(1)
        self._complete = False
        self._changes = 0  # of the weights, so far
        self._checksums: dict[int, str] = {}  # after so many changes, of engines that count
        self._repeated: set[int] = set()  # calls that bring an engine up to the present
        self._active: Call | None = None  # of all engines, under way
        self._awaited = -1  # the call whose replies are collected
        self._replies: dict[Replica, Reply] = {}
        self.given_up: Counter[str] = Counter()
        """Places that are not filled again, by machine (`Started.node`); none of those that are left out."""
        self._deviated: set[str] = set()  # hosts on which an engine has had other weights than the others
        self._left_out: dict[str, str] = {}  # hosts on which one has had them again -> why
        self._failed_once = False  # an engine, in the active call or job
        self._looked, self._short = time.monotonic(), 0

    @property
    def live(self) -> list[Replica]:
        """Return the engines that count."""
        return [replica for replica in self.replicas if replica.live]

    def start(self) -> None:
        """Start the engines and wait until all are there. Raises what keeps one from starting."""
        self.add(self.rules.engines)
        while not all(replica.live for replica in self.replicas):
            self.round()
        self._complete = True

    def add(self, engines: int) -> None:
        """Start engines that were not there; they count when they are ready."""
        for _ in range(engines):
            self._fill(Slot(next(self._numbers)))

    def round(self) -> None:
        """Handle what has come, or wait for something to come, for `TICK` at most; look whether an engine hangs."""
        of_link = {id(replica.link): replica for replica in self.replicas}
        tick = min(TICK, self.rules.timeout / LOOKS) if self.rules.timeout else TICK
        for link, arrived in self.launcher.wait([replica.link for replica in self.replicas], tick):
            replica = of_link[id(link)]
            if replica not in self.replicas:
                continue  # it was lost a moment ago
            replica.silent = 0
            if isinstance(arrived, Lost):
                self.lose(replica, arrived.why)
            else:
                self.bytes_in += len(arrived)
                self._handle(replica, decode(arrived))
        self._look()

    def post(self, replica: Replica, message: Message) -> None:
        """Send a message to an engine."""
        self._post(replica, message, encode(message))

    def post_all(self, message: Message) -> None:
        """Send a message to all that have started."""
        frame = encode(message)
        for replica in self.replicas:
            if replica.started:
                self._post(replica, message, frame)

    def call(self, method: str, *args: Any, changes: bool = False, **keywords: Any) -> dict[Replica, Any]:
        """Call a method of every engine; return what those that count returned, one at least.

        `changes`: of the weights. An engine that fails where others do not is lost. Raises what all of them raise, and
        EngineError when a second one fails as the first did.
        """
        self._active = call = Call(next(self._ids), method, args, keywords)
        self._awaited, self._replies = call.id, {}
        self.begin_work()
        self._changes += changes
        try:
            self.post_all(call)
            while not (replies := self._counted()) or any(r.live and call.id in r.calls for r in self.replicas):
                self.round()
        finally:
            self._active, self._awaited = None, -1
        failed = {replica: reply.failure for replica, reply in replies.items() if reply.failure}
        if len(failed) == len(replies):
            raise next(iter(failed.values())).raised()
        for replica, failure in failed.items():
            self.lose(replica, failure.text)
        return {replica: reply.value for replica, reply in replies.items() if not reply.failure}

    def ask(self, replica: Replica, method: str, *args: Any) -> Any:
        """Call a method of one engine and return what it returned. Raises EngineLostError when it is lost meanwhile."""
        self._awaited, self._replies = next(self._ids), {}
        self.post(replica, Call(self._awaited, method, args))
        while replica in self.replicas:
            if reply := self._replies.get(replica):
                if reply.failure:
                    raise reply.failure.raised(str(replica))
                return reply.value
            self.round()
        raise EngineLostError(str(replica))

    def _counted(self) -> dict[Replica, Reply]:
        """Return the replies of engines that count; where there is none, those of others."""
        replies = {replica: reply for replica, reply in self._replies.items() if replica in self.replicas}
        return {replica: reply for replica, reply in replies.items() if replica.live} or replies

    def begin_work(self) -> None:
        """Forget failures of what was done before: two in the same call or job end it."""
        self._failed_once = False

    def deviates(self, replica: Replica, right: Sequence[Replica]) -> None:
        """Lose an engine that has other weights than those that are right.

        The second time on a machine it is not replaced, and the machine is left out if engines on others are right.
        """
        assert replica.started
        here = replica.started
        others = [other.started for other in right if other.started]
        there = next((other for other in others if other.host != here.host), others[0])
        why = (
            f"{here.host} ({here.device}) computes other bits than {there.host} ({there.device}): use equal processors "
            "and versions, or leave it out"
        )
        if here.host in self._deviated:
            self._give_up(replica, why, "the second time on its machine", alone=there.host != here.host)
        self._deviated.add(here.host)
        self._checksums.clear()  # which may be this engine's
        self.lose(replica, why)

    def _give_up(self, replica: Replica, why: str, shown: str, *, alone: bool) -> None:
        """Fill the place of an engine no more, and where it is `alone` on its machine, start none there."""
        assert replica.started
        replica.slot.given_up = shown
        if alone:
            self._left_out[replica.started.host] = why
            self.launcher.avoid(replica.started.node)
        elif replica.started.host not in self._left_out:
            self.given_up[replica.started.node] += 1

    def lose(self, replica: Replica, why: str, failure: Failure | None = None) -> None:
        """Leave an engine out from now on, and start another in its place if that is allowed.

        Raises EngineError when too few are left, and the failure of an engine that never started.
        """
        self.replicas.remove(replica)
        replica.link.kill()
        if not self._complete and replica.started is None:  # the user's to correct, and not better the next time
            raise failure.raised() if failure else EngineError(f"{replica} did not start: {why}")
        self.lost += 1
        slot = replica.slot
        again = slot.restarts < self.rules.restarts and not slot.given_up
        waiting = self.on_lost(replica)
        work = f"; {waiting} completions go to others" if waiting else ""
        if not again and not slot.given_up:
            slot.given_up = f"engine.restart = {self.rules.restarts}"
            if failure and replica.started:  # else its machine may come back
                self.given_up[replica.started.node] += 1
        end = "a replacement is starting" if again else f"it is not replaced ({slot.given_up})"
        self.say(f"{replica} lost ({why}){work}; {end}")
        if again:
            slot.restarts += 1
            self._fill(slot)
        if len(self.replicas) < max(1, self.rules.least):
            raise EngineError(
                f"{len(self.replicas)} engines are left, engine.min_replicas = {self.rules.least}; the last loss: {why}"
            )
        self._compare_newcomers()

    def close(self, last_words: Message, seconds: float) -> None:
        """Ask every engine to end, and kill what has not ended after `seconds`."""
        self.post_all(last_words)
        ending = [replica.link for replica in self.replicas if replica.started]
        deadline = time.monotonic() + seconds
        while ending and (left := deadline - time.monotonic()) > 0:
            for link, arrived in self.launcher.wait(ending, min(TICK, left)):
                if isinstance(arrived, Lost):
                    ending.remove(link)
        for replica in self.replicas:
            replica.link.kill()
        self.replicas.clear()
        self.past.close()

    def _fill(self, slot: Slot) -> None:
        self.replicas.append(Replica(slot, self.launcher.start(slot.number)))

    def _post(self, replica: Replica, message: Message, frame: bytes) -> None:
        if isinstance(message, Call):
            replica.calls[message.id] = message.method, self._changes
        self.bytes_out += len(frame)
        replica.link.post(frame)

    def _handle(self, replica: Replica, event: Event) -> None:
        match event:
            case Started():
                replica.started = event
                self._admit(replica, event)
            case Reply():
                self._take_reply(replica, event)
            case Done() | Scores() | Refused():
                self.on_done(replica, event)
            case Broken(failure=failure):
                self._fails(replica, failure)

    def _admit(self, replica: Replica, started: Started) -> None:
        """Check what an engine runs on, and send it all that it needs to join."""
        others = [other.started for other in self.replicas if other.started and other is not replica]
        problem = self._left_out.get(started.host) or (_mismatch(started, others[0]) if others else "")
        if problem:
            if not self._complete:
                raise ConfigError(problem)
            alone = started.host not in {other.host for other in others}
            self._give_up(replica, problem, "its machine is not like the others", alone=alone)
            self.lose(replica, problem)
            return
        for call in self.past.calls(self._ids):
            self._repeated.add(call.id)
            self.post(replica, call)
        if self._active:
            self.post(replica, self._active)
        if self.rules.trainable:
            self._ask_checksum(replica)
        else:
            self._joins(replica)

    def _ask_checksum(self, newcomer: Replica) -> None:
        """Have the weights compared with those of an engine that counts, at the same place in what both are sent."""
        newcomer.checksum = None
        compared = [newcomer]
        if self._changes not in self._checksums:
            compared += self.live[:1]
        for replica in compared:
            self.post(replica, Call(next(self._ids), "checksum"))

    def _take_reply(self, replica: Replica, reply: Reply) -> None:
        method, changes = replica.calls.pop(reply.id)
        replica.peak = max(replica.peak, reply.peak)
        awaited = reply.id == self._awaited
        if reply.failure and (reply.failure.of_the_engine or not awaited):
            self._fails(replica, reply.failure)
            return
        if awaited:
            self._replies[replica] = reply
        if reply.id in self._repeated:
            self._repeated.remove(reply.id)
            self.replay_seconds += reply.seconds
        if method == "checksum":
            if replica.live:
                self._checksums.setdefault(changes, reply.value)
            else:
                replica.checksum = changes, reply.value
            self._compare_newcomers()

    def _compare_newcomers(self) -> None:
        for replica in [replica for replica in self.replicas if not replica.live and replica.checksum]:
            if replica not in self.replicas or not replica.checksum:
                continue
            changes, checksum = replica.checksum
            if not self.live:
                self._checksums.setdefault(changes, checksum)  # nobody has others
            if changes not in self._checksums:
                if not any(
                    ("checksum", changes) in other.calls.values() for other in self.live
                ):  # the one that was asked is lost
                    self._ask_checksum(replica)
            elif self._checksums[changes] == checksum:
                self._joins(replica)
            else:
                self.deviates(replica, self.live or [replica])

    def _joins(self, replica: Replica) -> None:
        replica.live, replica.checksum = True, None
        if self._complete:
            self.say(f"{replica} joins")
        self.on_live(replica)

    def _fails(self, replica: Replica, failure: Failure) -> None:
        """Lose an engine that failed. Raises the failure when it is the second one in the same call or job."""
        if replica.started and self._failed_once:
            raise failure.raised(str(replica))
        self._failed_once |= replica.started is not None
        self.lose(replica, failure.text, failure)

    def _look(self) -> None:
        """Count looks and not seconds, as the watchdog does: a driver that was stopped takes no engine for hanging."""
        limit, now = self.rules.timeout, time.monotonic()
        if not limit or now < self._looked + limit / LOOKS:
            return
        self._looked = now
        for replica in list(self.replicas):
            busy = replica.calls or self.has_work(replica) or replica.started is None
            replica.silent = replica.silent + 1 if busy else 0
            # Engines that start at the same time on the same machine wait for each other.
            if replica.silent > (LOOKS + LATER) * (1 if replica.started else len(self.replicas)):
                what = "no progress for" if replica.started else "not started after"
                self.lose(replica, f"{what} engine.timeout_seconds = {limit:g} seconds")
        self._short = self._short + 1 if self._complete and len(self.live) < self.rules.least else 0
        if self._short > LOOKS:
            raise EngineError(
                f"{len(self.live)} engines work, fewer than engine.min_replicas = {self.rules.least} for "
                f"engine.timeout_seconds = {limit:g} seconds"
            )


def _mismatch(here: Started, there: Started) -> str:
    """Return what keeps two engines from computing the same bits; empty where nothing is known to."""
    facts = [("runs on", here.device, there.device)]
    for name in sorted(here.versions.keys() | there.versions.keys()):
        facts.append((f"has {name}", here.versions.get(name, "none"), there.versions.get(name, "none")))
    for what, mine, other in facts:
        if mine != other:
            return (
                f"{here.host} {what} {mine}, {there.host} {what} {other}: engines compute the same bits on equal "
                "processors with equal versions only; leave one of the machines out"
            )
    return ""
