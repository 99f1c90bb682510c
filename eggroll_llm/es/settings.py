"""Settings of the evolution strategy: the [es] table of a recipe. Imports no torch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Le, Lt

MOST_RANK = 64
"""As many columns as the kernels take."""
Schedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EsSettings:
    """The evolution strategy."""

    population: Annotated[int, Ge(2)] = 32
    """Models evaluated per step; even when antithetic."""
    sigma: Annotated[float, Ge(0)] = 0.0
    """Standard deviation of the perturbation of a weight; method "es" needs it."""
    learning_rate: Annotated[float, Ge(0), Le(1e6)] = 0.0  # beyond, a step could leave the range of float32
    """Root-mean-square change of a weight in a step (with update_scale "rms"); method "es" needs it."""
    rank: Annotated[int, Ge(1), Le(MOST_RANK)] = 1
    """Rank of the perturbation of each weight matrix."""
    layers: tuple[Annotated[int, Ge(0)], ...] = ()
    """First and last decoder block, counted from 0, whose weights are perturbed and trained; empty: all."""
    antithetic: bool = True
    """Whether members come in pairs that share their noise with opposite signs."""
    fitness_from: Literal["rewards", "probabilities"] = "rewards"
    """What a member is judged by: rewards of its own answers, or how probable it makes the weights' rewarded ones."""
    weighting: Literal["ratio", "clipped", "token", "logprob", "probability"] = "ratio"
    """With fitness_from "probabilities": how a reward is weighted by how a member changes its answer's chance."""
    answer_reuse: Annotated[int, Ge(1)] = 1
    """Number of steps that learn from the same answers, with fitness_from "probabilities"."""
    max_drift: Annotated[float, Ge(0)] = 0.0
    """Divergence of the weights from those that answered, in nats a token, beyond which they answer anew; 0: none."""
    problems: Literal["shared", "per_pair"] = "shared"
    """Whether all members of a step have the same problems, or each pair sampling.prompts_per_step of its own."""
    skip_tied: bool = False
    """Whether to skip problems whose rewards all tied before, more often the more often they tied; none for good."""
    fitness: Literal["centered", "rank", "sign"] = "centered"
    """How rewards become fitness: centred per prompt and scaled, centred ranks, or signs of pair differences."""
    update_scale: Literal["rms", "literature"] = "rms"
    """Length of the update: always learning_rate ("rms"), or the sum over sqrt(population) as published."""
    optimizer: Literal["sgd", "momentum", "adam"] = "sgd"
    """Optimizer; the estimate is its negative gradient."""
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    """Momentum of optimizer "momentum"."""
    adam_beta1: Annotated[float, Ge(0), Lt(1)] = 0.9
    """Decay of the first moment of optimizer "adam"."""
    adam_beta2: Annotated[float, Ge(0), Lt(1)] = 0.999
    """Decay of the second moment of optimizer "adam"."""
    adam_eps: Annotated[float, Ge(1e-16)] = 1e-8  # below, a step could leave the range of float32
    """Constant in the denominator of optimizer "adam"."""
    masters: Literal["float32", "split"] = "float32"
    """Float32 master weights: as a copy (4 bytes each), or as the served bfloat16 and its 16 missing bits (2 bytes)."""
    sigma_schedule: Schedule = "constant"
    """Schedule of sigma over the steps."""
    learning_rate_schedule: Schedule = "constant"
    """Schedule of the learning rate over the steps."""
    schedule_end: Annotated[float, Ge(0), Le(1)] = 0.1
    """Fraction of the starting value that a schedule reaches at the last step."""
    noise_reuse: Annotated[int, Ge(1)] = 1
    """Number of steps for which the same noise is kept."""

    @property
    def directions(self) -> int:
        """Perturbations of a step, of which antithetic members have both signs."""
        return self.population // 2 if self.antithetic else self.population


def without_effect(settings: EsSettings, prefix: str = "") -> Iterator[str]:
    """Yield a sentence for each field that was set in vain; `prefix` comes before the names of fields."""
    optimizer_of = {"momentum": "momentum", "adam_beta1": "adam", "adam_beta2": "adam", "adam_eps": "adam"}
    needed = {
        field: (settings.optimizer == optimizer, f'{prefix}optimizer = "{optimizer}"')
        for field, optimizer in optimizer_of.items()
    }
    scheduled = {settings.sigma_schedule, settings.learning_rate_schedule} != {"constant"}
    return set_in_vain(settings, needed | {"schedule_end": (scheduled, "a schedule")}, prefix)


def set_in_vain(settings: object, needed: Mapping[str, tuple[bool, str]], prefix: str) -> Iterator[str]:
    """Yield a sentence for each field that is not at its default; `needed`: whether it has an effect, and by what."""
    default = type(settings)()
    for field, (has_effect, what) in needed.items():
        if (value := getattr(settings, field)) != getattr(default, field) and not has_effect:
            yield f"{prefix}{field} = {value} has no effect without {what}"
