"""Time of a generation by width and population: `python recipes/claims/rl/throughput.py`. Writes throughput.json.

The policy is one square layer with tanh, one row for each member. Timed are the shared weights (all members the same),
EGGROLL (rank 1), OpenES (full rank), and a weight matrix for each member, multiplied by torch.bmm as one would write it
first, by turns in one process, in the processor's time: the least of several. A generation is the noise, 200 forward
passes and the update; environments are left out.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from eggroll_llm import ES

CASES = [(width, 64) for width in (64, 128, 256, 512, 1024, 2048)] + [(256, population) for population in (16, 256)]
STEPS, TURNS, METHODS = 200, 9, {"EGGROLL": 1, "OpenES": None}


def seconds(work: Callable[[], object], repeat: int = 1) -> float:
    """Return the processor's time of one call."""
    begin = time.process_time()
    for _ in range(repeat):
        work()
    return (time.process_time() - begin) / repeat


@torch.no_grad()
def measure(width: int, population: int) -> dict[str, float]:
    """Return milliseconds: forward passes, and noise and update together."""
    policies = {method: nn.Sequential(nn.Linear(width, width), nn.Tanh()) for method in METHODS}
    strategies = {
        method: ES(policy, population=population, rank=METHODS[method], sigma=0.05, lr=0.01)
        for method, policy in policies.items()
    }
    x, fitness = torch.randn(population, width), torch.randn(population)
    own_MOI = torch.randn(population, width, width)
    repeat = max(1, int(5e7 / (width * width * population)))
    least: dict[str, float] = {}

    def note(what: str, value: float) -> None:
        least[what] = min(least.get(what, math.inf), 1e3 * value)

    for _ in range(TURNS):
        for method, es in strategies.items():
            policy = policies[method]
            policy(x)
            note("shared", seconds(lambda policy=policy: policy(x), repeat))
            begin = time.process_time()
            with es.ask():
                made = time.process_time() - begin
                policy(x)
                note(f"{method} forward", seconds(lambda policy=policy: policy(x), repeat))
            note(f"{method} noise and update", made + seconds(lambda es=es: es.tell(fitness)))
        note("own matrices forward", seconds(lambda: torch.bmm(own_MOI, x[:, :, None]).tanh_(), repeat))
    return least


def main() -> None:
    """Measure every case, print it and write all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/claims"), help="folder of the result")
    options = parser.parse_args()
    rows = []
    print("| width | population | EGGROLL / shared | OpenES / EGGROLL, forward | generation | own matrices, forward |")
    print("|---|---|---|---|---|---|")
    for width, population in CASES:
        found = measure(width, population)
        whole = {m: STEPS * found[f"{m} forward"] + found[f"{m} noise and update"] for m in METHODS}
        ratios = (
            found["shared"] / found["EGGROLL forward"],
            found["OpenES forward"] / found["EGGROLL forward"],
            whole["OpenES"] / whole["EGGROLL"],
            found["own matrices forward"] / found["EGGROLL forward"],
        )
        numbers = " | ".join(f"{ratio:.1f}" for ratio in ratios[1:])
        print(f"| {width} | {population} | {ratios[0]:.0%} | {numbers} |", flush=True)
        milliseconds = {what: round(value, 4) for what, value in found.items()}
        rows.append({"width": width, "population": population, "milliseconds": milliseconds})
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "throughput.json").write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
