"""Draw docs/figures/rank_error.svg from rank_error.json: `python recipes/claims/draw_rank.py`."""

import json
from pathlib import Path

import matplotlib.pyplot as plt

HERE = Path(__file__).parent
FIGURE = HERE.parents[1] / "docs" / "figures" / "rank_error.svg"


def main() -> None:
    """Draw error over rank."""
    rows = json.loads((HERE / "rank_error.json").read_text(encoding="utf-8"))["rows"]
    ranks, errors = [row["rank"] for row in rows], [row["error"] for row in rows]
    plt.rcParams |= {"svg.hashsalt": "rank", "svg.fonttype": "none", "font.size": 9}
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
    figure.savefig(FIGURE, metadata={"Date": None})


if __name__ == "__main__":
    main()
