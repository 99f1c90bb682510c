"""The problems of a step: every one once an epoch, in an order of its own, from (seed, step) alone."""

import pytest

from eggroll_llm.tasks.order import SkippingOrder, problems_of_step


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


def test_without_ties_nothing_is_passed_over() -> None:
    order = SkippingOrder(10, seed=0)
    for indices in steps(10, 4, 9):
        assert order.take(4) == indices
        assert order.skipped == 0
        order.saw(indices, ())


def test_problems_that_always_tie_come_less_often_but_come() -> None:
    """Half of forty problems always tie; 200 steps of ten."""
    order, came = SkippingOrder(40, seed=0), [0] * 40
    for _ in range(200):
        indices = order.take(10)
        for index in indices:
            came[index] += 1
        order.saw(indices, [position for position, index in enumerate(indices) if index < 20])
    teaching, tying = came[20:], came[:20]
    assert min(teaching) > 3 * max(tying)
    assert min(tying) > 2
    assert order.skipped > 0


def test_the_same_ties_make_the_same_order() -> None:
    one, other = SkippingOrder(12, seed=3), SkippingOrder(12, seed=3)
    for step in range(30):
        indices = one.take(5)
        assert indices == other.take(5)
        for order in (one, other):
            order.saw(indices, [step % 5, 4])
