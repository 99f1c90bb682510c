"""Which engine answers which requests of a job: on demand, by whole groups, less and less at a time.

An engine that has had nothing yet gets an equal share of what is left, ceil(left / engines); whenever some of its
requests are answered, as many again as would be half such a share. So the shares shrink towards the end and all finish
together, however fast each is. It never holds more than `capacity`. A group, the requests of one member, stays together
(one slot, one prefix cache), so that a share may be exceeded by less than a group.
"""

from collections import deque
from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

E = TypeVar("E", bound=Hashable)


class Shares(Generic[E]):
    """Requests of a job, numbered, and the engines (any hashable) that have them."""

    def __init__(self, groups: Sequence[Sequence[int]], capacity: int) -> None:
        """Begin with all of them unassigned."""
        self._groups = deque(tuple(group) for group in groups)
        self._capacity = capacity
        self._held: dict[E, dict[int, int]] = {}  # engine -> request -> which of its groups, in order
        self._left = sum(map(len, self._groups))
        self._taken = 0  # groups handed out so far
        self.unanswered = self._left
        """Requests without an answer."""

    def held(self, engine: E) -> int:
        """Return how many requests an engine is answering."""
        return len(self._held.get(engine, ()))

    def take(self, engine: E, engines: int) -> list[int]:
        """Return the requests that an engine gets now, of `engines` that work; none when it has enough."""
        first = engine not in self._held
        mine = self._held.setdefault(engine, {})
        share = -(-self._left // (engines if first else 2 * engines))
        limit = min(self._capacity, len(mine) + share)
        taken: list[int] = []
        while self._groups and len(mine) < limit:
            group = self._groups.popleft()
            self._taken += 1
            mine |= dict.fromkeys(group, self._taken)
            taken += group
        self._left -= len(taken)
        return taken

    def answered(self, engine: E, request: int) -> bool:
        """Take note of an answer; return whether the engine had been given the request, and not answered it yet."""
        if self._held.get(engine, {}).pop(request, None) is None:
            return False
        self.unanswered -= 1
        return True

    def lost(self, engine: E) -> int:
        """Put what an engine has not answered before all else, in its groups; return how many requests that is."""
        groups: dict[int, list[int]] = {}
        for request, group in self._held.pop(engine, {}).items():
            groups.setdefault(group, []).append(request)
        self._groups.extendleft(tuple(group) for group in reversed(groups.values()))
        back = sum(map(len, groups.values()))
        self._left += back
        return back
