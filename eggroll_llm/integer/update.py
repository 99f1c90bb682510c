"""From fitness to int8 weights one higher, one lower or as they were, in integers.

With c_k = fitness of a pair's first member, which is minus its twin's, as a whole number of eighths,

    G = sum_k c_k A_k B_k^T,    W <- clip(W + sign(G) where |G| >= z ||c|| 256)

for matrices, and for vectors G = sum_k c_k A_k and 16 in the place of 256, the deviations of the terms. Were fitness
nothing but noise, G would be normal with a deviation of ||c|| 256, so that z decides what fraction of the weights
moves. z falls from no threshold at all to one that few weights reach: it takes the place of a learning rate.

Shapes: K antithetic pair, V value of a row of noise.
"""

import math
from statistics import NormalDist

import torch
from torch import Tensor

from eggroll_llm.es.noise import NoiseSpec
from eggroll_llm.integer.model import LAYOUT, ONE, SHAPES
from eggroll_llm.kernels.noise import served_rows

LARGEST = 32
"""No coefficient is larger, four root mean squares: 4,096 products then fit into 32 bits."""
Z_ONE = 1024
"""The integer that stands for a threshold of one deviation."""


def rows_of(seed: int, step: int, pairs_K: Tensor) -> Tensor:
    """Return the noise of pairs, int8 [K, V] with a deviation of 16: that of the generator, rounded."""
    noise = NoiseSpec(seed=seed, step=step, rank=1, sigma=float(ONE))  # A carries sigma
    normal_KV = served_rows(noise, pairs_K, LAYOUT, torch.float32)
    normal_KV[:, LAYOUT.a_width :].mul_(ONE)
    return normal_KV.round_().to(torch.int8)


def coefficients(fitness_M: Tensor) -> Tensor:
    """Return c_K, int32, from fitness in eighths, the twins' being opposite."""
    eighths_M = (fitness_M * 8).to(torch.int32)
    return (eighths_M[0::2] - eighths_M[1::2]) // 2


def whole_eighths(fitness_M: Tensor) -> Tensor:
    """Return the fitness of twins as they are applied and recorded: the nearest eighths, four at most."""
    return (fitness_M * 8).round().clamp(-LARGEST, LARGEST) / 8


def threshold(fraction: float) -> int:
    """Return the threshold, in 1/1024 deviations, that a fraction of normal numbers exceed, up or down."""
    return round(-NormalDist().inv_cdf(fraction / 2) * Z_ONE)


def zero_sums() -> dict[str, Tensor]:
    """Return sums without a pair, int64."""
    return {name: torch.zeros((out, inside) if inside else (out,), dtype=torch.int64) for name, out, inside in SHAPES}


def add_pairs_with_torch(sums: dict[str, Tensor], rows_KV: Tensor, coefficient_K: Tensor) -> None:
    """Add c_k A_k B_k^T of some pairs to the sums, in place."""
    for name, (A_KOR, B_KIR) in LAYOUT.factors(rows_KV).items():
        weighted_KO = coefficient_K[:, None].long() * A_KOR[:, :, 0]
        sums[name] += weighted_KO.T @ B_KIR[:, :, 0].long() if B_KIR.shape[1] else weighted_KO.sum(0)


def move(weights: dict[str, Tensor], sums: dict[str, Tensor], square: int, z: int) -> int:
    """Move weights, in place, by sums of pairs whose coefficients have this sum of squares; return how many moved."""
    moved = 0
    for name, _, inside in SHAPES:
        bound = math.isqrt(square * (z * (ONE * ONE if inside else ONE)) ** 2)
        up = sums[name].sign() * (sums[name].abs() * Z_ONE >= bound)
        weights[name] = (weights[name] + up).clamp(-127, 127).to(torch.int8)
        moved += int(up.count_nonzero())
    return moved
