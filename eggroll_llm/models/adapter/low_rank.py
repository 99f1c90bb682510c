"""A matrix as a product of two thin ones: the truncated singular value decomposition.

    D = U S V^T,    D_r = B A,    B = U_r S_r^(1/2),    A = S_r^(-1/2) U_r^T D

D_r is the nearest matrix of rank r in the Frobenius norm. U_r are eigenvectors of D D^T, or of D^T D where that is the
smaller of the two, computed in float64. Above `EXACT_UP_TO` that would take minutes a matrix: there U_r comes from a
randomised decomposition (Halko, Martinsson, Tropp 2011; four power iterations), and D_r is nearly the nearest. The
error is measured either way, as the norm of D - B A.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

EXACT_UP_TO = 2048
"""Smaller side of the largest matrix whose decomposition is exact."""
_OVERSAMPLING = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class LowRank:
    """An approximation of a matrix D (out x in)."""

    B_OR: Tensor
    A_RI: Tensor
    lost: float
    """Frobenius norm of D - B A."""
    squares: Tensor | None
    """All squared singular values of D, the largest first, float64; None where they were not computed."""


def low_rank(D_OI: Tensor, rank: int) -> LowRank:
    """Return the approximation of a float32 matrix by one of the rank; beyond its smaller side, B and A are 0."""
    wide = D_OI.shape[0] <= D_OI.shape[1]
    D = D_OI if wide else D_OI.T
    if not D.any():
        out, inside = D_OI.shape
        nothing = torch.zeros(len(D), dtype=torch.float64)
        return LowRank(B_OR=D.new_zeros(out, rank), A_RI=D.new_zeros(rank, inside), lost=0.0, squares=nothing)
    squares = None
    if len(D) <= EXACT_UP_TO:
        wider = D.double()
        ascending, vectors = torch.linalg.eigh(wider @ wider.T)
        squares = ascending.flip(0).clamp_(min=0)
        U = vectors[:, -rank:].flip(1).float()
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            U = torch.svd_lowrank(D, q=min(rank + _OVERSAMPLING, len(D)), niter=4)[0][:, :rank]
    U = pad(U, (0, rank - U.shape[1]))
    projected = U.T @ D
    root = projected.norm(dim=1).sqrt_()
    root[root == 0] = 1  # beyond the rank of D there is nothing to divide among the two
    thin, long = U * root, projected / root[:, None]
    B_OR, A_RI = (thin, long) if wide else (long.T, thin.T)
    lost = (D_OI - B_OR @ A_RI).norm().item()
    return LowRank(B_OR=B_OR.contiguous(), A_RI=A_RI.contiguous(), lost=lost, squares=squares)
