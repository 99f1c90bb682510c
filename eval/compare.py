"""Runs next to each other: paired tests on the same problems, accuracy at equal budgets, means over seeds.

    difference      mean over common problems of (second right) - (first right), 95 % paired bootstrap, exact McNemar p
    equal budget    the smallest total of any run; each run counts with its last evaluation at or before that
    seeds           mean over the runs of a group, ± sample standard deviation / sqrt(runs)

"Final" is the last evaluation, "base" the one before the first update. The best evaluation of a run is chosen by its
accuracy on the problems it is then quoted for, so it is optimistic; no test uses it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eggroll_llm.errors import RunDirError, SamplesError
from eggroll_llm.jsonl import to_json
from eggroll_llm.samples import TASK, Sample
from eval.runs import Budget, Group, Point, Run, group_seeds, read_runs
from eval.statistics import Paired, compare_paired, mean, stderr

EXAMPLES = 3
"""Examples of wins, and of losses, in each test."""

BUDGETS: tuple[Budget, ...] = ("completions", "tokens", "seconds")


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """A run in one line."""

    name: str
    method: str
    seed: int
    finished: bool
    """Whether the final model was written."""
    total: Point
    """The last step: what the run spent."""
    base: Point | None
    """Evaluation before the first update; None where there is none."""
    final: Point
    """Last evaluation."""
    best: Point
    """First of the evaluations with the highest accuracy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """A problem that one of two models solves."""

    id: str | int
    problem: Mapping[str, Any]
    first: str
    second: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedTest:
    """Two models on the problems that both answered."""

    first: str
    second: str
    available: int
    """Problems in the larger of the two evaluations."""
    accuracies: tuple[float, float]
    """On the common problems."""
    result: Paired
    won: tuple[Example, ...]
    """Some problems that only the second solves."""
    lost: tuple[Example, ...]
    """Some problems that only the first solves."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """All runs at the same budget."""

    budget: Budget
    amount: float
    """The smallest total of the runs; time in seconds."""
    reached: tuple[Point | None, ...]
    """Last evaluation within the budget, run by run; None before the first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mean:
    """Mean accuracy over seeds; NaN where a seed has none."""

    value: float
    stderr: float
    """Over seeds; NaN for one seed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seeds:
    """A group of runs that differ in the seed."""

    label: str
    runs: tuple[str, ...]
    base: Mean
    final: Mean
    within: Mapping[Budget, Mean]
    """At the equal budgets."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What a report on runs says."""

    runs: tuple[Summary, ...]
    groups: tuple[Seeds, ...]
    tests: tuple[PairedTest, ...]
    cuts: tuple[Cut, ...]
    notes: tuple[str, ...]
    """What is missing, and what limits a reading; one sentence each."""

    def json(self) -> str:
        """Return everything as strict JSON: no NaN, ASCII only."""
        return to_json(asdict(self)) + "\n"


def compare(paths: Sequence[Path | str]) -> Comparison:
    """Compare the runs in these directories; one is enough. Raises what `eval.runs.read_runs` raises."""
    return compare_runs(read_runs(paths))


def compare_runs(runs: Sequence[Run]) -> Comparison:
    """Compare runs; the first is the one that the others are tested against."""
    notes = [
        f"{run.name} is not finished: its final accuracy is that of step {run.evaluations[-1].step}"
        for run in runs
        if not run.finished
    ]
    groups = group_seeds(runs)
    for group in groups:
        if len({run.config.seed for run in group.runs}) < len(group.runs):
            notes.append(f"{group.label} holds runs of the same seed, which are not independent")
    cuts = tuple(_cut(runs, budget) for budget in BUDGETS)
    return Comparison(
        runs=tuple(map(_summary, runs)),
        groups=tuple(_seeds(group, cuts) for group in groups),
        tests=tuple(_tests(runs, notes)),
        cuts=cuts,
        notes=tuple(notes),
    )


def _summary(run: Run) -> Summary:
    return Summary(
        name=run.name,
        method=run.config.method,
        seed=run.config.seed,
        finished=run.finished,
        total=run.points[-1],
        base=run.base,
        final=run.evaluations[-1],
        best=max(run.evaluations, key=lambda point: point.accuracy),
    )


def _cut(runs: Sequence[Run], budget: Budget) -> Cut:
    smallest = min(getattr(run.points[-1], budget) for run in runs)
    return Cut(budget=budget, amount=smallest, reached=tuple(run.within(budget, smallest) for run in runs))


def _seeds(group: Group, cuts: Sequence[Cut]) -> Seeds:
    return Seeds(
        label=group.label,
        runs=tuple(run.name for run in group.runs),
        base=_mean([run.base for run in group.runs]),
        final=_mean([run.evaluations[-1] for run in group.runs]),
        within={cut.budget: _mean([run.within(cut.budget, cut.amount) for run in group.runs]) for cut in cuts},
    )


def _mean(reached: Sequence[Point | None]) -> Mean:
    values = [point.accuracy if point else math.nan for point in reached]
    return Mean(value=mean(values), stderr=stderr(values))


def _tests(runs: Sequence[Run], notes: list[str]) -> list[PairedTest]:
    """The tests that can be made; a sentence for each that cannot is added to `notes`."""
    pairs = [((run, 0), (run, run.evaluations[-1].step)) for run in runs if run.base and len(run.evaluations) > 1]
    final = [(run, run.evaluations[-1].step) for run in runs]
    tests = []
    for first, second in [*pairs, *((final[0], other) for other in final[1:])]:
        try:
            tests.append(_test(first, second))
        except (RunDirError, SamplesError) as error:
            notes.append(f"{_model(*first)} and {_model(*second)} are not tested in pairs: {error}")
    return tests


def _test(first: tuple[Run, int], second: tuple[Run, int]) -> PairedTest:
    """Raises RunDirError when the two have no problem in common; what `Run.answers` raises."""
    a, b = (run.answers(step) for run, step in (first, second))
    common = [problem for problem in a if problem in b]
    if not common:
        raise RunDirError(
            "they have no problem in common. Compare runs with the same task, task_options and eval.problems."
        )
    scores = [[float(answers[problem].scores[TASK].correct) for problem in common] for answers in (a, b)]
    result = compare_paired(*scores)

    def examples(indices: Sequence[int]) -> tuple[Example, ...]:
        return tuple(_example(a[common[i]], b[common[i]]) for i in indices[:EXAMPLES])

    return PairedTest(
        first=_model(*first),
        second=_model(*second),
        available=max(len(a), len(b)),
        accuracies=(mean(scores[0]), mean(scores[1])),
        result=result,
        won=examples(result.wins),
        lost=examples(result.losses),
    )


def _example(a: Sample, b: Sample) -> Example:
    return Example(id=a.id, problem=a.doc, first=a.completion, second=b.completion)


def _model(run: Run, step: int) -> str:
    return f"{run.name}, {f'step {step}' if step else 'base model'}"
