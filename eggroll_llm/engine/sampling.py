"""Members x prompts x samples -> rollouts, through one engine.

Every member sees the same prompts (common random numbers) and, when sampling is not greedy, the same sampling seeds:
members differ in nothing but their weights. Where pairs have prompts of their own, that holds for twins. Requests are
member-major, so that the prompts of a member share their prefix through the engine's cache.

Shapes: M member, P prompt, S sample.
"""

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from eggroll_llm.engine.interface import Completion, Decoding, Progress, Request, Sampler, Stream
from eggroll_llm.errors import EngineError


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """One completion of a step, and whose it is."""

    member: int | None
    """Which member answered; None is the base model."""
    prompt: int
    """Index of the prompt among those of the step."""
    sample: int
    """Which of the member's completions of that prompt, from 0."""
    completion: Completion


OnRollout = Callable[[int, Rollout], None]


def in_order(stream: Stream, requests: int, on_progress: Progress | None) -> list[Completion]:
    """Return the completions of a stream by position, which is closed whatever happens."""
    completions: dict[int, Completion] = {}
    with contextlib.closing(stream):
        for i, completion in stream:
            completions[i] = completion
            if on_progress:
                on_progress(len(completions), requests)
    return [completions[i] for i in range(requests)]


def sample_population(
    engine: Sampler,
    prompts_P: Sequence[tuple[int, ...]],
    members_M: Sequence[int | None],
    samples: int,
    decoding: Decoding,
    *,
    seed: int,
    step: int,
    own: int = 0,
    on_progress: Progress | None = None,
    on_rollout: OnRollout | None = None,
) -> list[Rollout]:
    """Return MPS rollouts in member-major order: every member on every prompt, `samples` times.

    With `own`, members 2k and 2k + 1 have so many prompts of their own, the next after those of pair k - 1.
    A member of None is the base model. `on_rollout` gets each with its position in what is returned, as it arrives.
    Raises EngineError when the engine returns fewer completions.
    """
    prompts = range(len(prompts_P))
    places = [(m, p, s) for m in members_M for p in _own(prompts, m, own) for s in range(samples)]
    requests = [Request(prompt_ids=prompts_P[p], member=m, seed=sampling_seed(seed, step, p, s)) for m, p, s in places]
    rollouts: dict[int, Rollout] = {}
    with contextlib.closing(engine.stream(requests, decoding)) as stream:
        for i, completion in stream:
            m, p, s = places[i]
            rollouts[i] = Rollout(member=m, prompt=p, sample=s, completion=completion)
            if on_rollout:
                on_rollout(i, rollouts[i])
            if on_progress:
                on_progress(len(rollouts), len(requests))
    if len(rollouts) != len(requests):
        raise EngineError(f"the inference engine returned {len(rollouts)} completions for {len(requests)} requests")
    return [rollouts[i] for i in range(len(requests))]


def _own(prompts: range, member: int | None, own: int) -> range:
    return prompts if member is None or not own else prompts[member // 2 * own :][:own]


def sampling_seed(seed: int, step: int, prompt: int, sample: int) -> int:
    """Return the seed of one completion's random draws, below 2^63: a hash, equal for all members."""
    digest = hashlib.blake2b(f"{seed} {step} {prompt} {sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
