"""Two engines of one thread each, through Ray, against one engine of two threads: which samples faster on this machine?

    python scripts/engines_or_threads.py [--rounds 5] [--steps 6] [--recipe RECIPE] [-- more settings of a run]

Runs the recipe for a few steps with one, then with the other, in turns, so that a machine that gets slower does so for
both. A step's speed is that of sampling (`throughput/tokens_per_second`); a run's is the median of its steps but for
the first. Prints a row for each kind: median of the runs, lowest and highest, the median time of a step, and the ratio.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

KINDS = {
    "one engine of two threads": ("--engine.replicas", "1", "--engine.threads", "2"),
    "two engines of one thread": ("--engine.replicas", "2", "--engine.threads", "1"),
}


def measure(recipe: Path, settings: list[str], run: Path) -> tuple[float, float]:
    """Return the median tokens per second, and seconds, of the steps of a run."""
    command = [sys.executable, "-m", "eggroll_llm", "train", recipe, "--run-dir", run, *settings]
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} ended with status {done.returncode}:\n{done.stdout[-2000:]}")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "time/step" in row][1:]
    return median(row["throughput/tokens_per_second"] for row in steps), median(row["time/step"] for row in steps)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="of a run, two at least: the first is not counted")
    parser.add_argument("--recipe", type=Path, default=Path("recipes/countdown_smollm2.toml"))
    parser.add_argument("more", nargs="*")
    given = parser.parse_args()
    settings = ["--steps", str(given.steps), "--eval.every", "0", "--eval.problems", "8", *given.more]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(given.rounds):
            for name, engines in KINDS.items():
                found[name].append(measure(given.recipe, [*settings, *engines], Path(folder) / f"{i} {name}"))
                print(f"round {i + 1}, {name}: {found[name][-1][0]:,.0f} tokens/s", file=sys.stderr, flush=True)
    print("| | tokens/s: median | lowest to highest | seconds a step | ratio |\n|---|---|---|---|---|")
    first = median(speed for speed, _ in next(iter(found.values())))
    for name, runs in found.items():
        speeds, seconds = zip(*runs, strict=True)
        middle = median(speeds)
        spread = f"{min(speeds):,.0f} to {max(speeds):,.0f}"
        print(f"| {name} | {middle:,.0f} | {spread} | {median(seconds):.2f} | {middle / first:.2f} |")


if __name__ == "__main__":
    main()
