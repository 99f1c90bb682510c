"""Members x problems x samples -> completions, through one engine.

Every member sees the same problems (common random numbers) and, when sampling is not greedy, the same sampling seeds:
members differ in nothing but their weights. Requests are member-major, so that the problems of a member share the
prefix of their prompts through the engine's cache.

Shapes: M member, P prompt, S sample.
"""

import hashlib
from collections.abc import Callable, Sequence
from collections.abc import Generator as GeneratorType
from dataclasses import dataclass
from typing import Protocol

from eggroll_llm.errors import EngineError


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoding:
    """How completions are drawn."""

    max_tokens: int
    """Length limit in tokens; a completion that reaches it is truncated."""
    temperature: float = 0.0
    """0 is greedy decoding."""
    top_p: float = 1.0
    """Nucleus of the distribution that is sampled from."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion; the text ends before the first."""
    special_tokens: bool = False
    """Special tokens are part of the text, and stop strings match them; the end-of-text token is not."""
    ignore_eos: bool = False
    """Go on after the end-of-text token, for measurements."""
    logprobs: bool = False
    """Also return the log-probability of each generated token, in the distribution that it was drawn from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One completion that is wanted."""

    prompt_ids: tuple[int, ...]
    """The prompt in tokens."""
    member: int | None = None
    """Which member answers; None is the base model."""
    seed: int | None = None
    """Sampling seed, unused when decoding is greedy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """What a member answered."""

    text: str
    """Text up to a stop string, or to the end of the turn, without special tokens."""
    token_ids: tuple[int, ...]
    """Generated tokens, the one that ended it included."""
    truncated: bool
    """The length limit cut the text off."""
    prompt_tokens: int
    """Length of the prompt."""
    thought_open: bool = False
    """The prompt ended in a thought, which the text goes on with."""
    logprobs: tuple[float, ...] = ()
    """Of the generated tokens, temperature and nucleus included, when they were asked for; NaN where there is none."""


Stream = GeneratorType[tuple[int, Completion], None, None]
Progress = Callable[[int, int], None]
"""Called with the number of finished and of all completions."""


class Generator(Protocol):
    """The part of the engine that sampling needs."""

    def generate(
        self, requests: Sequence[Request], decoding: Decoding, on_progress: Progress | None = None
    ) -> list[Completion]:
        """Return the completion of each request, in their order."""
        ...

    def stream(self, requests: Sequence[Request], decoding: Decoding) -> Stream:
        """Yield (position of the request, completion) as they finish."""
        ...


def sample_population(
    engine: Generator,
    prompts_P: Sequence[tuple[int, ...]],
    population: int,
    samples: int,
    decoding: Decoding,
    *,
    seed: int,
    step: int,
    on_progress: Progress | None = None,
) -> list[list[list[Completion]]]:
    """Return completions_MPS of every member on every prompt. Raises EngineError when there are fewer or more."""
    requests = [
        Request(prompt_ids=prompt, member=member, seed=sampling_seed(seed, step, p, s))
        for member in range(population)
        for p, prompt in enumerate(prompts_P)
        for s in range(samples)
    ]
    completions = engine.generate(requests, decoding, on_progress)
    if len(completions) != len(requests):
        raise EngineError(f"the inference engine returned {len(completions)} completions for {len(requests)} requests")
    flat = iter(completions)
    return [[[next(flat) for _ in range(samples)] for _ in prompts_P] for _ in range(population)]


def sampling_seed(seed: int, step: int, prompt: int, sample: int) -> int:
    """Return the seed of one completion's random draws, below 2^63: a hash, equal for all members."""
    digest = hashlib.blake2b(f"{seed} {step} {prompt} {sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
