"""What low rank costs, on this project's noise and estimate: an exact bias of order 1/r, and the rank of the sum."""

import math

import pytest
import torch
from factors import estimate

from eggroll_llm.es.estimate import UpdateSpec
from eggroll_llm.es.masters import MasterWeights
from eggroll_llm.es.settings import EsSettings
from eggroll_llm.kernels.noise import served_factors_of

MEMBERS = 1 << 17


def update(fitness: torch.Tensor, *, rank: int, seed: int, antithetic: bool) -> UpdateSpec:
    return UpdateSpec(
        step=1,
        noise_step=1,
        seed=seed,
        rank=rank,
        sigma=1.0,
        learning_rate=1.0,
        antithetic=antithetic,
        scale="literature",
        fitness_M=tuple(fitness.tolist()),
    )


@pytest.mark.parametrize("rank", [1, 2, 4, 8, 16, 32])
def test_the_update_of_a_cubic_is_too_long_by_two_over_r(rank):
    """f(W) = (u'Wv)^3 at W = 0, u and v of length 1: the expected update is E[X^4] u v' with X = u'Ev.

    X = sum_i a_i b_i / sqrt(r) with independent standard normals. Of the terms of X^4, r have one index, E = 9, and
    3 r (r - 1) two pairs of equal ones, E = 1: E[X^4] = (9 r + 3 r (r - 1)) / r^2 = 3 + 6 / r, and 3 in full rank. So
    the excess is exactly 2 / r.
    """
    u, v = torch.tensor([0.6, -0.8]), torch.tensor([0.8, 0.6])
    nothing = update(torch.zeros(MEMBERS), rank=rank, seed=5, antithetic=False)
    A_MOR, B_MIR = served_factors_of(nothing.noise, torch.arange(MEMBERS), [("w", 2, 2)], torch.float32, "cpu")["w"]
    X_M = ((u @ A_MOR) * (v @ B_MIR)).sum(1).double()
    masters = MasterWeights({"w": torch.zeros(2, 2)}, EsSettings(), torch.float32)
    masters.apply(update(X_M**3, rank=rank, seed=5, antithetic=False), served_factors_of)
    excess = float(u @ masters.served("w") @ v) / math.sqrt(MEMBERS) / 3 - 1  # "literature" divides the sum by the root
    assert abs(excess - 2 / rank) < 4 * float((X_M**4).std()) / math.sqrt(MEMBERS) / 3


def sum_of_pairs(pairs: int, rank: int, shape: tuple[int, int]) -> torch.Tensor:
    """Return the estimate when one of each twins, at random, is the better one by the same."""
    sign_K = torch.randint(0, 2, (pairs,), generator=torch.Generator().manual_seed(pairs)) * 2.0 - 1
    fitness = torch.stack((sign_K, -sign_K), 1).flatten()
    return estimate("w", shape, update(fitness, rank=rank, seed=1, antithetic=True), torch.float32)


def effective_rank(G: torch.Tensor) -> float:
    """Return (sum of s)^2 / sum of s^2 of the singular values: as many equal ones would give it."""
    s = torch.linalg.svdvals(G.double())
    return float(s.sum() ** 2 / s.square().sum())


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("pairs", [1, 5, 12, 24, 100])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (24, 24)])
def test_rank_of_a_sum_is_that_of_pairs_times_r_as_far_as_the_matrix_goes(shape, pairs, rank):
    G = sum_of_pairs(pairs, rank, shape)
    # Rounding leaves 4e-8 of the largest singular value, the least of a square matrix is 1e-6 of it.
    assert torch.linalg.matrix_rank(G.double(), rtol=2e-7) == min(pairs * rank, *shape)


def test_full_rank_is_not_yet_like_a_gaussian_matrix():
    """The sum is of full rank from min(O, I) pairs on, and like a Gaussian one with many times as many."""
    gaussian = effective_rank(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
    share = {pairs: effective_rank(sum_of_pairs(pairs, 1, (64, 64))) / gaussian for pairs in (64, 128, 512, 4096)}
    assert 0.7 < share[64] < 0.85
    assert 0.83 < share[128] < 0.93
    assert 0.96 < share[512] < 1.02
    assert 0.95 < share[4096] < 1.05
