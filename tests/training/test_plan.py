"""One place turns configuration and journal into updates: training, resuming and replay cannot disagree."""

import dataclasses

import torch

from eggroll_llm.config.schema import RunConfig
from eggroll_llm.es.estimate import UpdateSpec
from eggroll_llm.es.settings import EsSettings
from eggroll_llm.records.journal import JournalEntry
from eggroll_llm.records.updates import journal_entry, recorded_update
from eggroll_llm.training.plan import plan_of

FITNESS = tuple(torch.tensor([0.1, -1.0, 0.0, 0.0]).tolist())


def config(**es: object) -> RunConfig:
    settings = {"population": 4, "sigma": 0.01, "learning_rate": 0.002, "rank": 3} | es
    return RunConfig(task="countdown", seed=9, steps=5, es=EsSettings(**settings))  # type: ignore[arg-type]


def test_what_a_step_records_is_what_its_update_needs() -> None:
    run = config(noise_reuse=2, sigma_schedule="linear", update_scale="literature")
    plan = plan_of(run, 4)
    update = UpdateSpec.of(plan, FITNESS)
    entry = journal_entry(update, dropped=(2, 3), checksum="abc")
    assert entry == JournalEntry(
        step=4,
        noise_step=3,
        fitness=FITNESS,
        sigma=plan.sigma,
        learning_rate=0.002,
        dropped=(2, 3),
        checksum="abc",
    )
    assert recorded_update(plan_of(run, entry.step), entry) == update
    assert (update.seed, update.rank, update.antithetic, update.scale) == (9, 3, True, "literature")


def test_the_update_takes_sigma_and_learning_rate_from_the_journal() -> None:
    """They may be scheduled over a number of steps that has changed since."""
    run = config(sigma_schedule="linear", learning_rate_schedule="linear")
    entry = journal_entry(UpdateSpec.of(plan_of(run, 3), FITNESS), dropped=(), checksum="")
    longer = dataclasses.replace(run, steps=50)
    assert plan_of(longer, 3).sigma != entry.sigma
    assert recorded_update(plan_of(longer, 3), entry) == recorded_update(plan_of(run, 3), entry)
