"""An update, what the journal records of it, and back: training, resuming and replay share it."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from eggroll_llm.errors import JournalError
from eggroll_llm.es.estimate import UpdateSpec
from eggroll_llm.es.plan import StepPlan
from eggroll_llm.records.journal import JournalEntry

CHECKSUM_EVERY = 10  # steps between checksums of the weights in the journal


def journal_entry(
    update: UpdateSpec, *, dropped: tuple[int, ...] = (), tied: tuple[int, ...] = (), checksum: str
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


def recorded_update(plan: StepPlan, entry: JournalEntry) -> UpdateSpec:
    """Return the update that a journal entry records, of a step with this plan.

    Sigma and learning rate are the entry's, because the schedule may have another number of steps by now.
    """
    recorded = dataclasses.replace(
        plan, noise_step=entry.noise_step, sigma=entry.sigma, learning_rate=entry.learning_rate
    )
    return UpdateSpec.of(recorded, entry.fitness)


def check_weights(journal_path: Path, entry: JournalEntry, checksum: Callable[[], str]) -> None:
    """Raise JournalError when the journal records other weights before a step than there are now."""
    if entry.checksum and (found := checksum()) != entry.checksum:
        raise JournalError(
            f"{journal_path}: before step {entry.step} the weights had checksum {entry.checksum}, but the replay gives "
            f"{found}: replay on a machine like the one that trained, with the same torch and number of threads, and a "
            "C++ compiler only if training used one"
        )
