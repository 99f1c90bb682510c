"""Statistics of evaluations: means with standard errors, pass@k, majority votes, and paired tests of two models.

Everything is exact or seeded: the same samples give the same figures.
"""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from eggroll_llm.evaluate import mean, stderr

__all__ = [
    "Paired",
    "bootstrap_interval",
    "compare_paired",
    "majority",
    "mcnemar_exact",
    "mean",
    "pass_at_k",
    "stderr",
]

RESAMPLES = 10_000
"""Bootstrap resamples: the end points of a 95 % interval move by about a hundredth of its length between seeds."""


def pass_at_k(correct: int, samples: int, k: int) -> float:
    """Return the unbiased estimate of the probability that one of k completions is correct.

    1 - C(samples - correct, k) / C(samples, k): Chen et al. 2021, arXiv 2107.03374, equation 1.
    Raises ValueError when k is not between 1 and samples.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {samples} completions is not defined: k must be between 1 and {samples}")
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority(answers: Sequence[Hashable]) -> int | None:
    """Return the position of the first of the most frequent answers, None not counted; None when there is none.

    Wang et al. 2022, arXiv 2203.11171 (self-consistency). Of equally frequent answers the first one wins.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    return answers.index(votes.most_common(1)[0][0]) if votes else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Paired:
    """Two models on the same problems."""

    problems: int
    """Problems that both answered."""
    difference: float
    """Mean score of the second less that of the first."""
    interval: tuple[float, float]
    """95 % interval of the difference: percentiles of a paired bootstrap over problems."""
    wins: tuple[int, ...]
    """Indices of the problems where the second scores higher."""
    losses: tuple[int, ...]
    """Indices of the problems where the first scores higher."""
    p_value: float
    """Two-sided exact McNemar test of wins against losses."""


def compare_paired(first: Sequence[float], second: Sequence[float], *, seed: int = 0) -> Paired:
    """Compare the scores of two models, problem by problem. Raises ValueError unless they are as many, and some."""
    if len(first) != len(second) or not first:
        raise ValueError(f"{len(first)} and {len(second)} scores cannot be paired")
    differences = [b - a for a, b in zip(first, second, strict=True)]
    wins = tuple(i for i, difference in enumerate(differences) if difference > 0)
    losses = tuple(i for i, difference in enumerate(differences) if difference < 0)
    return Paired(
        problems=len(differences),
        difference=mean(differences),
        interval=bootstrap_interval(differences, seed=seed),
        wins=wins,
        losses=losses,
        p_value=mcnemar_exact(len(wins), len(losses)),
    )


def mcnemar_exact(wins: int, losses: int) -> float:
    """Return the two-sided p-value of `wins` against `losses` if both were equally likely; 1 without either.

    min(1, 2 P(X <= min(wins, losses))), X binomial(wins + losses, 1/2): McNemar 1947 in its exact form.
    """
    total = wins + losses
    tail = sum(math.comb(total, i) for i in range(min(wins, losses) + 1))
    return float(min(1.0, 2 * tail / 2**total))


def bootstrap_interval(
    values: Sequence[float], *, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean of `values`, resampled with replacement.

    Efron and Tibshirani 1993. Values that are equal are drawn together, as a multinomial count, which has the same
    distribution and takes no memory per resample and problem.
    """
    levels, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    draws = np.random.default_rng(seed).multinomial(len(values), counts / len(values), size=resamples)
    means = draws @ levels / len(values)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
