"""A comparison as tables: for a terminal, and raw for a page."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from eggroll_llm.records.accuracy import accuracy_text, p_number, percent, points
from eggroll_llm.records.baseline import Constant, Share
from eggroll_llm.records.diagnosis import RECENT
from eggroll_llm.system.jsonl import number
from eggroll_llm.system.terminal import inert
from eval.compare import BUDGETS, Comparison, Cut, Mean, PairedTest, Seeds, Summary
from eval.runs import Point
from eval.statistics import LEAST_DISCORDANT, RESAMPLES

CELL = 400  # characters of a table's cell on a terminal, where it is folded: all of a name
ANSWER = 160  # and of an answer, which can be a megabyte
INTERVAL = "the 95 % interval over problems (Wilson)"


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """A table, for a terminal or a page. Its texts are raw; the code that shows them makes them inert."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    """How the numbers were obtained."""
    texts: int = 1
    """Number of columns, from the left, that hold text."""


def tables(comparison: Comparison) -> list[Table]:
    """Return the tables for a terminal: the grids, and examples of each test. Text of runs is inert."""
    return [*map(to_rich, grids(comparison)), *map(to_rich, example_grids(comparison))]


def grids(comparison: Comparison) -> list[Grid]:
    """Return the tables without examples: runs, tests and, of several runs, groups and equal budgets."""
    several = len(comparison.runs) > 1
    return [
        _accuracy_grid(comparison),
        _spent_grid(comparison),
        *([_seeds_grid(comparison)] if several and comparison.groups else []),
        *([_tests_grid(comparison)] if comparison.tests else []),
        *(_cut_grid(cut, comparison) for cut in comparison.cuts if several),
        *kinds_grids(comparison),
        *figures_grids(comparison.runs),
    ]


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
    """Return the table for a terminal or a pipe; wide text is folded, never cut."""
    table = Table(
        title=Text(f"\n{inert(grid.title, CELL)}", style="bold", no_wrap=False, overflow="fold"),
        caption=Text(grid.note, no_wrap=False, overflow="fold") if grid.note else None,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for i, column in enumerate(grid.columns):
        table.add_column(
            Text(inert(column, CELL)),
            justify="left" if i < grid.texts else "right",
            overflow="fold",
            no_wrap=i >= grid.texts,
        )
    for row in grid.rows:
        table.add_row(*(Text(inert(cell, ANSWER if grid.texts == len(row) else CELL)) for cell in row))
    return table


def pair_text(test: PairedTest) -> str:
    """Return what is tested, the name of a run with its own base model once: "run, base model → step 50"."""
    if test.at:
        return f"{test.first} → {test.second}: {test.at}"
    return f"{test.first} → {test.second.rpartition(', ')[2]}"


def interval_text(test: PairedTest) -> str:
    """Return the 95 % interval of the difference in percentage points; a dash where there are too few to say."""
    return " to ".join(map(points, test.result.interval)) if test.result.interval else "–"


def problem_text(problem: Mapping[str, Any]) -> str:
    """Return the fields of a problem, one a line, without its name and worked solution."""
    return "\n".join(f"{key}: {value}" for key, value in problem.items() if key not in ("id", "solution"))


def point_text(point: Point | None) -> str:
    """Return the accuracy of an evaluation with its interval; a dash without one."""
    return accuracy_text(point.accuracy, point.problems) if point else "–"


def mean_text(mean: Mean) -> str:
    """Return a mean accuracy over seeds with its standard error where there is one: "51.6 ± 3.1 %"."""
    if not math.isfinite(mean.stderr):
        return percent(mean.value)
    return f"{100 * mean.value:.1f} ± {100 * mean.stderr:.1f} %"


def constant_rows(constants: Sequence[Constant]) -> list[tuple[str, str, str]]:
    """Return name, number of problems and accuracy of constant answers, as tables show them below the others."""
    return [
        (f"best constant answer: {each.pattern}", f"{each.problems}", accuracy_text(each.accuracy, each.problems))
        for each in constants
    ]


def amount(value: float) -> str:
    """Return a count to three digits with k, M or G: 1.56 M."""
    for factor, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= 0.9995 * factor:
            scaled = value / factor
            return f"{scaled:.{max(0, 2 - int(math.log10(max(1, scaled))))}f}{unit}"
    return f"{value:.0f}"


def _accuracy_grid(comparison: Comparison) -> Grid:
    def cells(run: Summary) -> list[str]:
        reached = [point_text(run.base), point_text(run.final), percent(run.best.accuracy)]
        return [run.name, f"{run.final.problems}", *reached, f"{run.best.step}"]

    return Grid(
        title="Accuracy of each run",
        columns=["run", "problems", "base", "final", "best", "step"],
        rows=[
            *map(cells, comparison.runs),
            *([name, problems, "", share, "", ""] for name, problems, share in constant_rows(comparison.constants)),
        ],
        note=f"On held-out problems, with {INTERVAL}. Best: the highest evaluation and its step; it was selected on "
        "these problems, so it is optimistic and has no valid interval.",
    )


def reward_grids(rows: Sequence[Mapping[str, Any]]) -> list[Grid]:
    """Return a table of the rewards that are added in a run, from its rows of metrics; none for a single reward."""
    steps = [row for row in rows if row["step"]]
    names = dict.fromkeys(key for row in steps for key in row if key.startswith("rewards/") and key.endswith("/mean"))
    if not names:
        return []
    part = max(1, min(10, len(steps) // 2))

    def mean(key: str, rows: Sequence[Mapping[str, Any]]) -> str:
        values = [value for row in rows if math.isfinite(value := number(row, key))]
        return f"{math.fsum(values) / len(values):.3f}" if values else "–"

    when = "step" if part == 1 else f"{part} steps"
    return [
        Grid(
            title="Rewards",
            columns=["reward", f"first {when}", f"last {when}"],
            rows=[
                [key.removeprefix("rewards/").removesuffix("/mean"), mean(key, steps[:part]), mean(key, steps[-part:])]
                for key in names
            ],
            note="Mean over the completions in training to which a reward applies, before its weight. A reward that "
            "rises while accuracy does not is what the model learns instead.",
        )
    ]


def figures_grids(runs: Sequence[Summary]) -> list[Grid]:
    """Return a table of what there is to learn from, a column for each run; none before the first update."""
    names = dict.fromkeys(name for run in runs for name in run.figures)
    if not names:
        return []
    return [
        Grid(
            title="What there is to learn from",
            columns=["", *(run.name for run in runs)],
            rows=[[name, *(run.figures.get(name, "–") for run in runs)] for name in names],
            note=f"Means of the last {RECENT} steps. Twins are the two members of a pair. What is wrong with them is "
            "among the notes, with the setting to change.",
        )
    ]


def _spent_grid(comparison: Comparison) -> Grid:
    def cells(run: Summary) -> list[str]:
        memory = f"{run.total.memory:.1f} GiB" if math.isfinite(run.total.memory) else "–"
        spent = [f"{run.total.seconds / 60:.1f}", amount(run.total.completions), amount(run.total.tokens), memory]
        return [run.name, run.method, f"{run.seed}", f"{run.total.step}", *spent]

    return Grid(
        title="What each run spent",
        columns=["run", "method", "seed", "steps", "minutes", "completions", "tokens", "memory"],
        rows=[cells(run) for run in comparison.runs],
        note="In training, evaluations not counted; tokens are generated tokens. Memory: peak resident memory of the "
        "process, engine included.",
        texts=2,
    )


def _seeds_grid(comparison: Comparison) -> Grid:
    def cells(group: Seeds) -> list[str]:
        means = [mean_text(each) for each in (group.base, group.final)]
        return [group.label, ", ".join(group.runs), *means]

    return Grid(
        title="Same settings, different seeds",
        columns=["group", "runs", "base", "final"],
        rows=[
            *map(cells, comparison.groups),
            *([name, "", "", share] for name, _, share in constant_rows(comparison.constants)),
        ],
        note="Mean accuracy over the runs of a group ± standard error (none where all are equal), regardless of "
        "what they spent.",
        texts=2,
    )


def _cut_grid(cut: Cut, comparison: Comparison) -> Grid:
    total = f"{cut.amount / 60:.1f} minutes" if cut.budget == "seconds" else amount(cut.amount)
    reached = [[name, point_text(point), f"{point.step}"] for name, point in cut.reached.items() if point]
    means = [(group.label, group.within[cut.budget]) for group in comparison.groups if len(group.runs) > 1]
    constants = [[name, share, ""] for name, _, share in constant_rows(comparison.constants)]
    return Grid(
        title=f"Accuracy at the {BUDGETS[cut.budget]}: {total}",
        columns=["run", "accuracy", "step"],
        rows=[*reached, *([f"mean of {label}", mean_text(mean), ""] for label, mean in means), *constants],
        note=f"What {cut.set_by} spent, the least of the runs with updates. Each run counts with its last "
        f"evaluation within that budget, with {INTERVAL}; means over seeds ± standard error.",
    )


def kinds_grids(comparison: Comparison) -> list[Grid]:
    """Return the table of accuracies by kind of problem; none without kinds."""

    def shown(share: Share | None) -> str:
        return accuracy_text(share.accuracy, share.problems) if share else "–"

    rows = [
        [run.name, kind, f"{final.problems}", shown(base), shown(final)]
        for run in comparison.runs
        for kind, (base, final) in run.kinds.items()
    ]
    grid = Grid(
        title="Accuracy by kind of problem",
        columns=["run", "kind", "problems", "base", "final"],
        rows=rows,
        note=f"By kind of problem, as the task tells them apart; with {INTERVAL}.",
        texts=2,
    )
    return [grid] if rows else []


def _tests_grid(comparison: Comparison) -> Grid:
    def cells(test: PairedTest) -> list[str]:
        result = test.result
        problems = f"{result.problems}" + (f" of {test.available}" if result.problems < test.available else "")
        changed = [f"{len(result.wins)}", f"{len(result.losses)}"]
        return [
            pair_text(test),
            problems,
            points(result.difference),
            interval_text(test),
            *changed,
            p_number(result.p_value),
        ]

    return Grid(
        title="Paired tests on the same problems",
        columns=["first → second", "problems", "gain", "95 % interval", "won", "lost", "p"],
        rows=[cells(test) for test in comparison.tests],
        note="Gain of the second in percentage points; a group counts with the mean of each problem over seeds. "
        "Won, lost: problems on which the second is higher and lower. Interval: bootstrap over problems and, in "
        f"groups, seeds ({RESAMPLES:,} resamples, seeded); it is too narrow with few seeds, and for a single run it "
        f"holds for that seed only. Left out (–) where fewer than {LEAST_DISCORDANT} problems are won or lost: too few "
        "to resample. p: exact sign-flip test over problems, McNemar's for single runs; two-sided, not corrected for "
        "the number of tests. It holds for these runs on similar problems and says nothing about other seeds.",
    )
