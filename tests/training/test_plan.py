"""One place turns configuration and journal into noise and update: training, resuming and replay cannot disagree."""

import dataclasses

import pytest
import torch

from eggroll_llm.config.schema import RunConfig
from eggroll_llm.es.estimate import UpdateSpec
from eggroll_llm.es.fitness import Fitness
from eggroll_llm.es.noise import NoiseSpec
from eggroll_llm.es.optimizer import OptimizerSettings
from eggroll_llm.es.settings import EsSettings
from eggroll_llm.records.journal import JournalEntry
from eggroll_llm.training.plan import (
    learning_rate_at,
    noise_of,
    noise_step,
    optimizer_settings,
    sigma_at,
    step_entry,
    update_spec,
)

FITNESS = Fitness(fitness_M=torch.tensor([0.1, -1.0, 0.0, 0.0]), dropped=(2, 3), tied_prompts=0, all_tied=False)


def config(**es: object) -> RunConfig:
    settings = {"population": 4, "sigma": 0.01, "learning_rate": 0.002, "rank": 3} | es
    return RunConfig(task="countdown", seed=9, steps=5, es=EsSettings(**settings))  # type: ignore[arg-type]


def test_noise_changes_every_step_unless_it_is_reused() -> None:
    assert [noise_step(config(), step) for step in range(1, 8)] == [1, 2, 3, 4, 5, 6, 7]
    assert [noise_step(config(noise_reuse=3), step) for step in range(1, 8)] == [1, 1, 1, 4, 4, 4, 7]
    assert noise_of(config(noise_reuse=3), 5) == NoiseSpec(seed=9, step=4, rank=3, sigma=0.01)


def test_schedules_go_from_the_first_step_to_the_last() -> None:
    linear = config(sigma_schedule="linear", learning_rate_schedule="cosine", schedule_end=0.5)
    assert [sigma_at(linear, step) for step in (1, 3, 5)] == pytest.approx([0.01, 0.0075, 0.005])
    assert [learning_rate_at(linear, step) for step in (1, 3, 5)] == pytest.approx([0.002, 0.0015, 0.001])
    assert noise_of(linear, 3).sigma == sigma_at(linear, 3)
    # A run that is resumed to more steps than the schedule knew stays at its end.
    assert sigma_at(linear, 9) == pytest.approx(0.005)


def test_what_a_step_records_is_what_its_update_needs() -> None:
    run = config(noise_reuse=2, sigma_schedule="linear", update_scale="literature")
    entry = step_entry(run, 4, FITNESS, checksum="abc")
    assert entry == JournalEntry(
        step=4,
        noise_step=3,
        fitness=tuple(FITNESS.fitness_M.tolist()),
        sigma=sigma_at(run, 4),
        learning_rate=0.002,
        dropped=(2, 3),
        checksum="abc",
    )
    assert torch.tensor(entry.fitness[0]) == FITNESS.fitness_M[0]  # exactly a float32
    update = update_spec(run, entry)
    assert update == UpdateSpec(
        step=4,
        noise_step=3,
        seed=9,
        rank=3,
        sigma=sigma_at(run, 4),
        learning_rate=0.002,
        fitness_M=entry.fitness,
        antithetic=True,
        scale="literature",
    )
    assert update.noise == noise_of(run, 4)


def test_the_update_takes_sigma_and_learning_rate_from_the_journal() -> None:
    """They may be scheduled over a number of steps that has changed since."""
    entry = step_entry(config(sigma_schedule="linear"), 3, FITNESS, checksum="")
    longer = dataclasses.replace(config(sigma_schedule="linear"), steps=50)
    assert sigma_at(longer, 3) != entry.sigma
    assert update_spec(longer, entry).sigma == entry.sigma


def test_every_setting_of_the_optimizer_is_passed_on() -> None:
    values = {"momentum": 0.8, "adam_beta1": 0.7, "adam_beta2": 0.6, "adam_eps": 1e-5}
    assert optimizer_settings(config(optimizer="adam", **values)) == OptimizerSettings(name="adam", **values)
