"""A comparison as tables: for a terminal, and raw for a page."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from eggroll_llm.display import inert
from eval.compare import Comparison, Cut, PairedTest, Seeds, Summary

CELL = 60  # characters of a table's cell on a terminal
ANSWER = 160  # and of an answer


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """A table, for a terminal or a page. Its texts are raw: whoever shows them makes them inert."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    """How the numbers were obtained."""
    texts: int = 1
    """Number of columns, from the left, that are no numbers."""


def tables(comparison: Comparison) -> list[Table]:
    """Return what a terminal shows: the grids, and examples of each test. Text of runs is inert."""
    return [*map(to_rich, grids(comparison)), *map(to_rich, example_grids(comparison))]


def grids(comparison: Comparison) -> list[Grid]:
    """Return the tables without examples: runs, tests and, of several runs, groups and equal budgets."""
    found = [_runs_grid(comparison)]
    if len(comparison.runs) > 1:
        found.append(_seeds_grid(comparison))
    if comparison.tests:
        found.append(_tests_grid(comparison))
    if len(comparison.runs) > 1:
        found.append(_cuts_grid(comparison))
    return found


def example_grids(comparison: Comparison) -> list[Grid]:
    """Return the examples as tables, one for each test that has some."""
    return [
        Grid(
            title=pair_text(test),
            columns=["", "problem", "first", "second"],
            rows=[
                [word, problem_text(example.problem), example.first.strip(), example.second.strip()]
                for word, examples in (("won", test.won), ("lost", test.lost))
                for example in examples
            ],
            texts=4,
        )
        for test in comparison.tests
        if test.won or test.lost
    ]


def to_rich(grid: Grid) -> Table:
    """Return the table for a terminal."""
    table = Table(
        title=Text(inert(grid.title)), caption=grid.note or None, title_justify="left", caption_justify="left"
    )
    for i, column in enumerate(grid.columns):
        table.add_column(column, justify="left" if i < grid.texts else "right")
    for row in grid.rows:
        table.add_row(*(Text(inert(cell, ANSWER if grid.texts == len(row) else CELL)) for cell in row))
    return table


def pair_text(test: PairedTest) -> str:
    """Return the two models, a run's name once: "run, base model → step 50"."""
    name, _, step = test.second.rpartition(", ")
    return f"{test.first} → {step if test.first.startswith(f'{name}, ') else test.second}"


def problem_text(problem: Mapping[str, Any]) -> str:
    """Return the fields of a problem, one a line, without its name and worked solution."""
    return "\n".join(f"{key}: {value}" for key, value in problem.items() if key not in ("id", "solution"))


def percent(value: float, error: float = math.nan) -> str:
    """Return a fraction in per cent, with its standard error where there is one: "51.6 ± 3.1 %"."""
    if not math.isfinite(value):
        return "–"
    return f"{100 * value:.1f} ± {100 * error:.1f} %" if math.isfinite(error) else f"{100 * value:.1f} %"


def points(value: float) -> str:
    """Return a difference of fractions in percentage points, signed."""
    return f"{100 * value:+.1f}".replace("-", "−")


def p_text(p: float) -> str:
    """Return a p-value to two digits."""
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def amount(value: float) -> str:
    """Return a count to three digits with k, M or G: 1.56 M."""
    for factor, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= 0.9995 * factor:
            scaled = value / factor
            return f"{scaled:.{max(0, 2 - int(math.log10(max(1, scaled))))}f}{unit}"
    return f"{value:.0f}"


def _runs_grid(comparison: Comparison) -> Grid:
    sizes = sorted({run.final.problems for run in comparison.runs})
    return Grid(
        title="Runs",
        columns=["run", "method", "seed", "steps", "minutes", "completions", "tokens", "base", "final", "best", "step"],
        rows=[_run_cells(run) for run in comparison.runs],
        note=f"Accuracy on {' or '.join(map(str, sizes))} held-out problems ± standard error over problems; minutes of "
        "training, evaluations not counted; generated tokens; best: the highest of all evaluations, selected on these "
        "very problems, so it is optimistic.",
        texts=2,
    )


def _run_cells(run: Summary) -> list[str]:
    spent = [f"{run.total.seconds / 60:.1f}", amount(run.total.completions), amount(run.total.tokens)]
    reached = [percent(p.accuracy, p.stderr) if p else "–" for p in (run.base, run.final, run.best)]
    return [run.name, run.method, f"{run.seed}", f"{run.total.step}", *spent, *reached, f"{run.best.step}"]


def _seeds_grid(comparison: Comparison) -> Grid:
    def cells(group: Seeds) -> list[str]:
        means = (group.base, group.final, *group.within.values())
        return [group.label, ", ".join(group.runs), *(percent(each.value, each.stderr) for each in means)]

    return Grid(
        title="Same settings, different seeds",
        columns=["group", "runs", "base", "final", "same completions", "same tokens", "same time"],
        rows=[cells(group) for group in comparison.groups],
        note="Mean accuracy over the runs of a group ± standard error over them; the last three at the equal budgets.",
        texts=2,
    )


def _tests_grid(comparison: Comparison) -> Grid:
    def cells(test: PairedTest) -> list[str]:
        result, low, high = test.result, *map(points, test.result.interval)
        problems = f"{result.problems}" + (f" of {test.available}" if result.problems < test.available else "")
        counts = [f"{len(result.wins)}", f"{len(result.losses)}"]
        difference = [*map(percent, test.accuracies), points(result.difference), f"{low} to {high}"]
        return [pair_text(test), problems, *difference, *counts, p_text(result.p_value)]

    return Grid(
        title="Paired tests on the same problems",
        columns=["first → second", "problems", "first", "second", "difference", "95 % interval", "won", "lost", "p"],
        rows=[cells(test) for test in comparison.tests],
        note="Difference in percentage points with its paired bootstrap interval over problems (10,000 resamples, "
        "seeded); won and lost: problems that only the second and only the first solves; p: exact McNemar test, "
        "two-sided, not corrected for the number of tests.",
    )


def _cuts_grid(comparison: Comparison) -> Grid:
    def cells(i: int) -> list[str]:
        reached = [cut.reached[i] for cut in comparison.cuts]
        pairs = [(percent(p.accuracy, p.stderr), f"{p.step}") if p else ("–", "–") for p in reached]
        return [comparison.runs[i].name, *(cell for pair in pairs for cell in pair)]

    return Grid(
        title="Accuracy at equal budgets",
        columns=["run", *(text for cut in comparison.cuts for text in (_budget_text(cut), "at step"))],
        rows=[cells(i) for i in range(len(comparison.runs))],
        note="The budget is the smallest total of the runs; each run counts with its last evaluation within it.",
    )


def _budget_text(cut: Cut) -> str:
    return f"{cut.amount / 60:.1f} minutes" if cut.budget == "seconds" else f"{amount(cut.amount)} {cut.budget}"
