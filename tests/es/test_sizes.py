"""Sigma and learning rate from measured divergences: the law, what follows, and the recipes that its constants fit."""

import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eggroll_llm.es.optimizer import take_step
from eggroll_llm.es.plan import schedule
from eggroll_llm.es.settings import EsSettings
from eggroll_llm.es.sizes import DIVERGENCE, PATH, Law, Measured, learning_rate_for, next_sigma

RECIPES = Path(__file__).parents[2] / "recipes"


@given(st.floats(1e-6, 1e6), st.floats(0, 0.01), st.floats(0.3, 3))
def test_two_measurements_determine_the_law(curvature: float, floor: float, part: float) -> None:
    law = Law(floor=floor, curvature=curvature)
    sigmas = (part * law.sigma, part * law.sigma / 2)
    found = Law.through(*(Measured(sigma=sigma, divergence=law.divergence(sigma)) for sigma in sigmas))
    assert found.curvature == pytest.approx(curvature, rel=1e-3)
    assert found.divergence(found.sigma) == pytest.approx(floor + DIVERGENCE, rel=1e-3)


def test_a_law_has_no_negative_floor_and_must_rise() -> None:
    low, high = Measured(sigma=1.0, divergence=0.001), Measured(sigma=2.0, divergence=0.04)
    assert Law.through(high, low) == Law(floor=0.0, curvature=0.01)
    with pytest.raises(ValueError, match="no rise"):
        Law.through(low, Measured(sigma=2.0, divergence=0.001))


@given(st.floats(1e-8, 1e8), st.floats(0, 0.01))
def test_a_sigma_that_is_close_is_found_from_anywhere_within_two_orders(curvature: float, floor: float) -> None:
    law = Law(floor=floor, curvature=curvature)

    def measure(sigma: float) -> Measured:
        return Measured(sigma=sigma, divergence=min(law.divergence(sigma), 20.0))  # of a model that is destroyed

    for start in (law.sigma / 100, law.sigma * 100):
        measured = measure(start)
        for _ in range(5):
            measured = measured if measured.close else measure(next_sigma(measured))
        assert measured.close


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"learning_rate_schedule": "linear"},
        {"learning_rate_schedule": "cosine", "schedule_end": 0.0},
        {"optimizer": "momentum", "momentum": 0.8},
        {"fitness_from": "probabilities"},
    ],
    ids=str,
)
def test_random_updates_of_a_whole_run_move_the_weights_by_their_part_of_sigma(changes: dict[str, Any]) -> None:
    """By the optimizer itself, of 500 steps in each of 4,000 weights."""
    settings, steps, sigma = EsSettings(**changes), 500, 0.01
    rate = learning_rate_for(sigma, settings, steps)
    generator = torch.Generator().manual_seed(0)
    weight, state = torch.zeros(4000), {}
    for step in range(steps):
        now = schedule(settings.learning_rate_schedule, rate, step, steps, settings.schedule_end)
        gradient = torch.randn(4000, generator=generator)
        if settings.optimizer == "sgd":
            weight -= now * gradient
        else:
            state = take_step(settings, weight, gradient, state, now)
    assert float(weight.square().mean().sqrt()) == pytest.approx(PATH[settings.fitness_from] * sigma, rel=0.05)


@pytest.mark.parametrize(("recipe", "curvature"), [("addition_smollm2", 2170), ("countdown_smollm2", 943)])
def test_the_recipes_lie_within_a_factor_of_two(recipe: str, curvature: float) -> None:
    """Curvatures as they were measured, docs/tuning.md."""
    table = tomllib.loads((RECIPES / f"{recipe}.toml").read_text(encoding="utf-8"))
    settings = EsSettings(**table["es"])
    sigma = Law(floor=0.0, curvature=curvature).sigma
    rate = learning_rate_for(sigma, settings, table["steps"])
    for found, known in ((sigma, settings.sigma), (rate, settings.learning_rate)):
        assert abs(math.log2(found / known)) < 1
