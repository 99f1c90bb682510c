"""The tables of docs/claims.md from the results in a folder: `python recipes/claims/tables.py [FOLDER]`.

Without a folder they are from recipes/claims/measured, and tests/recipes/test_claims.py compares them with the page.
"""

import json
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

MEASURED = Path(__file__).parent / "measured"
STEPS = 200
"""Forward passes in a generation of throughput.py."""


def grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [f"| {' | '.join(line)} |" for line in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def read(folder: Path, name: str) -> Any:
    """Return a result."""
    return json.loads((folder / name).read_text(encoding="utf-8"))


def integer(folder: Path) -> str:
    """Return the integer model's runs."""
    names = sorted(path.name for path in folder.glob("integer_?.json")) or ["integer_0.json"]
    runs = [read(folder, name) for name in names]
    rows = [
        [
            str(run["seed"]),
            f"{run['tokens'] / 1e6:.0f} M",
            f"{run['held_out_bits_per_byte']:.3f}",
            f"{run['unigram_bits_per_byte']:.3f}",
            f"{run['processor_seconds']:.0f}",
            f"{run['tokens'] / run['processor_seconds'] / 1e6:.2f} M",
        ]
        for run in runs
    ]
    head = ["seed", "tokens", "held-out bits/byte", "unigram entropy", "processor s", "tokens a processor s"]
    return grid(head, rows)


def population(folder: Path) -> str:
    """Return what one step of a large population took."""
    one = read(folder, "population.json")
    head = ["members", "tokens", "processor s", "memory above the start"]
    cells = (f"{one['population']:,}", f"{one['tokens']:,}", str(one["processor_seconds"]))
    return grid(head, [[*cells, f"{one['peak_mib_above_start']:.0f} MiB"]])


def rank(folder: Path) -> str:
    """Return the error of the expected update by rank."""
    rows = [
        [str(row["rank"]), f"{row['error']:.4f}", f"{row['noise']:.4f}", f"{row['cosine']:.4f}"]
        for row in read(folder, "rank_error.json")["rows"]
    ]
    return grid(["rank", "relative error", "noise in it", "cosine to full rank"], rows)


def throughput(folder: Path) -> str:
    """Return how EGGROLL's time compares with shared weights and with OpenES."""
    rows = []
    for row in read(folder, "throughput.json")["rows"]:
        ms = row["milliseconds"]
        generation = [STEPS * ms[f"{m} forward"] + ms[f"{m} noise and update"] for m in ("EGGROLL", "OpenES")]
        rows.append(
            [
                f"{row['width']:,}",
                str(row["population"]),
                f"{ms['shared'] / ms['EGGROLL forward']:.0%}".replace("%", " %"),
                f"{ms['OpenES forward'] / ms['EGGROLL forward']:.1f}",
                f"{generation[1] / generation[0]:.1f}",
                f"{ms['own matrices forward'] / ms['EGGROLL forward']:.1f}",
            ]
        )
    head = ["width", "population", "EGGROLL's forward pass, of shared weights' speed"]
    head += ["OpenES's time / EGGROLL's, forward", "the same, generation", "a matrix a member / EGGROLL, forward"]
    return grid(head, rows)


def line_of(points: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Return the memory of a sequence and the fixed part, in GiB, by least squares."""
    x, y = [point["sequences"] for point in points], [point["peak_gib"] for point in points]
    slope, fixed = statistics.linear_regression(x, y)
    return slope, fixed


def generations(folder: Path) -> str:
    """Return how many sequences fit into a memory."""
    points, rows = read(folder, "generations.json")["points"], []
    for method in dict.fromkeys(point["method"] for point in points):
        own = [point for point in points if point["method"] == method]
        slope, fixed = line_of(own)
        off = max(abs(point["peak_gib"] - fixed - slope * point["sequences"]) for point in own)
        measured = ", ".join(f"{point['sequences']}: {point['peak_gib']:.2f}" for point in own)
        fits = [f"{max(0, math.floor((size - fixed) / slope)):,}" for size in (4, 8, 16)]
        rows.append([method, measured, f"{fixed:.2f}", f"{1024 * slope:.1f}", f"{off:.2f}", *fits])
    head = ["", "GiB by sequences, measured", "fixed, GiB", "MiB a sequence", "off the line, GiB"]
    return grid([*head, "in 4 GiB", "8", "16"], rows)


def runs_of(folder: Path) -> dict[tuple[str, int, str], list[dict[str, Any]]]:
    """Return the runs by task, width and method; `reached` is where the tests that learned the task begin."""
    found: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for path in (folder / "rl.jsonl", folder / "ppo.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            run = json.loads(line)
            run["reached"] = len(run["history"]) - run["held"] if run["solved"] else None
            found.setdefault((run["task"], run["width"], run["method"]), []).append(run)
    if not found:
        raise FileNotFoundError(2, "no runs", str(folder / "rl.jsonl"))
    return {key: sorted(runs, key=lambda run: run["seed"]) for key, runs in sorted(found.items())}


def returns(folder: Path) -> str:
    """Return what each method took to learn each task, a number for each seed."""
    rows = []
    for (task, width, method), runs in runs_of(folder).items():
        marks = [None if run["reached"] is None else (run["reached"], *run["history"][run["reached"]]) for run in runs]
        cells = (
            [str(mark[0] + 1) if mark else "–" for mark in marks],
            [f"{mark[2] / 1e3:,.0f}" if mark else "–" for mark in marks],
            [f"{mark[1]:.1f}" if mark else "–" for mark in marks],
            [f"{statistics.fmean(point[2] for point in run['history'][-5:]):.0f}" for run in runs],
        )
        rows.append([task, f"3 × {width}", method, *map(", ".join, cells)])
    head = ["task", "network", "method", "generations to the mark", "thousand environment steps", "processor s"]
    return grid([*head, "mean of the last five tests"], rows)


def ratios(folder: Path) -> str:
    """Return EGGROLL's generations and time to the mark over those of OpenES, where both have learned all seeds."""
    runs, rows = runs_of(folder), []
    for task, width in dict.fromkeys((task, width) for task, width, _ in runs):
        both = [runs.get((task, width, method), []) for method in ("EGGROLL", "OpenES")]
        seeds = [[run["seed"] for run in own if run["solved"]] for own in both]
        if not seeds[0] or seeds[0] != seeds[1] or any(len(own) > len(seeds[0]) for own in both):
            continue
        generations = [statistics.fmean(run["reached"] + 1 for run in own) for own in both]
        seconds = [statistics.fmean(run["history"][run["reached"]][0] for run in own) for own in both]
        found = (f"{mine / theirs:.2f}" for mine, theirs in (generations, seconds))
        rows.append([task, f"3 × {width}", str(len(both[0])), *found])
    head = ["task", "network", "seeds", "generations, EGGROLL / OpenES", "processor time, EGGROLL / OpenES"]
    return grid(head, rows) if rows else ""


TABLES = {
    "Integers only": integer,
    "Population": population,
    "Error of low rank": rank,
    "Generations in parallel": generations,
    "Reinforcement learning": returns,
    "EGGROLL next to OpenES": ratios,
    "Time of a generation": throughput,
}


def main() -> None:
    """Print every table whose results there are."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else MEASURED
    for title, table in TABLES.items():
        try:
            print(f"{title}\n\n{table(folder)}\n")
        except FileNotFoundError as error:
            print(f"{title}: not measured, {error.filename} is missing\n")


if __name__ == "__main__":
    main()
