"""Statistics against hand-computed values and scipy."""

import math
import random
from itertools import combinations, product

import numpy as np
import pytest
from scipy import stats

from eggroll_llm.records.accuracy import mean
from eval.statistics import (
    bootstrap_interval,
    compare_paired,
    majority,
    pass_at_k,
    sign_flip_exact,
    stderr,
)


def test_mean_and_standard_error() -> None:
    """3 of 4 right: deviations 0.25 (three times) and 0.75, sample variance 0.75 / 3, over 4, its root."""
    assert mean([1, 0, 1, 1]) == 0.75
    assert stderr([1, 0, 1, 1]) == pytest.approx(math.sqrt((3 * 0.25**2 + 0.75**2) / 3 / 4)) == pytest.approx(0.25)
    values = [0.25, 1.0, 0.5, 0.0, 0.75]
    assert stderr(values) == pytest.approx(stats.sem(values))
    assert stderr([1.0, 1.0, 1.0]) == 0
    assert math.isnan(stderr([1.0]))
    assert math.isnan(mean([]))


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("correct", [0, 1, 3, 5])
def test_pass_at_k_is_the_mean_over_all_choices_of_k(correct: int, k: int) -> None:
    outcomes = [True] * correct + [False] * (5 - correct)
    choices = [any(choice) for choice in combinations(outcomes, k)]
    assert pass_at_k(correct, 5, k) == pytest.approx(sum(choices) / len(choices))


@pytest.mark.parametrize("k", [0, 6])
def test_pass_at_k_needs_k_samples(k: int) -> None:
    with pytest.raises(ValueError, match=f"pass@{k} of 5"):
        pass_at_k(1, 5, k)


def test_majority() -> None:
    assert majority(["a", "b", "b", None, None, None]) == 1
    assert majority(["a", "b", "b", "a"]) == 0  # of equally frequent ones the first
    assert majority([None, "c"]) == 1
    assert majority([None, None]) is None
    assert majority([]) is None


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (5, 5), (3, 10), (10, 3), (47, 61), (200, 120)])
def test_of_single_runs_it_is_the_binomial_test_of_mcnemar(wins: int, losses: int) -> None:
    wanted = stats.binomtest(wins, wins + losses, 0.5).pvalue if wins + losses else 1.0
    assert sign_flip_exact([1] * wins + [-1] * losses + [0] * 7) == pytest.approx(wanted, rel=1e-9)


def test_mcnemar_by_hand() -> None:
    """1 against 4: 2 (1 + 5) / 32."""
    assert sign_flip_exact([1, -1, -1, -1, -1]) == sign_flip_exact([3, 3, -3, 3, 3]) == 0.375
    assert sign_flip_exact([]) == 1


@pytest.mark.parametrize("differences", [[1, 2, -3, 6], [4, 2, 2, 0, -6, 2], [9, 1, 1], [3, 3, 2, -1, 5, 0, 4, -2]])
def test_signs_are_flipped_in_all_ways(differences: list[int]) -> None:
    flipped = [sum(s * d for s, d in zip(signs, differences, strict=True)) for signs in all_signs(len(differences))]
    wanted = mean([abs(total) >= abs(sum(differences)) for total in flipped])
    assert sign_flip_exact(differences) == pytest.approx(wanted, rel=1e-12)


def all_signs(n: int) -> list[tuple[int, ...]]:
    return list(product((-1, 1), repeat=n))


def test_the_sign_flip_test_errs_as_often_as_it_says() -> None:
    """Three seeds against three that solve each problem equally often: 5 % of p-values are below 0.05."""
    draw = np.random.default_rng(5)
    chances = draw.random(60)
    seeds = draw.random((400, 2, 3, 60)) < chances
    p_values = [
        sign_flip_exact((second.sum(axis=0) - first.sum(axis=0)).tolist()) for first, second in seeds.astype(int)
    ]
    assert 8 <= sum(p < 0.05 for p in p_values) <= 34


def interval(values: list[float], **options: float) -> tuple[float, float]:
    return bootstrap_interval([[0.0] * len(values)], [values], **options)  # type: ignore[arg-type]


