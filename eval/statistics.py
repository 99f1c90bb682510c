"""Statistics of evaluations: means with standard errors, pass@k, majority votes, and paired tests of models.

Everything is exact or seeded: the same samples give the same figures.
"""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eggroll_llm.records.accuracy import mean

RESAMPLES = 10_000
"""Bootstrap resamples: the end points of a 95 % interval move by about a hundredth of its length between seeds."""
LEAST_DISCORDANT = 10
"""Problems with different scores that an interval needs: of fewer, resamples have too few values to end at."""


def stderr(values: Sequence[float]) -> float:
    """Return the standard error of the mean, sample standard deviation / sqrt(n); NaN below two values.

    For values 0 and 1 with mean p this is sqrt(p (1 - p) / (n - 1)), which lm-evaluation-harness reports; it is 0 when
    all are equal, so accuracies are shown with the interval of `accuracy.wilson` instead. With several completions per
    problem the values are means over a problem: completions of one problem are not independent.
    """
    if len(values) < 2:
        return math.nan
    middle = mean(values)
    return math.sqrt(math.fsum((value - middle) ** 2 for value in values) / (len(values) - 1) / len(values))


def pass_at_k(correct: int, samples: int, k: int) -> float:
    """Return the unbiased estimate of the probability that one of k completions is correct.

    1 - C(samples - correct, k) / C(samples, k): Chen et al. 2021, arXiv 2107.03374, equation 1.
    Raises ValueError when k is not between 1 and samples.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {samples} completions is not defined: k must be between 1 and {samples}")
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority(answers: Sequence[Hashable]) -> int | None:
    """Return the position of the first of the most frequent answers, ignoring None; None without an answer.

    Wang et al. 2022, arXiv 2203.11171 (self-consistency). Of equally frequent answers the first one wins.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    return answers.index(votes.most_common(1)[0][0]) if votes else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Paired:
    """Two models, or two sets of models, on the same problems."""

    problems: int
    """Problems that all answered."""
    difference: float
    """Mean score of the second less that of the first."""
    interval: tuple[float, float] | None
    """95 % interval of the difference, see `bootstrap_interval`; None below `LEAST_DISCORDANT` wins and losses."""
    wins: tuple[int, ...]
    """Indices of the problems where the second scores higher."""
    losses: tuple[int, ...]
    """Indices of the problems where the first scores higher."""
    p_value: float
    """Two-sided, see `sign_flip_exact`; with one model on each side McNemar's exact test of wins against losses."""


def compare_paired(first_SP: Sequence[Sequence[int]], second_SP: Sequence[Sequence[int]]) -> Paired:
    """Compare scores 0 and 1 of a model, or of several seeds of one, with those of another on the same problems.

    Raises ValueError unless each side has a model and all have the same number of problems, at least one.
    """
    sizes = {len(scores) for scores in (*first_SP, *second_SP)}
    if not (first_SP and second_SP) or len(sizes) != 1 or sizes == {0}:
        raise ValueError(f"scores of {sorted(sizes)} problems, {len(first_SP)} against {len(second_SP)}: not paired")
    first, second = np.asarray(first_SP, dtype=np.int64), np.asarray(second_SP, dtype=np.int64)
    # Differences of the means over seeds, times both numbers of seeds: whole numbers.
    differences = [int(d) for d in len(first) * second.sum(axis=0) - len(second) * first.sum(axis=0)]
    wins = tuple(i for i, difference in enumerate(differences) if difference > 0)
    losses = tuple(i for i, difference in enumerate(differences) if difference < 0)
    return Paired(
        problems=len(differences),
        difference=mean(differences) / len(first) / len(second),
        interval=bootstrap_interval(first, second) if len(wins) + len(losses) >= LEAST_DISCORDANT else None,
        wins=wins,
        losses=losses,
        p_value=sign_flip_exact(differences),
    )


def sign_flip_exact(differences: Sequence[int]) -> float:
    """Return the exact probability of a sum at least as far from 0 if every sign were thrown with a coin.

    The permutation test of a paired difference (Fisher 1935): on each problem the two sides are exchanged or not. The
    distribution of the sum is built up problem by problem. For differences of 0 and ±1 it is the exact test of McNemar.
    """
    divisor = math.gcd(*differences) or 1
    sizes = [abs(difference) // divisor for difference in differences if difference]
    chances = np.ones(1)  # of the sums from -sum(sizes) to sum(sizes)
    for size in sizes:
        chances = (np.pad(chances, (0, 2 * size)) + np.pad(chances, (2 * size, 0))) / 2
    far = sum(sizes) - abs(sum(differences)) // divisor
    return float(min(1.0, 2 * chances[: far + 1].sum()))


def bootstrap_interval(
    first_SP: Sequence[Sequence[float]] | NDArray[np.int64],
    second_SP: Sequence[Sequence[float]] | NDArray[np.int64],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of mean(second) - mean(first), problems and seeds resampled.

    Efron and Tibshirani 1993, in two levels: in each resample the problems are drawn with replacement, for all alike,
    and on each side the seeds. A seed alone is always drawn: such an interval holds for that seed. Few seeds make it
    too narrow, as variances of n draws are those of n - 1. Problems with the same scores are drawn together, as a
    multinomial count, which has the same distribution and takes less memory.
    """
    scores_SP = np.concatenate([np.asarray(first_SP, dtype=np.float64), np.asarray(second_SP, dtype=np.float64)])
    problems, split = scores_SP.shape[1], len(first_SP)
    kinds_SP, counts = np.unique(scores_SP, axis=1, return_counts=True)
    draw = np.random.default_rng(seed)
    weights = draw.multinomial(problems, counts / problems, size=resamples) / problems

    def means(kinds_SP: NDArray[np.float64]) -> NDArray[np.float64]:
        seeds = len(kinds_SP)
        return (draw.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples) / seeds) @ kinds_SP

    differences = (weights * (means(kinds_SP[split:]) - means(kinds_SP[:split]))).sum(axis=1)
    low, high = np.quantile(differences, [0.025, 0.975])
    return float(low), float(high)
