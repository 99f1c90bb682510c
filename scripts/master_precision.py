"""Compare ways to add many small updates to bfloat16 weights: `python scripts/master_precision.py` prints a table.

Weights are N(0, 0.05^2), updates N(0, rate^2), new ones in every step, as those of a run nearly are. Of each way: how
much of the sum of the updates, computed in float64, it has kept, and the root-mean-square error against it in units of
that sum.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from eggroll_llm.es.storage import join, split

STEPS = (1, 10, 100, 1000)
State = tuple[Tensor, ...]
"""Tensors whose sum is the weight, or the halves of a split master."""


def add_bfloat16(state: State, update: Tensor, generator: torch.Generator) -> State:
    """Add in bfloat16."""
    return ((state[0].float() + update).bfloat16(),)


def add_stochastically(state: State, update: Tensor, generator: torch.Generator) -> State:
    """Round the sum up or down at random, right on average."""
    bits = (state[0].float() + update).view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, generator=generator, dtype=torch.int32)
    return (((bits + noise) >> 16 << 16).view(torch.float32).bfloat16(),)


def add_with_feedback(state: State, update: Tensor, generator: torch.Generator) -> State:
    """Keep what rounding left over in a second bfloat16."""
    value = state[0].float() + (state[1].float() if len(state) > 1 else 0) + update
    return value.bfloat16(), (value - value.bfloat16().float()).bfloat16()


def add_float32(state: State, update: Tensor, generator: torch.Generator) -> State:
    """Add in float32."""
    return (state[0].float() + update,)


def add_split(state: State, update: Tensor, generator: torch.Generator) -> State:
    """Add in float32, kept as a bfloat16 and 16 bits more."""
    upper, lower = torch.empty_like(state[0]), torch.empty(state[0].shape, dtype=torch.int16)
    split(value_of(state).float() + update, upper, lower)
    return upper, lower


def value_of(state: State) -> Tensor:
    """Return the weight, float64."""
    if state[-1].dtype is torch.int16:
        return join(*state).double()
    return torch.stack([part.double() for part in state]).sum(0)


WAYS: dict[str, tuple[int, Callable[[State, Tensor, torch.Generator], State]]] = {
    "bfloat16": (2, add_bfloat16),
    "bfloat16, stochastic rounding": (2, add_stochastically),
    "bfloat16 and a bfloat16 residual": (4, add_with_feedback),
    'float32, split (`es.masters = "split"`)': (4, add_split),
    "float32 and the served bfloat16": (6, add_float32),
}
"""Name -> bytes of a weight, the served one included, and how an update is added."""


def measure(rate: float, count: int, seed: int = 0) -> dict[str, list[tuple[float, float]]]:
    """Return (share kept, relative error) of each way after each number of `STEPS`."""
    generator = torch.Generator().manual_seed(seed)
    start = (0.05 * torch.randn(count, generator=generator)).bfloat16()
    states: dict[str, State] = {name: (start,) for name in WAYS}
    way = torch.zeros(count, dtype=torch.float64)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    for step in range(1, STEPS[-1] + 1):
        update = rate * torch.randn(count, generator=generator)
        way += update
        for name, (_, add) in WAYS.items():
            states[name] = add(states[name], update, generator)
            if step in STEPS:
                moved = value_of(states[name]) - start.double()
                error = (moved - way).square().mean().sqrt() / way.square().mean().sqrt()
                found[name].append((float((moved * way).sum() / way.square().sum()), float(error)))
    return found


def main() -> None:
    """Print a table for each rate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-5, 6e-6])
    parser.add_argument("--count", type=int, default=1 << 16, help="weights")
    options = parser.parse_args()
    for rate in options.rates:
        print(f"\n| step {rate:g} (RMS): kept, error after | bytes | {' | '.join(f'{n:,}' for n in STEPS)} steps |")
        print("|---|---|" + "---|" * len(STEPS))
        for name, rows in measure(rate, options.count).items():
            cells = " | ".join(f"{kept:.1%}, {error:.2g}" for kept, error in rows)
            print(f"| {name} | {WAYS[name][0]} | {cells} |")


if __name__ == "__main__":
    main()
