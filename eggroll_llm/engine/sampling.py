"""Members x prompts x samples -> rollouts, through one engine.

Every member sees the same prompts (common random numbers) and, when sampling is not greedy, the same sampling seeds:
members differ in nothing but their weights. Where pairs have prompts of their own, that holds for twins. Requests are
member-major, so that the prompts of a member share their prefix through the engine's cache.

Shapes: M member, P prompt, S sample.
"""

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from eggroll_llm.config.schema import SamplingConfig
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
ADDED = ("top_k", "min_p", "repetition_penalty", "thinking_token_budget")
"""Fields of `Decoding` that older records do not have: written where they are not at their defaults."""


def decoding_of(sampling: SamplingConfig, stop: Sequence[str]) -> Decoding:
    """Return how completions are drawn by these settings, for a task that stops at these texts."""
    return Decoding(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        thinking_token_budget=sampling.thinking_token_budget,
        stop=tuple(dict.fromkeys((*stop, *sampling.stop))),
    )


def greedy(decoding: Decoding, *, max_tokens: int) -> Decoding:
    """Return the same without chance, and with another length limit unless it is 0."""
    return dataclasses.replace(
        decoding, max_tokens=max_tokens or decoding.max_tokens, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0
    )


def plain(decoding: Decoding, *, max_tokens: int) -> Decoding:
    """Return how a model's own distribution is sampled, to no more than so many tokens."""
    limit = min(max_tokens, decoding.max_tokens)
    return Decoding(max_tokens=limit, temperature=1.0, stop=decoding.stop)


def added(decoding: Decoding) -> dict[str, Any]:
    """Return the fields of `ADDED` that are not at their defaults, by name."""
    defaults = Decoding(max_tokens=1)
    return {name: value for name in ADDED if (value := getattr(decoding, name)) != getattr(defaults, name)}


def in_order(stream: Stream, requests: int) -> list[Completion]:
    """Return the completions of a stream by position."""
    completions = dict(stream)
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
