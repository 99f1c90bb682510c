"""Fitness from probabilities: what members would earn, from completions of the weights that they perturb.

    y_ps ~ p(. | prompt_p)                             sampled once, with the weights W themselves
    a_ps = r(y_ps) - mean_s r(y_ps)                    advantage; 0 where all completions of a problem earn the same
    R_mp = 1/S sum_s a_ps w(p_m(y_ps), p(y_ps))        return of member m, from a forward pass instead of sampling

With w = p_m / p the return is the importance-weighted one: an unbiased estimate, up to the mean that it is centred by,
of what member m would earn above W. Its differences between twins go into the update as rewards do. To first order in
sigma "ratio", "clipped" and "logprob" are the same: the policy gradient, in the span of the population. "token" divides
a completion's part of it by its length, as GRPO as published does; "probability" multiplies it by p. Beyond that they
differ in what a completion counts whose probability has changed much:

    "ratio"          p_m / p of the completion: unbiased, and its variance grows exponentially with length
    "clipped"        the pessimistic PPO objective of that ratio, within 1 - CLIP and 1 + CLIP
    "token"          the same of the ratio of each token, averaged over the completion's tokens
    "logprob"        log p_m - log p: linear, so that no completion dominates
    "probability"    p_m, each distinct completion once: what is likely counts more; vanishes for long completions

Sources: Kahn and Marshall 1953 (importance weights); Schulman et al., arXiv 1707.06347 (clipping); Shao et al., arXiv
2402.03300 (advantages within a group).

Shapes: M member, P prompt, S sample of a prompt, J distinct completion that counts, N token of those.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

Weighting = Literal["ratio", "clipped", "token", "logprob", "probability"]

CLIP = 0.2
LOG_LIMIT = 20.0
"""Largest log-ratio of a token that is taken at its value, and of a completion before it becomes a ratio: e^20 decides
any step."""


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """The completions that a step learns from."""

    completions: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
    """Prompt and completion in tokens, each pair once, J of them."""
    prompt_J: Tensor
    """Index of the prompt of each."""
    advantage_J: Tensor
    """Advantage of one sample of it, float64."""
    count_J: Tensor
    """How often it was sampled."""

    @cached_property
    def of_N(self) -> Tensor:  # noqa: N802 - the suffix is its shape
        """Index of the completion of each token."""
        lengths = [len(token_ids) for _, token_ids in self.completions]
        return torch.repeat_interleave(torch.tensor(lengths, dtype=torch.int64))

    @property
    def count_N(self) -> Tensor:  # noqa: N802 - the suffix is its shape
        """How often each token was sampled."""
        return self.count_J[self.of_N]


def advantages(rewards_PS: Tensor) -> Tensor:
    """Return rewards without their mean per prompt, float64; one that is not finite counts nowhere and becomes 0."""
    rewards_PS = rewards_PS.to(torch.float64)
    finite_PS = rewards_PS.isfinite()
    kept_PS = torch.where(finite_PS, rewards_PS, 0.0)
    mean_P = kept_PS.sum(1) / finite_PS.sum(1).clamp(min=1)
    tied_P = torch.where(finite_PS, rewards_PS, -torch.inf).amax(1) == torch.where(
        finite_PS, rewards_PS, torch.inf
    ).amin(1)
    return torch.where(finite_PS & ~tied_P[:, None], kept_PS - mean_P[:, None], 0.0)


def candidates(
    prompts_P: Sequence[tuple[int, ...]], token_ids_PS: Sequence[Sequence[tuple[int, ...]]], rewards_PS: Tensor
) -> Candidates:
    """Return the completions with an advantage, equal ones of a prompt as one."""
    advantage_PS = advantages(rewards_PS)
    number: dict[tuple[int, tuple[int, ...]], int] = {}
    total: list[float] = []
    count: list[int] = []
    for p, samples in enumerate(token_ids_PS):
        for s, token_ids in enumerate(samples):
            advantage = float(advantage_PS[p, s])
            if not advantage:
                continue
            j = number.setdefault((p, token_ids), len(number))
            if j == len(total):
                total.append(0.0)
                count.append(0)
            total[j] += advantage
            count[j] += 1
    count_J = torch.tensor(count, dtype=torch.float64)
    return Candidates(
        completions=[(prompts_P[p], token_ids) for p, token_ids in number],
        prompt_J=torch.tensor([p for p, _ in number], dtype=torch.int64),
        advantage_J=torch.tensor(total, dtype=torch.float64) / count_J,
        count_J=count_J,
    )


def returns(
    candidates: Candidates, logprob_MN: Tensor, base_N: Tensor, weighting: Weighting, *, prompts: int, samples: int
) -> Tensor:
    """Return R_mp [M, P], float64, from log-probabilities of the candidates' tokens under members and weights."""
    log_ratio_MN = (logprob_MN.to(torch.float64) - base_N.to(torch.float64)).clamp(-LOG_LIMIT, LOG_LIMIT)
    of_N, advantage_J = candidates.of_N, candidates.advantage_J
    length_J = torch.bincount(of_N, minlength=len(advantage_J))

    def per_completion(value_MN: Tensor) -> Tensor:
        return torch.zeros(len(value_MN), len(length_J), dtype=torch.float64).index_add_(1, of_N, value_MN)

    log_ratio_MJ = per_completion(log_ratio_MN)
    ratio_MJ = log_ratio_MJ.clamp(-LOG_LIMIT, LOG_LIMIT).exp()
    gain: dict[str, Callable[[], Tensor]] = {
        "ratio": lambda: ratio_MJ * advantage_J,
        "clipped": lambda: _clipped(ratio_MJ, advantage_J),
        "token": lambda: per_completion(_clipped(log_ratio_MN.exp(), advantage_J[of_N])) / length_J,
        "logprob": lambda: log_ratio_MJ * advantage_J,
        "probability": lambda: per_completion(logprob_MN.to(torch.float64)).exp() * advantage_J / candidates.count_J,
    }
    gain_MJ = gain[weighting]() * candidates.count_J / samples
    returns_MP = torch.zeros(len(logprob_MN), prompts, dtype=torch.float64)
    return returns_MP.index_add_(1, candidates.prompt_J, gain_MJ)


def divergence(logprob_MN: Tensor, base_N: Tensor, count_N: Tensor | None = None) -> float:
    """Return the mean divergence per token of members from the weights, in nats: mean of p_m/p - 1 - log(p_m/p).

    An estimate of KL(p || p_m) from samples of p (Schulman's k3), never negative; 0 without tokens. `count_N`: how
    often a token was sampled, by default once.
    """
    log_ratio_MN = (logprob_MN.to(torch.float64) - base_N.to(torch.float64)).clamp(-LOG_LIMIT, LOG_LIMIT)
    if not log_ratio_MN.numel():
        return 0.0
    k3_N = (log_ratio_MN.expm1() - log_ratio_MN).mean(dim=0)
    return float(k3_N.mean() if count_N is None else (k3_N * count_N).sum() / count_N.sum())


def _clipped(ratio: Tensor, advantage: Tensor) -> Tensor:
    return torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
