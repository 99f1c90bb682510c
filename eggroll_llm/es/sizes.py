"""How large sigma and the learning rate may be, from what random changes of the weights do to the model.

Random changes of root mean square s move a model away from itself by a divergence of

    d(s) = floor + curvature s^2     nats a token, curvature = tr(F) / 2 with F the Fisher information of a token

whatever their rank, since the entries of E have unit variance; `floor` is rounding (0 in float32). Both sizes follow
from one principle: random changes may only go so far.

    sigma            d(sigma) - floor = DIVERGENCE
    learning rate    all updates of a run but the part along the gradient are random changes, and independent ones add
                     up as a root: learning_rate sqrt(sum_t schedule_t^2) = PATH sigma

DIVERGENCE and PATH are not derived but fitted to recipes that learn, see docs/tuning.md. The population is not in the
formula: the part along the gradient grows like the root of the number of pairs, but all of those recipes have 16.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from eggroll_llm.es.plan import schedule
from eggroll_llm.es.settings import EsSettings

DIVERGENCE = 0.023
"""Nats a token between a member and the weights that it perturbs, without rounding."""
PATH = {"rewards": 1.0, "probabilities": 2.0}
"""Length of the noise of all updates of a run, in sigmas, by `es.fitness_from`: rewards of members' own answers are the
noisier fitness, of which less is worth the harm."""
CLOSE = 2.0
"""Factor within which a measured divergence is close enough to DIVERGENCE for the quadratic law."""
LEAST_RISE, LARGEST_CHANGE = 4.0, 8.0
"""By how much `next_sigma` changes sigma: far below the target all may be floor, and far above it the law is void."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """The divergence of random members."""

    sigma: float
    divergence: float
    """Nats a token."""

    @property
    def close(self) -> bool:
        """Return whether the law holds from here to the target."""
        return DIVERGENCE / CLOSE <= self.divergence <= DIVERGENCE * CLOSE


@dataclass(frozen=True, kw_only=True, slots=True)
class Law:
    """d(s) = floor + curvature s^2."""

    floor: float
    curvature: float

    @classmethod
    def through(cls, first: Measured, second: Measured) -> "Law":
        """Return the law of two measurements at different sigmas; its floor is at least 0.

        Raises ValueError when the divergence does not rise with sigma.
        """
        low, high = sorted((first, second), key=lambda measured: measured.sigma)
        curvature = (high.divergence - low.divergence) / (high.sigma**2 - low.sigma**2)
        if not curvature > 0:
            raise ValueError(f"no rise from {low} to {high}")
        floor = low.divergence - curvature * low.sigma**2
        if floor < 0:
            return cls(floor=0.0, curvature=high.divergence / high.sigma**2)
        return cls(floor=floor, curvature=curvature)

    def divergence(self, size: float) -> float:
        """Return the divergence in nats a token that random changes of this root mean square cause."""
        return self.floor + self.curvature * size**2

    @property
    def sigma(self) -> float:
        """Return the sigma of members that are DIVERGENCE nats a token from the weights, apart from rounding."""
        return math.sqrt(DIVERGENCE / self.curvature)


def next_sigma(measured: Measured) -> float:
    """Return the sigma to try after one whose divergence is not close: with DIVERGENCE, if the law has no floor."""
    change = math.sqrt(DIVERGENCE / measured.divergence) if measured.divergence > 0 else LARGEST_CHANGE
    least = LEAST_RISE if change > 1 else 1 / LARGEST_CHANGE
    return measured.sigma * min(max(change, least), LARGEST_CHANGE)


def learning_rate_for(sigma: float, settings: EsSettings, steps: int) -> float:
    """Return the learning rate with which the noise of `steps` updates (1 or more) is as long as PATH says.

    Momentum m repeats each update 1 / (1 - m) times. Adam's steps are about as long as those of SGD, and "literature"
    has the length of "rms" on average.
    """
    kind, end = settings.learning_rate_schedule, settings.schedule_end
    shares: Sequence[float] = [schedule(kind, 1.0, step, steps, end) for step in range(steps)]
    repeated = 1 / (1 - settings.momentum) if settings.optimizer == "momentum" else 1.0
    return PATH[settings.fitness_from] * sigma / (repeated * math.sqrt(sum(share**2 for share in shares)))
