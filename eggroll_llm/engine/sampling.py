"""Members x problems x samples -> completions, through one engine.

Every member sees the same problems (common random numbers) and, when sampling is not greedy, the same sampling seeds:
members differ in nothing but their weights. Requests are member-major, so that the problems of a member share the
prefix of their prompts through the engine's cache.

Shapes: M member, P prompt, S sample.
"""

import hashlib
from collections.abc import Sequence

from eggroll_llm.engine.interface import Completion, Decoding, Progress, Request, Sampler
from eggroll_llm.errors import EngineError


def sample_population(
    engine: Sampler,
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
