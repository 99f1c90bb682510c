"""The normals of a parameter before they are scaled and rounded, and its estimate as the sum that masters add up."""

import torch
from torch import Tensor

from eggroll_llm.es.estimate import (
    PAIR_CHUNK,
    UpdateSpec,
    as_matrix,
    fold_with_torch,
    product_weights,
    weighted_products,
)
from eggroll_llm.es.noise import NoiseSpec, _factors, served_factors_of, shape_of


def normal_factors(noise: NoiseSpec, pairs_K: Tensor, name: str, out: int, inside: int) -> tuple[Tensor, Tensor]:
    """Return the normals A_KOR and B_KIR, float32 and unscaled."""
    A_NKOR, B_NKIR = _factors(noise, pairs_K, [name], (out, inside, 0, out), 1.0, torch.float32)
    return A_NKOR[0], B_NKIR[0]


def estimate(
    name: str, shape: tuple[int, ...], spec: UpdateSpec, served: torch.dtype, *, chunk: int = PAIR_CHUNK
) -> Tensor:
    """Return the estimate G of one parameter, float32 [out features, in features], or a vector [O]."""
    weight_K, G = product_weights(spec, 1.0), torch.zeros(shape)
    shapes = [shape_of(name, shape)]
    for _, products in weighted_products(shapes, spec.noise, weight_K, served, chunk, "cpu", served_factors_of):
        fold_with_torch(as_matrix(G), products, None)
    return G
