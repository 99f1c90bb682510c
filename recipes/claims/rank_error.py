"""How far is the expected update in rank r from that in full rank? `python recipes/claims/rank_error.py` measures it.

The function is the mean output of tanh(u' tanh(W x)) over 16 inputs, with W of 4 x 3: smoothing with sigma 0.5 changes
its gradient by more than its length, so it is far from linear where ES looks. Noise is the project's, in full rank
too. Of a member's difference the linear part is taken off, whose contribution is the gradient in every rank: the
smaller rest is estimated with less noise. Printed as a table, and written as rank_error.json.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from torch import Tensor

from eggroll_llm.es.noise import NoiseSpec
from eggroll_llm.kernels.noise import RowLayout, served_rows

RANKS = (1, 2, 4, 8, 16, 32)
O, I, SIGMA = 4, 3, 0.5  # noqa: E741 - the suffixes of shapes
CHUNK = 1 << 16

_random = torch.Generator().manual_seed(0)
WEIGHT_OI = 0.5 * torch.randn(O, I, generator=_random)
INPUT_NI = torch.randn(16, I, generator=_random)
OUTPUT_O = torch.randn(O, generator=_random)


def network(W_KOI: Tensor) -> Tensor:
    """Return the function's value [K] of weights [K, O, I]."""
    return torch.tanh(torch.tanh(torch.einsum("ni,koi->kno", INPUT_NI, W_KOI)) @ OUTPUT_O).mean(1)


def perturbations(rank: int | None, pairs_K: Tensor, seed: int) -> Tensor:
    """Return E [K, O, I] of unit variance, in full rank for None."""
    layout = RowLayout((("w", O, I) if rank else ("w", O * I, 0),), rank or 1)
    rows_KV = served_rows(NoiseSpec(seed=seed, step=1, rank=rank or 1, sigma=1.0), pairs_K, layout, torch.float32)
    if not rank:
        return rows_KV.view(-1, O, I)
    A_KOR, B_KIR = layout.factors(rows_KV)["w"]
    return torch.bmm(A_KOR, B_KIR.transpose(1, 2))


def expected_update(rank: int | None, pairs: int, seed: int) -> tuple[Tensor, float]:
    """Return the mean over antithetic pairs of (f(W + sigma E) - f(W - sigma E)) E / 2 sigma, and the noise in it.

    The noise is the standard error's length.
    """
    weights = WEIGHT_OI.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(network(weights[None]).sum(), weights)
    total, squares = torch.zeros(2, O, I, dtype=torch.float64)
    for pairs_K in torch.arange(pairs).split(CHUNK):
        E_KOI = perturbations(rank, pairs_K, seed)
        difference_K = (network(WEIGHT_OI + SIGMA * E_KOI) - network(WEIGHT_OI - SIGMA * E_KOI)) / (2 * SIGMA)
        rest_K = difference_K - (E_KOI * gradient).sum((1, 2))
        terms = (rest_K[:, None, None] * E_KOI).double()
        total += terms.sum(0)
        squares += terms.square().sum(0)
    mean = total / pairs
    return mean + gradient, float(((squares / pairs - mean**2) / pairs).sum().sqrt())


def measure(pairs: int) -> dict[str, object]:
    """Return the relative error and cosine of each rank to full rank, which gets four times as many pairs."""
    full, full_noise = expected_update(None, 4 * pairs, seed=7)
    rows = []
    for rank in RANKS:
        mean, noise = expected_update(rank, pairs, seed=100 + rank)
        error = float((mean - full).norm() / full.norm())
        noise = math.hypot(noise, full_noise) / float(full.norm())
        cosine = float((mean * full).sum() / mean.norm() / full.norm())
        rows.append({"rank": rank, "error": error, "noise": noise, "cosine": cosine})
        print(f"| {rank} | {error:.4f} | {noise:.4f} | {cosine:.5f} |", flush=True)
    return {"pairs": pairs, "sigma": SIGMA, "rows": rows}


def slope(rows: list[dict[str, float]]) -> float:
    """Return the slope of log error over log rank, least squares, after the noise is taken off (in squares)."""
    x = torch.tensor([math.log(row["rank"]) for row in rows])
    y = torch.tensor([math.log(max(row["error"] ** 2 - row["noise"] ** 2, 1e-12)) / 2 for row in rows])
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=1 << 22, help="antithetic pairs for each rank")
    parser.add_argument("--out", type=Path, default=Path("build/claims"), help="folder of the result")
    options = parser.parse_args()
    print("| rank | relative error | noise in it | cosine |\n|---|---|---|---|")
    found = measure(options.pairs)
    found |= {"slope": slope(found["rows"]), "slope_from_4": slope([r for r in found["rows"] if r["rank"] >= 4])}
    print(f"slope {found['slope']:.2f}, from rank 4 {found['slope_from_4']:.2f}")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "rank_error.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