def test_the_bootstrap_is_seeded_and_agrees_with_scipy() -> None:
    values: list[float] = [1] * 40 + [0] * 200 + [-1] * 16
    low, high = interval(values)
    assert (low, high) == interval(values)
    uneven = [0.1 * i**1.5 for i in range(50)]
    assert interval(uneven) != interval(uneven, seed=1)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(0))
    assert (low, high) == pytest.approx(tuple(theirs.confidence_interval), abs=0.006)
    # Normal approximation: 24/256 +- 1.96 standard errors.
    assert (low, high) == pytest.approx(
        (mean(values) - 1.96 * stderr(values), mean(values) + 1.96 * stderr(values)), abs=0.006
    )
    assert interval([0.5] * 9) == pytest.approx((0.5, 0.5))


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Means of 80 coin throws with p = 0.3, 400 times: a 95 % interval misses about 20 times."""
    draw = random.Random(3)
    missed = 0
    for i in range(400):
        low, high = interval([float(draw.random() < 0.3) for _ in range(80)], resamples=1000, seed=i)
        missed += not low <= 0.3 <= high
    assert 8 <= missed <= 40


def test_seeds_are_resampled_too() -> None:
    """Seeds that solve all or none of 40 problems: problems alone say nothing, and of k = 0 to 4 seeds drawn k / 4.

    All four of one kind are drawn with probability 1 / 16, so that the interval is everything.
    """
    nothing, everything = [0] * 40, [1] * 40
    assert bootstrap_interval([nothing], [nothing, everything, nothing, everything]) == pytest.approx((0, 1))
    assert bootstrap_interval([nothing], [everything]) == pytest.approx((1, 1))


def test_the_interval_of_seeds_by_the_variance_of_both_levels() -> None:
    """Accuracies of seeds 0.2 to 0.8 on 400 problems against a sure 0: variance of the seed means over 8, no more."""
    draw = np.random.default_rng(2)
    chances = np.linspace(0.2, 0.8, 8)
    scores = (draw.random((8, 400)) < chances[:, None]).astype(int)
    low, high = bootstrap_interval([[0] * 400], scores)
    of_seeds = scores.mean(axis=1).var() / 8
    of_problems = scores.mean(axis=0).var() / 400
    wide = 2 * 1.96 * math.sqrt(of_seeds + of_problems)
    assert high - low == pytest.approx(wide, rel=0.08)
    assert high - low > 3 * 2 * 1.96 * math.sqrt(of_problems)


def test_two_models_on_the_same_problems() -> None:
    first = [1, 1, 0, 0, 1, 0, 0, 0]
    second = [1, 0, 1, 1, 1, 1, 1, 0]
    paired = compare_paired([first], [second])
    assert (paired.problems, paired.difference, paired.wins, paired.losses) == (8, 3 / 8, (2, 3, 5, 6), (1,))
    assert paired.p_value == pytest.approx(stats.binomtest(4, 5, 0.5).pvalue)
    assert paired.interval is None
    assert compare_paired([second], [first]).difference == -3 / 8
    assert compare_paired([first * 2], [second * 2]).interval == bootstrap_interval([first * 2], [second * 2])
    same = compare_paired([first], [first])
    assert (same.difference, same.interval, same.p_value) == (0, None, 1)


def test_two_seeds_against_three_on_the_same_problems() -> None:
    """Mean of the first: 1/2, 0, 1; of the second: 1/3, 1/3, 1. Differences -1/6, 1/3, 0 of equal weight."""
    paired = compare_paired([[1, 0, 1], [0, 0, 1]], [[1, 0, 1], [0, 1, 1], [0, 0, 1]])
    assert paired.difference == pytest.approx((-1 / 6 + 1 / 3) / 3)
    assert (paired.wins, paired.losses) == ((1,), (0,))
    assert paired.p_value == 1  # of 1 and 2 with any signs, 1 + 2 and 2 - 1: none is nearer to 0 than 1


@pytest.mark.parametrize(("first", "second"), [([], []), ([[]], [[]]), ([[1]], [[1, 0]]), ([[1], [1, 0]], [[1]])])
def test_what_cannot_be_paired(first: list[list[int]], second: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="not paired"):
        compare_paired(first, second)
