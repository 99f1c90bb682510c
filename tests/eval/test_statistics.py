"""Statistics against hand-computed values and scipy."""

import math
import random
from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from eval.statistics import bootstrap_interval, compare_paired, majority, mcnemar_exact, mean, pass_at_k, stderr


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
def test_mcnemar_is_the_binomial_test(wins: int, losses: int) -> None:
    wanted = stats.binomtest(wins, wins + losses, 0.5).pvalue if wins + losses else 1.0
    assert mcnemar_exact(wins, losses) == pytest.approx(wanted, rel=1e-9)


def test_mcnemar_by_hand() -> None:
    """1 against 4: 2 (1 + 5) / 32."""
    assert mcnemar_exact(1, 4) == mcnemar_exact(4, 1) == 0.375


def test_the_bootstrap_is_seeded_and_agrees_with_scipy() -> None:
    values = [1] * 40 + [0] * 200 + [-1] * 16
    low, high = bootstrap_interval(values)
    assert (low, high) == bootstrap_interval(values)
    uneven = [0.1 * i**1.5 for i in range(50)]
    assert bootstrap_interval(uneven) != bootstrap_interval(uneven, seed=1)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(0))
    assert (low, high) == pytest.approx(tuple(theirs.confidence_interval), abs=0.006)
    # Normal approximation: 24/256 +- 1.96 standard errors.
    assert (low, high) == pytest.approx(
        (mean(values) - 1.96 * stderr(values), mean(values) + 1.96 * stderr(values)), abs=0.006
    )
    assert bootstrap_interval([0.5] * 9) == (0.5, 0.5)
    assert bootstrap_interval(values, confidence=0.5)[0] > low


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Means of 80 coin throws with p = 0.3, 400 times: a 95 % interval misses about 20 times."""
    draw = random.Random(3)
    missed = 0
    for i in range(400):
        low, high = bootstrap_interval([draw.random() < 0.3 for _ in range(80)], resamples=1000, seed=i)
        missed += not low <= 0.3 <= high
    assert 8 <= missed <= 40


def test_two_models_on_the_same_problems() -> None:
    first = [1, 1, 0, 0, 1, 0, 0, 0]
    second = [1, 0, 1, 1, 1, 1, 1, 0]
    paired = compare_paired(first, second)
    assert (paired.problems, paired.difference, paired.wins, paired.losses) == (8, 3 / 8, (2, 3, 5, 6), (1,))
    assert paired.p_value == pytest.approx(stats.binomtest(4, 5, 0.5).pvalue)
    assert paired.interval == bootstrap_interval([0, -1, 1, 1, 0, 1, 1, 0])
    assert compare_paired(second, first).difference == -3 / 8
    same = compare_paired(first, first)
    assert (same.difference, same.interval, same.p_value) == (0, (0, 0), 1)


@pytest.mark.parametrize(("first", "second"), [([], []), ([1], [1, 0])])
def test_what_cannot_be_paired(first: list[int], second: list[int]) -> None:
    with pytest.raises(ValueError, match="cannot be paired"):
        compare_paired(first, second)
