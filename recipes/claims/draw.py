"""Draw docs/figures/rank_error.svg and rl.svg from the results in measured/: `python recipes/claims/draw.py`."""

import json
from pathlib import Path

import matplotlib.pyplot as plt

MEASURED = Path(__file__).parent / "measured"
FIGURES = MEASURED.parents[2] / "docs" / "figures"
COLOURS = {"EGGROLL": "#0072b2", "OpenES": "#d55e00", "PPO": "#59636e"}


def rank_error() -> None:
    """Draw error over rank."""
    rows = json.loads((MEASURED / "rank_error.json").read_text(encoding="utf-8"))["rows"]
    ranks, errors = [row["rank"] for row in rows], [row["error"] for row in rows]
    figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
    axes.errorbar(ranks, errors, [row["noise"] for row in rows], fmt="o-", color="#0072b2", label="network of 4 × 3")
    axes.plot(ranks, [2 / rank for rank in ranks], "s--", color="#d55e00", label="cubic, exact: 2 / r", markersize=3)
    axes.plot(ranks, [0.42 / rank for rank in ranks], ":", color="#59636e", label="slope −1")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.set_xlabel("rank r")
    axes.set_ylabel("error of the expected update,\nrelative to full rank")
    axes.legend(frameon=False)
    figure.savefig(FIGURES / "rank_error.svg", metadata={"Date": None})


def returns() -> None:
    """Draw the return of each task's policy over processor time and over environment steps, a line for each run."""
    names = ("rl.jsonl", "ppo.jsonl")
    runs = [json.loads(line) for name in names for line in (MEASURED / name).read_text(encoding="utf-8").splitlines()]
    tasks = sorted({(run["task"], run["width"]) for run in runs})
    figure, grid = plt.subplots(2, len(tasks), figsize=(3.2 * len(tasks), 5), layout="constrained", squeeze=False)
    for column, task in enumerate(tasks):
        for row, what in enumerate(("processor seconds", "environment steps")):
            axes = grid[row][column]
            for run in (run for run in runs if (run["task"], run["width"]) == task):
                x, y = [point[row] for point in run["history"]], [point[2] for point in run["history"]]
                axes.plot(x, y, ".-", color=COLOURS[run["method"]], label=run["method"], linewidth=1)
            axes.set_xlabel(what)
            axes.set_xscale("log")
        grid[0][column].set_title("{}, 3 × {}".format(*task))
        named = dict(zip(*reversed(grid[0][column].get_legend_handles_labels()), strict=True))
        grid[0][column].legend(named.values(), named.keys(), frameon=False)
    for row in grid:
        row[0].set_ylabel("mean return of 16 episodes")
    figure.savefig(FIGURES / "rl.svg", metadata={"Date": None})


if __name__ == "__main__":
    plt.rcParams |= {"svg.hashsalt": "claims", "svg.fonttype": "none", "font.size": 9}
    rank_error()
    returns()
