"""A step's plan is a function of (settings, seed, step)."""

import math

import pytest

from eggroll_llm.es.noise import NoiseSpec
from eggroll_llm.es.plan import StepPlan, plan_step, schedule
from eggroll_llm.es.settings import EsSettings


def plan(step: int, *, steps: int = 5, **settings: object) -> StepPlan:
    base = {"population": 4, "sigma": 0.01, "learning_rate": 0.002, "rank": 3}
    return plan_step(EsSettings(**base | settings), seed=9, step=step, steps=steps)  # type: ignore[arg-type]


def test_noise_changes_every_step_unless_it_is_reused() -> None:
    assert [plan(step).noise_step for step in range(1, 8)] == [1, 2, 3, 4, 5, 6, 7]
    assert [plan(step, noise_reuse=3).noise_step for step in range(1, 8)] == [1, 1, 1, 4, 4, 4, 7]
    assert plan(5, noise_reuse=3).noise == NoiseSpec(seed=9, step=4, rank=3, sigma=0.01)


def test_schedules_go_from_the_first_step_to_the_last() -> None:
    linear = {"sigma_schedule": "linear", "learning_rate_schedule": "cosine", "schedule_end": 0.5}
    assert [plan(step, **linear).sigma for step in (1, 3, 5)] == pytest.approx([0.01, 0.0075, 0.005])
    assert [plan(step, **linear).learning_rate for step in (1, 3, 5)] == pytest.approx([0.002, 0.0015, 0.001])
    # A run that is resumed to more steps than the schedule knew stays at its end.
    assert plan(9, **linear).sigma == pytest.approx(0.005)


def test_schedules_by_hand() -> None:
    assert [schedule("constant", 2.0, step, 0, 0.1) for step in (0, 9, 500)] == [2.0] * 3
    assert [schedule("linear", 2.0, step, 5, 0.5) for step in range(5)] == [2.0, 1.75, 1.5, 1.25, 1.0]
    cosine = [schedule("cosine", 2.0, step, 5, 0.5) for step in range(5)]
    assert cosine == pytest.approx([2.0, 1.5 + math.sqrt(2) / 4, 1.5, 1.5 - math.sqrt(2) / 4, 1.0])
    assert schedule("linear", 2.0, 50, 5, 0.5) == 1.0
    assert schedule("linear", 2.0, 0, 1, 0.5) == 2.0


@pytest.mark.parametrize(("kind", "steps", "message"), [("linear", 0, "needs steps above 0"), ("step", 5, "'step'")])
def test_impossible_schedules_are_refused(kind: str, steps: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedule(kind, 1.0, 0, steps, 0.1)  # type: ignore[arg-type]
