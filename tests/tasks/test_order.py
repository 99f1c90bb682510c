"""The problems of a step: every one once an epoch, in an order of its own, from (seed, step) alone."""

import pytest

from eggroll_llm.tasks.order import problems_of_step


def steps(count: int, per_step: int, number: int, seed: int = 0) -> list[list[int]]:
    return [problems_of_step(count, per_step, seed=seed, step=step) for step in range(1, number + 1)]


@pytest.mark.parametrize(("count", "per_step"), [(12, 4), (10, 4), (7, 3), (5, 5), (1, 1)])
def test_every_epoch_holds_every_problem_once(count: int, per_step: int) -> None:
    seen = [index for indices in steps(count, per_step, 3 * count) for index in indices]
    for epoch in range(3 * per_step):
        assert sorted(seen[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_epochs_are_shuffled_differently() -> None:
    epochs = steps(50, 50, 3)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert list(range(50)) not in epochs


def test_a_step_depends_on_seed_and_step_alone() -> None:
    forwards = steps(10, 4, 9)
    backwards = [problems_of_step(10, 4, seed=0, step=step) for step in range(9, 0, -1)]
    assert forwards == backwards[::-1]
    assert steps(10, 4, 9, seed=1) != forwards


def test_a_step_may_want_more_problems_than_there_are() -> None:
    (indices,) = steps(3, 8, 1)
    assert sorted(indices[:3]) == sorted(indices[3:6]) == [0, 1, 2]
    assert len(indices) == 8


def test_the_order_does_not_change_between_versions() -> None:
    """A resumed run sees the problems that it would have seen."""
    assert problems_of_step(10, 3, seed=7, step=1) == [0, 4, 6]
