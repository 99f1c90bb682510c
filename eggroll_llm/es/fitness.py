"""Fitness shaping: the rewards of a step, members by prompts, become one number per member.

With R = rewards_MP, all members having seen the same prompts, and only kept members in every statistic:

    centered    C_mp = R_mp - mean_m R_mp,    s_m = mean_p C_mp / std_mp C,    fitness = z-score of s
    rank        s_m = mean_p R_mp,    fitness = z-score of (rank of s from 0 to n - 1) / (n - 1) - 1/2
    sign        s_m = mean_p R_mp,    fitness = sign of s_2p - s_2p+1 for member 2p, its negative for 2p + 1

Standard deviations divide by n. "centered" and "rank" have mean 0 and standard deviation 1 over the kept
members; "sign" is -1, 0 or 1. Scores are tied when they differ by no more than 1e-9 of the rewards' standard
deviation; tied scores share the average of their ranks. A step in which no member, or no pair of twins, differs has
fitness exactly 0.
Computed in float64, returned in float32.

Because every kept member saw every prompt, the prompts' means and the common deviation cancel in the z-score, so
"centered" equals the z-score of the average reward. They only serve to tell ties from rounding.

Departure from the literature: one standard deviation for all prompts instead of one per prompt, so a
prompt that one lucky member solved weighs less than one that half of the population solved.

Where every pair has problems of its own, members of different pairs cannot be compared, but twins can, so that

    centered    d_k = mean_p R_2k,p - R_2k+1,p over its root mean square,    fitness of the twins = d_k, -d_k

and "sign" is as above. Rewards need no baseline then: what a problem earns whatever the weights cancels between twins.

A member with a reward that is not finite is dropped, and its antithetic twin with it: both get fitness 0, and
no statistic sees them.

Sources: EGGROLL, arXiv 2511.16652; Salimans et al., arXiv 1703.03864 (centered ranks).

Shapes: M member, K antithetic pair (members 2k and 2k + 1), P prompt.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

FitnessMethod = Literal["centered", "rank", "sign"]

# Scores are means of numbers with standard deviation 1: rounding errors are about 1e-15, real differences far
# larger.
TIE_TOLERANCE = 1e-9


@dataclass(frozen=True, kw_only=True)
class Fitness:
    """Shaped rewards of a step, and what was left out of them."""

    fitness_M: Tensor
    """float32 on CPU, 0 for dropped members."""
    dropped: tuple[int, ...]
    """Members with a reward that is not finite, and their twins, ascending."""
    tied: tuple[int, ...]
    """Prompts for which all kept members, or both kept twins, got the same reward."""
    all_tied: bool
    """Nothing to learn from: every fitness is 0."""


def shape_fitness(rewards_MP: Tensor, method: FitnessMethod, *, antithetic: bool = True) -> Fitness:
    """Shape the rewards of one step.

    Raises ValueError when `rewards_MP` is not two-dimensional or is empty, when an odd number of members is
    antithetic, when method "sign" has no pairs, and on an unknown method.
    """
    if method not in get_args(FitnessMethod):
        raise ValueError(f"fitness = {method!r}: must be one of {', '.join(get_args(FitnessMethod))}")
    if rewards_MP.ndim != 2 or not rewards_MP.numel():
        raise ValueError(f"rewards of shape {tuple(rewards_MP.shape)}: must be [members, prompts], neither 0")
    if antithetic and len(rewards_MP) % 2:
        raise ValueError(f"{len(rewards_MP)} members: antithetic pairs need an even number")
    if method == "sign" and not antithetic:
        raise ValueError("fitness 'sign' compares twins: it needs antithetic pairs")

    rewards_MP = rewards_MP.detach().to(device="cpu", dtype=torch.float64)
    kept_M = rewards_MP.isfinite().all(dim=1)
    if antithetic:
        kept_M = kept_M.view(-1, 2).all(dim=1).repeat_interleave(2)
    kept_MP = rewards_MP[kept_M]

    fitness_M = torch.zeros(len(rewards_MP), dtype=torch.float64)
    tied_P = torch.ones(rewards_MP.shape[1], dtype=torch.bool)
    if len(kept_MP):
        tied_P = kept_MP.amax(dim=0) == kept_MP.amin(dim=0)
        # Large rewards would overflow when squared. No method depends on the scale.
        scaled_MP = kept_MP / kept_MP.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
        fitness_M[kept_M] = _shape(scaled_MP, tied_P, method, antithetic)
    if antithetic and not (fitness_M[0::2] != fitness_M[1::2]).any():  # no pair says which way to go
        fitness_M.zero_()
    return Fitness(
        fitness_M=fitness_M.to(torch.float32),
        dropped=tuple((~kept_M).nonzero().flatten().tolist()),
        tied=tuple(tied_P.nonzero().flatten().tolist()),
        all_tied=not bool(fitness_M.any()),
    )


def shape_twins(rewards_MP: Tensor, method: FitnessMethod) -> Fitness:
    """Shape the rewards of one step in which twins 2k and 2k + 1 had problems of their own, kP to kP + P - 1.

    Raises ValueError when `rewards_MP` is not [members, prompts] of pairs, and for method "rank".
    """
    if method not in ("centered", "sign"):
        raise ValueError(f"fitness = {method!r}: members with problems of their own have no common ranks")
    if rewards_MP.ndim != 2 or not rewards_MP.numel() or len(rewards_MP) % 2:
        raise ValueError(f"rewards of shape {tuple(rewards_MP.shape)}: must be [members, prompts], members even")
    rewards_KTP = rewards_MP.detach().to(device="cpu", dtype=torch.float64).unflatten(0, (-1, 2))
    kept_K = rewards_KTP.isfinite().all(dim=2).all(dim=1)
    apart_KP = torch.where(kept_K[:, None], rewards_KTP[:, 0] - rewards_KTP[:, 1], 0.0)
    largest = apart_KP.abs().max()
    difference_K = apart_KP.mean(dim=1) / largest.clamp(min=torch.finfo(torch.float64).tiny)
    difference_K = torch.where(difference_K.abs() <= TIE_TOLERANCE, 0.0, difference_K)
    if method == "sign":
        difference_K = difference_K.sign()
    elif difference_K.any():
        difference_K /= difference_K[kept_K].square().mean().sqrt()
    return Fitness(
        fitness_M=torch.stack((difference_K, -difference_K), dim=1).flatten().to(torch.float32),
        dropped=tuple((~kept_K).repeat_interleave(2).nonzero().flatten().tolist()),
        tied=tuple(((apart_KP == 0) & kept_K[:, None]).flatten().nonzero().flatten().tolist()),
        all_tied=not bool(difference_K.any()),
    )


def _shape(rewards_MP: Tensor, tied_P: Tensor, method: FitnessMethod, antithetic: bool) -> Tensor:
    # Without the common part of each prompt, ties are judged by what tells members apart, also when a large
    # constant was added to the rewards. The mean of equal numbers need not be the number, hence the exact
    # zero.
    centered_MP = torch.where(tied_P, 0.0, rewards_MP - rewards_MP.mean(dim=0))
    deviation = centered_MP.square().mean().sqrt()
    if not deviation > 0:
        return torch.zeros(len(rewards_MP), dtype=torch.float64)
    score_M = (centered_MP / deviation).mean(dim=1)
    if method == "centered":
        return _z_score(_same_for_tied_twins(score_M) if antithetic else score_M)
    if method == "rank":
        return _z_score(_centered_ranks(score_M))
    difference_K = score_M[0::2] - score_M[1::2]
    sign_K = torch.where(difference_K.abs() <= TIE_TOLERANCE, 0.0, difference_K.sign())
    return torch.stack((sign_K, -sign_K), dim=1).flatten()


def _same_for_tied_twins(score_M: Tensor) -> Tensor:
    """Give twins that differ by a rounding error the same score: where all pairs tie, it would be the whole update."""
    score_K2 = score_M.view(-1, 2)
    tied_K1 = (score_K2[:, :1] - score_K2[:, 1:]).abs() <= TIE_TOLERANCE
    return torch.where(tied_K1, score_K2.mean(dim=1, keepdim=True), score_K2).flatten()


def _z_score(value_M: Tensor) -> Tensor:
    centered_M = value_M - value_M.mean()
    deviation = centered_M.square().mean().sqrt()
    if not deviation > TIE_TOLERANCE:
        return torch.zeros_like(value_M)
    return centered_M / deviation


def _centered_ranks(score_M: Tensor) -> Tensor:
    """Ranks from -0.5 to 0.5; scores without a gap between them share the mean of their ranks."""
    ordered_M, order_M = score_M.sort()
    new_M = torch.ones(len(score_M), dtype=torch.bool)
    new_M[1:] = ordered_M.diff() > TIE_TOLERANCE
    group_M = new_M.cumsum(dim=0) - 1
    place_M = torch.arange(len(score_M), dtype=torch.float64)
    size_G = torch.bincount(group_M).to(torch.float64)
    mean_G = torch.bincount(group_M, weights=place_M) / size_G
    rank_M = torch.empty_like(score_M)
    rank_M[order_M] = mean_G[group_M]
    return rank_M / max(1, len(score_M) - 1) - 0.5
