"""Which problems a step sees, so that a resumed run sees what it would have seen.

A pure function of (seed, step); or, where problems that teach nothing are passed over, of the seed and of what was seen
before, which is in the journal.
"""

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TypeVar

Row = TypeVar("Row")


def problems_of_step(count: int, per_step: int, *, seed: int, step: int) -> list[int]:
    """Return the indices of a step's problems, `step` counting from 1.

    The problems are gone through in epochs, each a fresh permutation of all `count`; a step may span two epochs.
    """
    first = (step - 1) * per_step
    return [_permutation(count, seed, at // count)[at % count] for at in range(first, first + per_step)]


def split_off(rows: Sequence[Row], share: float, *, seed: int) -> tuple[list[Row], list[Row]]:
    """Return the rows to train on, and a share of at least one for the test; none for it when none would be left."""
    wanted = max(1, round(share * len(rows)))
    if wanted >= len(rows):
        return list(rows), []
    held = set(random.Random(f"dataset split {seed}").sample(range(len(rows)), wanted))
    return [row for i, row in enumerate(rows) if i not in held], [row for i, row in enumerate(rows) if i in held]


class SkippingOrder:
    """The order of `problems_of_step`, passing over problems as often as their answers are expected to tie.

    Of a problem that came n times and tied t times, that is taken to be t / (n + 1): never for one that has not come or
    not tied yet, and never for sure, so that every problem comes back.
    """

    def __init__(self, count: int, *, seed: int) -> None:
        """Begin with the first step of `count` problems."""
        self._count, self._seed, self._at = count, seed, 0
        self._came: Counter[int] = Counter()
        self._tied: Counter[int] = Counter()
        self.skipped = 0
        """Problems that the last `take` has passed over."""

    def take(self, per_step: int) -> list[int]:
        """Return the indices of the next step's problems."""
        taken: list[int] = []
        self.skipped = 0
        while len(taken) < per_step:
            epoch, place = divmod(self._at, self._count)
            index = _permutation(self._count, self._seed, epoch)[place]
            chance = self._tied[index] / (self._came[index] + 1)
            if random.Random(f"skip {self._seed} {self._at}").random() < chance:
                self.skipped += 1
            else:
                taken.append(index)
            self._at += 1
        return taken

    def saw(self, indices: Sequence[int], tied: Iterable[int]) -> None:
        """Take note of a step's problems, and of those of them, by position, that tied."""
        self._came.update(indices)
        self._tied.update(indices[position] for position in tied)


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(count))
    random.Random(f"problems {seed} {epoch}").shuffle(order)
    return tuple(order)
