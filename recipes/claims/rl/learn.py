"""EGGROLL and OpenES on one task: `python recipes/claims/rl/learn.py cartpole`.

Both are `eggroll_llm.ES`, in rank 1 and in full rank: same noise, starts, fitness, step and policy. They take turns, a
generation each, so that what else the machine does slows both down; time is the processor's. A run ends when the
policy itself, without noise, reaches the task's mark on 16 episodes that are not trained on. These episodes are in
neither time nor steps. Appends a line a run to learn.jsonl.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from environments import ENVIRONMENTS, Environment, build_policy, play

from eggroll_llm import ES

RESULTS = Path(__file__).with_suffix(".jsonl")
RANKS = {"EGGROLL": 1, "OpenES": None}
TESTED_ON = 16


class Learner:
    """A method on a task."""

    def __init__(self, environment: Environment, method: str, seed: int, options: argparse.Namespace) -> None:
        self.environment, self.episodes = environment, options.episodes
        self.policy = build_policy(environment, options.width, layers=3, seed=seed)
        self.es = ES(
            self.policy,
            population=options.population,
            rank=RANKS[method],
            sigma=options.sigma,
            lr=options.lr,
            seed=seed,
            fitness=options.fitness,
        )
        self.starts, self.seconds, self.steps = torch.Generator().manual_seed(seed), 0.0, 0
        self.history: list[tuple[float, int, float]] = []
        """Processor seconds, environment steps and test return after each generation."""

    def generation(self) -> None:
        """Play and update once."""
        begin = time.process_time()
        state = self.environment.reset(self.episodes, self.starts).repeat(self.es.population, 1)
        with self.es.ask(self.es.members().repeat_interleave(self.episodes)):
            returns, steps = play(self.environment, self.policy, state)
        self.es.tell(returns.view(self.es.population, self.episodes))
        self.seconds += time.process_time() - begin
        self.steps += steps
        tests = self.environment.reset(TESTED_ON, torch.Generator().manual_seed(2**31))
        test = float(play(self.environment, self.policy, tests)[0].mean())
        self.history.append((round(self.seconds, 3), self.steps, round(test, 1)))

    @property
    def solved(self) -> bool:
        """Whether the last test reached the mark."""
        return bool(self.history) and self.history[-1][2] >= self.environment.solved


def main() -> None:
    """Run every seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=ENVIRONMENTS)
    parser.add_argument("--methods", choices=RANKS, nargs="+", default=[*RANKS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--population", type=int, default=64)
    parser.add_argument("--episodes", type=int, default=2, help="of each member, from the same starts")
    parser.add_argument("--sigma", type=float, default=0.1)
    parser.add_argument("--lr", type=float, default=0.03)
    parser.add_argument("--fitness", default="centered")
    parser.add_argument("--generations", type=int, default=20)
    options = parser.parse_args()
    settings: dict[str, Any] = {key: value for key, value in vars(options).items() if key not in ("seeds", "methods")}
    for seed in options.seeds:
        learners = {method: Learner(ENVIRONMENTS[options.task], method, seed, options) for method in options.methods}
        for _ in range(options.generations):
            for method, learner in learners.items():
                if not learner.solved:
                    learner.generation()
                    print(options.task, method, seed, len(learner.history), *learner.history[-1], flush=True)
        for method, learner in learners.items():
            line = settings | {"method": method, "seed": seed, "solved": learner.solved, "history": learner.history}
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
