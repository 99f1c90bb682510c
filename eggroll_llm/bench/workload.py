"""What every variant of the benchmark is given and gives back. Imports nothing heavy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Prompts in tokens, and how many tokens each is answered with."""

    prompts: Sequence[Sequence[int]]
    new_tokens: Sequence[int]
    temperature: float = 0.0
    """Of sampling; a population draws with a seed for each request, as in training."""

    def first_token(self) -> "Workload":
        """Return the same prompts, each answered with one token: the prefill alone."""
        return replace(self, new_tokens=[1] * len(self.prompts))


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds of one run. Sampling is what tokens per second are counted in; None is what a variant does not do."""

    sample: float
    noise: float | None = None
    update: float | None = None
    serve: float | None = None
    noise_in_sample: bool = False
    """Whether the noise is made while requests are answered, as on a GPU."""
    tokens: int | None = None
    """Prompt and new tokens, if not those of the whole workload."""


def members_of(work: Workload, population: int) -> list[int]:
    """Return the member that answers each prompt: neighbours belong together."""
    per_member = math.ceil(len(work.prompts) / population)
    return [i // per_member for i in range(len(work.prompts))]
