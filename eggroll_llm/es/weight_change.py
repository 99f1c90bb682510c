"""How far an update moved the weights, next to how large they are; measured on a sample of rows.

All rows of a model of 135M parameters would take a third of the time of the update; about `REPORT_ROWS` of them, spread
evenly over the matrices, take little and are off by about 2 %.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

REPORT_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class UpdateReport:
    """What an update did, measured on about `REPORT_ROWS` evenly spaced rows, or all when the model has fewer."""

    rms: float
    """Root-mean-square change of a master weight."""
    weights_rms: float
    """Root mean square of a weight before the update, in the median matrix: what `rms` is to be compared with."""
    changed: float
    """Fraction of the served weights that changed."""
    finite: bool
    """The changes were finite. The check before the update assures it: False is a fault of the machine."""


def sampled_rows(weights: Collection[Tensor]) -> list[Tensor]:
    """Return a flat copy of every n-th row of each matrix, so that about `REPORT_ROWS` are taken in all."""
    every = row_stride(map(len, weights))
    return [weight[::every].flatten().clone() for weight in weights]


def row_stride(rows: Iterable[int]) -> int:
    """Return which n-th row to take of matrices with this many rows, for about `REPORT_ROWS` in all."""
    return max(1, sum(rows) // REPORT_ROWS)


def weights_rms(rows: Sequence[Tensor]) -> float:
    """Return the root mean square of a weight in the median matrix of `sampled_rows`."""
    return float(torch.stack([part.square().mean(dtype=torch.float64).sqrt() for part in rows]).median())


def update_report(before: Sequence[Tensor], after: Sequence[Tensor], served_dtype: torch.dtype) -> UpdateReport:
    """Compare `sampled_rows` of before and after an update."""
    old, new = torch.cat(list(before)), torch.cat(list(after))
    changed = old.to(served_dtype) != new.to(served_dtype)
    rms = float(old.sub_(new).square_().mean(dtype=torch.float64).sqrt())
    return UpdateReport(
        rms=rms,
        weights_rms=weights_rms(before),
        changed=float(changed.mean(dtype=torch.float64)),
        finite=math.isfinite(rms),
    )


def united(reports: Sequence[UpdateReport]) -> UpdateReport:
    """Return one report of an update from those of equally large parts of the weights."""
    if len(reports) == 1:
        return reports[0]

    def mean(values: Iterable[float]) -> float:
        return math.fsum(values) / len(reports)

    return UpdateReport(
        rms=math.sqrt(mean(report.rms**2 for report in reports)),
        weights_rms=math.sqrt(mean(report.weights_rms**2 for report in reports)),
        changed=mean(report.changed for report in reports),
        finite=all(report.finite for report in reports),
    )
