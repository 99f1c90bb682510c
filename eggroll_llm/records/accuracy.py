"""Accuracies as they are shown everywhere: a percentage with its 95 % interval, and tests of one against another.

    interval    Wilson's score interval (1927): centre (p + z^2 / 2n) / (1 + z^2 / n). Unlike p ± standard error it
                does not shrink to nothing at 0 or n of n: 0 of 8 is "0.0 % [0.0, 32.4]".
    p           McNemar's exact test: of the problems that one model solves and the other does not, each is as likely
                to be a win as a loss.

A mean over problems of values between 0 and 1 (pass@k, several completions each) has at most the variance of as many
values 0 and 1, so its interval is rather too wide than too narrow.
"""

import math
from collections.abc import Sequence

Z = 1.959964
"""Normal quantile of 95 % intervals."""
EXACT = 2000
"""Wins and losses up to which a test is exact: beyond, the normal distribution differs by less than 1 % of p."""


def mean(values: Sequence[float]) -> float:
    """Return the mean; NaN of nothing."""
    return sum(values) / len(values) if values else math.nan


def wilson(accuracy: float, problems: int) -> tuple[float, float]:
    """Return the 95 % interval of a fraction of so many problems, within 0 and 1; NaN, NaN where there is none."""
    if problems <= 0 or not 0 <= accuracy <= 1:
        return math.nan, math.nan
    spread = Z * math.sqrt((accuracy * (1 - accuracy) + Z**2 / (4 * problems)) / problems)
    middle, scale = accuracy + Z**2 / (2 * problems), 1 + Z**2 / problems
    low, high = (middle - spread) / scale, (middle + spread) / scale
    return min(max(low, 0.0), accuracy), max(min(high, 1.0), accuracy)  # 0 and 1 are exact ends, which rounding misses


def accuracy_text(accuracy: float, problems: int) -> str:
    """Return an accuracy over so many problems with its interval, "51.6 % [45.5, 57.6]"; a dash for NaN."""
    low, high = wilson(accuracy, problems)
    if not math.isfinite(low):
        return percent(accuracy)
    return f"{percent(accuracy)} [{100 * low:.1f}, {100 * high:.1f}]"


def percent(share: float) -> str:
    """Return a share in per cent, "51.6 %"; a dash for NaN."""
    return f"{100 * share:.1f} %" if math.isfinite(share) else "–"


def points(difference: float) -> str:
    """Return a difference of shares in percentage points, signed."""
    return f"{100 * difference:+.1f}".replace("-", "−")


def p_number(p: float) -> str:
    """Return a p-value to two digits, as in a table: "0.031" or "< 0.0001"."""
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def p_text(p: float) -> str:
    """Return a p-value as in a sentence: "p = 0.031" or "p < 0.0001"."""
    number = p_number(p)
    return f"p {number}" if number.startswith("<") else f"p = {number}"


def mcnemar(won: int, lost: int) -> float:
    """Return the two-sided p-value of so many wins against losses; of very many by the normal distribution."""
    changed = won + lost
    if changed > EXACT:
        return math.erfc(max(abs(won - lost) - 1, 0) / math.sqrt(2 * changed))
    tail = sum(math.comb(changed, k) for k in range(min(won, lost) + 1))
    return min(1.0, 2 * tail / 2**changed)


def two_shares(shares: Sequence[float], counts: Sequence[int]) -> float:
    """Return the two-sided p-value of two shares of so many problems each, not paired, by the pooled z test; else 1."""
    if min(counts) <= 0 or not all(0 <= share <= 1 for share in shares):
        return 1.0
    pooled = sum(share * count for share, count in zip(shares, counts, strict=True)) / sum(counts)
    variance = pooled * (1 - pooled) * sum(1 / count for count in counts)
    return math.erfc(abs(shares[0] - shares[1]) / math.sqrt(2 * variance)) if variance > 0 else 1.0
