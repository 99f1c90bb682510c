"""Intervals and tests of accuracies, against scipy's and by what they promise."""

import math

import numpy as np
import pytest
from scipy import stats

from eggroll_llm.records.accuracy import (
    EXACT,
    accuracy_text,
    mcnemar,
    p_number,
    p_text,
    percent,
    points,
    two_shares,
    wilson,
)


@pytest.mark.parametrize("problems", [1, 2, 8, 512, 1319])
def test_intervals_are_wilsons(problems: int) -> None:
    for right in {0, 1, problems // 3, problems - 1, problems}:
        expected = stats.binomtest(right, problems).proportion_ci(method="wilson")
        found = wilson(right / problems, problems)
        assert found == pytest.approx((expected.low, expected.high), abs=1e-6)
        assert 0 <= found[0] <= right / problems <= found[1] <= 1


def test_intervals_hold_what_they_promise_where_nothing_is_solved_too() -> None:
    """Of 8 problems, whatever the true accuracy: no interval has width 0, and nine in ten hold it."""
    right = np.arange(9)
    ends = np.array([wilson(int(n) / 8, 8) for n in right])
    assert (ends[:, 1] - ends[:, 0]).min() > 0.3
    for accuracy in np.linspace(0.05, 0.95, 19):
        holds = (ends[:, 0] <= accuracy) & (accuracy <= ends[:, 1])
        assert stats.binom.pmf(right, 8, accuracy)[holds].sum() > 0.89


@pytest.mark.parametrize(("accuracy", "problems"), [(math.nan, 8), (0.5, 0), (1.5, 8), (-0.1, 8), (math.inf, 8)])
def test_what_is_no_accuracy_has_no_interval(accuracy: float, problems: int) -> None:
    assert all(map(math.isnan, wilson(accuracy, problems)))
    assert "[" not in accuracy_text(accuracy, problems)


def test_texts() -> None:
    assert accuracy_text(0.0, 8) == "0.0 % [0.0, 32.4]"
    assert accuracy_text(1.0, 8) == "100.0 % [67.6, 100.0]"
    assert accuracy_text(0.515625, 256) == "51.6 % [45.5, 57.6]"
    assert (percent(0.5156), percent(math.nan)) == ("51.6 %", "–")
    assert (points(0.145), points(-0.02)) == ("+14.5", "−2.0")
    assert (p_number(0.03125), p_number(1.0), p_number(2e-5)) == ("0.031", "1", "< 0.0001")
    assert (p_text(0.00049), p_text(2e-5)) == ("p = 0.00049", "p < 0.0001")


def test_wins_and_losses_are_tested_exactly() -> None:
    for won, lost in ((0, 0), (5, 5), (3, 0), (0, 12), (40, 21), (700, 651)):
        expected = stats.binomtest(won, won + lost).pvalue if won + lost else 1.0
        assert mcnemar(won, lost) == pytest.approx(expected, rel=1e-9)
        assert mcnemar(won, lost) == mcnemar(lost, won)


def test_very_many_wins_and_losses_cost_no_time() -> None:
    won, lost = EXACT // 2 + 90, EXACT // 2 - 85
    assert mcnemar(won, lost) == pytest.approx(stats.binomtest(won, won + lost).pvalue, rel=0.01)
    assert mcnemar(10**15, 10**15) == 1
    assert mcnemar(10**15, 0) == 0


def test_shares_that_are_not_paired() -> None:
    """The pooled z test is the chi-square test of the table."""
    table = [[30, 70], [55, 145]]
    expected = stats.chi2_contingency(table, correction=False).pvalue
    assert two_shares([0.3, 0.275], [100, 200]) == pytest.approx(expected)
    assert two_shares([0.0, 0.0], [8, 8]) == two_shares([math.nan, 0.1], [8, 8]) == two_shares([0.1, 0.2], [0, 8]) == 1
