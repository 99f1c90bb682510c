"""Engines in other processes, as a pool sees them: how they are reached, and what is known of each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from eggroll_llm.engine.messages import Started


@dataclass(frozen=True, slots=True)
class Lost:
    """The process of an engine has ended."""

    why: str


class Link(Protocol):
    """The way to one engine."""

    def post(self, frame: bytes) -> None:
        """Send a message. To an engine that is lost it goes nowhere."""
        ...

    def kill(self) -> None:
        """End the process at once, if it has not ended."""
        ...


class Launcher(Protocol):
    """Starts engines in other processes and hears from them."""

    node: str
    """What the driver has in common with the engines that see its files, see `Started`."""

    def start(self, number: int) -> Link:
        """Start the engine of that number, from 1; its first event says that it is there."""
        ...

    def wait(self, links: Sequence[Link], timeout: float) -> list[tuple[Link, bytes | Lost]]:
        """Return what came from these, some of it at least, waiting for at most `timeout` seconds."""
        ...

    def spare(self, engines: int, given_up: Mapping[str, int]) -> int:
        """Return how many there is room for besides these, where their number is left to the machines; else 0.

        `given_up`: places on machines (`Started.node`) that are not filled again.
        """
        ...

    def avoid(self, node: str) -> None:
        """Start no engine on a machine (`Started.node`) any more, and count no room there."""
        ...

    def close(self) -> None:
        """End what is needed for starting engines. Raises nothing."""
        ...


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How many engines, and what is done when one fails."""

    engines: int
    least: int
    """Fewer for longer than the time limit end the run."""
    restarts: int
    """Replacements of each engine."""
    timeout: float
    """Seconds without progress after which an engine is ended; 0 sets no limit."""
    trainable: bool
    """The weights have a checksum."""


@dataclass(eq=False)
class Slot:
    """A place for an engine, and for those that replace it."""

    number: int
    restarts: int = 0
    given_up: str = ""
    """Why no engine is started there any more."""


@dataclass(eq=False)
class Replica:
    """An engine in another process, as the driver knows it."""

    slot: Slot
    link: Link
    started: Started | None = None
    live: bool = False
    """It counts: it has the weights of the others, and gets work."""
    calls: dict[int, tuple[str, int]] = field(default_factory=dict)
    """Calls without a reply -> method, and how often the weights had changed when it was called."""
    checksum: tuple[int, str] | None = None
    """Of one that does not count yet: after how many changes of the weights, and what it was."""
    silent: int = 0
    """Consecutive looks at which it was busy and had reported nothing."""
    peak: int = 0
    """Most memory resident, in bytes."""

    def __str__(self) -> str:
        where = f" on {self.started.host}" if self.started else ""
        return f"engine {self.slot.number}{where}"
