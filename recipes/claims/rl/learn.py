"""EGGROLL and OpenES on one task: `python recipes/claims/rl/learn.py cartpole`.

Both are `eggroll_llm.ES`, in rank 1 and in full rank: same noise, starts, fitness, step and policy. They take turns, a
generation each, so that what else the machine does slows both down; time is the processor's. After each generation
the policy itself, without noise, plays 16 episodes that are not trained on, in neither time nor steps. A task is
learned when `HELD` such tests in a row reach its mark, which ends the run. Appends a line a run to rl.jsonl.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from environments import ENVIRONMENTS, Environment, build_policy, play

from eggroll_llm import ES

RANKS = {"EGGROLL": 1, "OpenES": None}
SETTINGS: dict[str, dict[str, Any]] = {
    "cartpole": {"population": 64, "episodes": 2, "sigma": 0.025, "lr": 0.015, "generations": 30},
    "acrobot": {"population": 64, "episodes": 1, "sigma": 0.025, "lr": 0.015, "generations": 20},
    "mountaincar": {"population": 64, "episodes": 1, "sigma": 0.1, "lr": 0.03, "generations": 20},
    "pendulum": {"population": 256, "episodes": 8, "sigma": 0.05, "lr": 0.008, "generations": 100},
}
"""For networks of 3 x 256. The learning rate falls to a tenth in a straight line."""
TESTED_ON, HELD = 16, 5


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
            fitness="rank",
            steps=options.generations,
            learning_rate_schedule="linear",
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
        """Whether the task is learned."""
        return learned(self.history, self.environment)


def learned(history: list[tuple[float, int, float]], environment: Environment) -> bool:
    """Return whether the last tests reached the mark, as many as have to in a row."""
    return len(history) >= HELD and all(test >= environment.solved for *_, test in history[-HELD:])


def append(file: Path, line: dict[str, Any]) -> None:
    """Add a run to the results."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(line | {"held": HELD}) + "\n")


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the options, of which these are common to the methods."""
    parser.add_argument("task", choices=ENVIRONMENTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path("build/claims"), help="folder of the results")
    return parser.parse_args()


def main() -> None:
    """Run every seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", choices=RANKS, nargs="+", default=[*RANKS])
    for key, kind in {"population": int, "episodes": int, "sigma": float, "lr": float, "generations": int}.items():
        parser.add_argument(f"--{key}", type=kind, help="default: that of the task in SETTINGS")
    options = parsed(parser)
    settings = {key: getattr(options, key) or value for key, value in SETTINGS[options.task].items()}
    options = argparse.Namespace(**vars(options) | settings)
    for seed in options.seeds:
        learners = {method: Learner(ENVIRONMENTS[options.task], method, seed, options) for method in options.methods}
        for _ in range(options.generations):
            for method, learner in learners.items():
                if not learner.solved:
                    learner.generation()
                    print(options.task, method, seed, len(learner.history), *learner.history[-1], flush=True)
        for method, learner in learners.items():
            line = {"task": options.task, "method": method, "seed": seed, "width": options.width, **settings}
            append(options.out / "rl.jsonl", line | {"solved": learner.solved, "history": learner.history})


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
