"""From fitness to the estimate of a step, which the optimizer adds to the master weights.

With c_p = fitness_2p - fitness_2p+1 for each antithetic pair (c = fitness, every member being its own
direction, when members do not come in pairs) and E_p = A_p B_p^T / sqrt(r) from the very factors that were
sampled with:

    scale "rms"           G = sum_p c_p E_p / ||c||
    scale "literature"    G = sum_p c_p E_p / sqrt(N)      (N members: 1/sqrt(N) sum_i fitness_i sign_i E_i)
    weights               W <- optimizer(W, gradient = -G), with plain SGD W <- W + learning_rate * G

A vector, such as a bias, is a matrix of one row here: E_p = A_p 1 / sqrt(r).

Departures from the paper. Under "rms", our default, the root-mean-square change of a weight in a step of SGD
is `learning_rate`, whatever N, r and sigma are, since the entries of E have unit variance. Under "literature"
it is between 0 and 1.4 times that, as twins agree or disagree (1 when a twin says nothing about the other).

Published learning rates in the unit of "literature", to which "rms" is equal on average:

    HyperscaleES                     lr * sigma         (its estimate carries a factor sigma)
    ES at Scale                      alpha / sqrt(N)    (its estimate is a mean over N members)
    the EGGROLL paper's vLLM code    lr, or lr / sqrt(N) where it takes the mean

Bits. The sum over pairs is float32 products over chunks of `PAIR_CHUNK` pairs in fixed order, with TF32 and bf16
shortcuts switched off: one machine and number of threads gives the same bits in every engine and every replay that
folds with the same `Fold`.

Sources: EGGROLL, arXiv 2511.16652; Qiu et al., "Evolution Strategies at Scale", arXiv 2509.24372.

Shapes: M member, K antithetic pair (member when not antithetic), R rank, O out features, I in features.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from eggroll_llm.es.matmul import float32_products
from eggroll_llm.es.noise import NoiseSpec, Shape
from eggroll_llm.es.plan import StepPlan

# Pairs in one GEMM. Part of the bits: a journal replayed with another value would differ in the last place.
PAIR_CHUNK = 64
# Random values kept at a time. Small parameters share a call that makes them, which saves most of its overhead.
FACTOR_BATCH = 1 << 23
# Random values generated in one call for a parameter whose factors are more than that: memory does not grow with the
# population.
FACTOR_GROUP = 1 << 20

# No normal exceeds sqrt(62 ln 2) = 6.56, 6.6 after rounding to bf16: no entry of E exceeds 44 sqrt(r).
LARGEST_PRODUCT = 44.0
# Up to these, no optimizer's state and no step can overflow: see `check_finite`.
LARGEST_GRADIENT = 1e12
LARGEST_LEARNING_RATE = 1e6

FactorSource = Callable[
    [NoiseSpec, Tensor, Sequence[Shape], torch.dtype, torch.device | str], dict[str, tuple[Tensor, Tensor]]
]
"""`served_factors_of`, or something that remembers what it returned."""

Products = Iterable[tuple[Tensor, Tensor]]
"""Columns [K * R, O] and [K * R, I] of each chunk of pairs, float32, made as they are asked for. The sum of their
products is the estimate."""

Fold = Callable[[Tensor, Products, Tensor | None], None]
"""Adds the sum of products to a float32 matrix [O, I] in place, and writes its rounding into the third, if any."""


def as_matrix(weight: Tensor) -> Tensor:
    """Return a view of a weight as a fold takes it: a vector is a matrix of one row."""
    return weight if weight.ndim == 2 else weight.view(1, -1)


class NonFiniteUpdate(ArithmeticError):  # noqa: N818 - it names what was refused
    """An update could give weights that are not finite. It was not applied, nothing has changed."""


@dataclass(frozen=True, kw_only=True)
class UpdateSpec(StepPlan):
    """Everything that an update depends on besides the weights: a plan, and the fitness that its members earned."""

    fitness_M: tuple[float, ...]
    """Fitness of every member of the population, 0 for dropped ones."""

    @classmethod
    def of(cls, plan: StepPlan, fitness_M: Sequence[float]) -> Self:
        """Return the update of a plan whose members earned this fitness."""
        return cls(**dataclasses.asdict(plan), fitness_M=tuple(fitness_M))

    @cached_property
    def coefficient_K(self) -> Tensor:  # noqa: N802 - the suffix is its shape
        """Return the factor of each E_k in the estimate, float64; all zero when no pair differs.

        Raises ValueError on an unknown scale.
        """
        if self.scale not in ("rms", "literature"):
            raise ValueError(f"update_scale = {self.scale!r}: must be one of rms, literature")
        c_K = pair_coefficients(self.fitness_M, self.antithetic)
        if not c_K.any():
            return c_K
        return c_K / (c_K.norm() if self.scale == "rms" else math.sqrt(len(self.fitness_M)))


def pair_coefficients(fitness_M: Sequence[float], antithetic: bool) -> Tensor:
    """Return c_K, float64: the fitness of a pair's first member minus its twin's; without twins, the fitness.

    Raises ValueError when the number of members is odd although they come in antithetic pairs.
    """
    fitness = torch.tensor(fitness_M, dtype=torch.float64)
    if not antithetic:
        return fitness
    if len(fitness) % 2:
        raise ValueError(f"{len(fitness)} members: antithetic pairs need an even number")
    return fitness[0::2] - fitness[1::2]


def check_finite(spec: UpdateSpec) -> None:
    """Raise NonFiniteUpdate unless the update is certain to leave finite weights and optimizer state finite.

    Nothing has to be computed for it: a bound g on every entry of the estimate follows from the coefficients.
    Momentum is then at most g / (1 - momentum), Adam's averages at most g and g^2, and a step at most
    learning_rate times g, g / (1 - momentum) or g / eps: with the limits here all stay far inside float32 and
    bf16 (3e38).
    """
    coefficient_K = spec.coefficient_K
    gradient = LARGEST_PRODUCT * math.sqrt(spec.rank) * float(coefficient_K.abs().sum())
    largest = float(coefficient_K.abs().max()) if len(coefficient_K) else 0.0
    over_sigma = largest * max(1.0, abs(spec.learning_rate)) / spec.sigma
    for what, value, limit in (
        ("learning_rate", abs(spec.learning_rate), LARGEST_LEARNING_RATE),
        ("largest entry that the estimate could have", gradient, LARGEST_GRADIENT),
        (
            "largest pair coefficient, times the learning rate if above 1, over sigma",
            over_sigma,
            torch.finfo(torch.float32).max,
        ),
    ):
        if not value <= limit:
            found = f"{what} is {value:g}, the limit is {limit:g}"
            raise NonFiniteUpdate(f"update of step {spec.step} not applied: {found}")


def product_weights(spec: UpdateSpec, scale: float) -> Tensor:
    """Return the factor of each A_k B_k^T in scale * G, float64 [K].

    The factors hold sigma * E. Dividing here costs K divisions instead of O * I.
    """
    return scale * spec.coefficient_K / spec.sigma


def weighted_products(
    shapes: Sequence[Shape],
    noise: NoiseSpec,
    weight_K: Tensor,
    served_dtype: torch.dtype,
    chunk: int,
    device: torch.device | str,
    factors_of: FactorSource,
) -> Iterator[tuple[str, Products]]:
    """Yield name and weighted factors of each parameter; those of one are to be used before the next is asked for."""
    weight_K = weight_K.to(device=device, dtype=torch.float32)
    pairs_K = torch.arange(len(weight_K))
    for batch in _batches(shapes, len(weight_K) * noise.rank):
        values = noise.rank * sum(out + inside for _, out, inside in batch)
        whole = len(weight_K) * values <= FACTOR_BATCH
        group = len(weight_K) if whole else max(chunk, FACTOR_GROUP // values // chunk * chunk)
        factors = (factors_of(noise, part_K, batch, served_dtype, device) for part_K in pairs_K.split(group))
        made = list(factors) if len(batch) > 1 else factors
        for name, _, _ in batch:
            yield name, _products(name, made, weight_K, chunk)


def _products(
    name: str, factors: Iterable[Mapping[str, tuple[Tensor, Tensor]]], weight_K: Tensor, chunk: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the weighted columns of a parameter for each chunk of pairs, whose factors come in groups of chunks."""
    weights = iter(weight_K.split(chunk))
    for group in factors:
        A_KOR, B_KIR = group[name]
        if not B_KIR.shape[1]:  # a vector
            A_KOR, B_KIR = A_KOR.new_ones(len(A_KOR), 1, A_KOR.shape[2]), A_KOR
        for A_COR, B_CIR, weight_C in zip(A_KOR.split(chunk), B_KIR.split(chunk), weights, strict=False):
            columns_A = (A_COR.transpose(1, 2) * weight_C[:, None, None]).flatten(0, 1)  # in float32, like the weights
            yield columns_A, B_CIR.transpose(1, 2).to(torch.float32).flatten(0, 1)


def marking_the_last(products: Products) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Yield products with whether they are the last, which is when a fold writes the served weight."""
    waiting = None
    for product in products:
        if waiting is not None:
            yield *waiting, False
        waiting = product
    if waiting is not None:
        yield *waiting, True


def fold_with_torch(to_OI: Tensor, products: Products, served_OI: Tensor | None) -> None:
    """Fold with matrix products of torch, on any device."""
    with float32_products("highest"):
        for columns_A, columns_B in products:
            to_OI.addmm_(columns_A.T, columns_B)
    if served_OI is not None:
        served_OI.copy_(to_OI)


def _batches(shapes: Sequence[Shape], columns: int) -> Iterator[list[Shape]]:
    """Group parameters so that their factors of `columns` columns together stay below FACTOR_BATCH values."""
    batch: list[Shape] = []
    size = 0
    for shape in shapes:
        added = columns * (shape[1] + shape[2])
        if batch and size + added > FACTOR_BATCH:
            yield batch
            batch, size = [], 0
        batch.append(shape)
        size += added
    if batch:
        yield batch
