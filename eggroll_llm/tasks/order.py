"""Which problems a step sees: a pure function of (seed, step), so that a resumed run sees what it would have seen."""

import random
from functools import lru_cache


def problems_of_step(count: int, per_step: int, *, seed: int, step: int) -> list[int]:
    """Return the indices of a step's problems, `step` counting from 1.

    The problems are gone through in epochs, each a fresh permutation of all `count`; a step may span two epochs.
    """
    first = (step - 1) * per_step
    return [_permutation(count, seed, at // count)[at % count] for at in range(first, first + per_step)]


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(count))
    random.Random(f"problems {seed} {epoch}").shuffle(order)
    return tuple(order)
