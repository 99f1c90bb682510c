"""Configuration and fitness -> update -> journal entry, and back: training, resuming and replay share it."""

import dataclasses

from eggroll_llm.config.schema import RunConfig
from eggroll_llm.es.estimate import UpdateSpec
from eggroll_llm.es.plan import StepPlan, plan_step
from eggroll_llm.records.journal import JournalEntry


def plan_of(config: RunConfig, step: int) -> StepPlan:
    """Return the plan of a step (from 1) of a run."""
    return plan_step(config.es, seed=config.seed, step=step, steps=config.steps)


def members_that_answer(config: RunConfig) -> int:
    """Return how many models answer the problems of a step: the population, or the one that is trained."""
    return config.es.population if config.members_answer else 1


def journal_entry(
    update: UpdateSpec, *, dropped: tuple[int, ...], tied: tuple[int, ...] = (), checksum: str
) -> JournalEntry:
    """Return what the journal records of an update."""
    return JournalEntry(
        step=update.step,
        noise_step=update.noise_step,
        fitness=update.fitness_M,
        sigma=update.sigma,
        learning_rate=update.learning_rate,
        dropped=dropped,
        tied=tied,
        checksum=checksum,
    )


def recorded_update(config: RunConfig, entry: JournalEntry) -> UpdateSpec:
    """Return the update that a journal entry records.

    Sigma and learning rate are the entry's, because the schedule may have another number of steps by now.
    """
    recorded = dataclasses.replace(
        plan_of(config, entry.step),
        noise_step=entry.noise_step,
        sigma=entry.sigma,
        learning_rate=entry.learning_rate,
    )
    return UpdateSpec.of(recorded, entry.fitness)
