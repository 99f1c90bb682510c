"""A step of the method before its fitness is known: which noise, how large, how far, from (settings, seed, step).

A plan is made once a step. With the fitness of the members it is the update, and that is what the journal records.
"""

import math
from dataclasses import dataclass
from typing import Literal

from eggroll_llm.es.noise import NoiseSpec
from eggroll_llm.es.settings import EsSettings, Schedule


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """Everything that a step depends on besides weights, problems and fitness."""

    step: int
    """Number of the step, from 1; the update ends it."""
    noise_step: int
    """Step that the noise was first used in; differs from `step` when noise is reused."""
    seed: int
    """Seed of the run."""
    rank: int
    """Rank of the perturbations."""
    sigma: float
    """Standard deviation of a weight's perturbation in this step."""
    learning_rate: float
    """Learning rate of this step: under scale "rms" and SGD, the root-mean-square change of a weight."""
    antithetic: bool = True
    """Members 2p and 2p + 1 are twins with opposite signs."""
    scale: Literal["rms", "literature"] = "rms"
    """How the estimate is normalised."""

    @property
    def noise(self) -> NoiseSpec:
        """Return what the factors of the population are made from."""
        return NoiseSpec(seed=self.seed, step=self.noise_step, rank=self.rank, sigma=self.sigma)


def plan_step(settings: EsSettings, *, seed: int, step: int, steps: int) -> StepPlan:
    """Return the plan of a step (from 1) in a run of `steps`, 0 when it has no last one."""
    end = settings.schedule_end
    return StepPlan(
        step=step,
        noise_step=step - (step - 1) % settings.noise_reuse,
        seed=seed,
        rank=settings.rank,
        sigma=schedule(settings.sigma_schedule, settings.sigma, step - 1, steps, end),
        learning_rate=schedule(settings.learning_rate_schedule, settings.learning_rate, step - 1, steps, end),
        antithetic=settings.antithetic,
        scale=settings.update_scale,
    )


def schedule(kind: Schedule, start: float, step: int, steps: int, end_fraction: float) -> float:
    """Return the value at `step` (from 0) of `steps`: first `start`, at the last `start * end_fraction`.

    "linear" goes there in a straight line, "cosine" along half a period. Raises ValueError on an unknown
    kind, and when a kind other than "constant" has no number of steps.
    """
    if kind == "constant":
        return start
    if steps < 1:
        raise ValueError(f"schedule = {kind!r}: needs steps above 0; set steps, or the schedule to constant")
    progress = min(step / max(1, steps - 1), 1.0)
    if kind == "linear":
        return start * (1 - (1 - end_fraction) * progress)
    if kind == "cosine":
        return start * (end_fraction + (1 - end_fraction) * (1 + math.cos(math.pi * progress)) / 2)
    raise ValueError(f"schedule = {kind!r}: must be one of constant, linear, cosine")
