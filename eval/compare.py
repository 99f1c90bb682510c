"""Runs next to each other: paired tests on the same problems, accuracy at equal budgets, means over seeds.

    base -> final   each run against its own base model, on the problems that both answered
    groups          each group of seeds against the first one, on the mean of each problem over the seeds of a group:
                    at the end, and at equal budgets
    difference      mean over common problems of (second right) - (first right), 95 % bootstrap over problems and seeds
    p               exact sign-flip test over problems; it holds for these runs and says nothing about other seeds
    equal budget    the smallest total of any run; each run counts with its last evaluation at or before that
    seeds           mean over the runs of a group, ± sample standard deviation / sqrt(runs)

"Final" is the last evaluation, "base" the one before the first update. The best evaluation of a run is chosen by its
accuracy on the problems it is reported on, so it is optimistic; no test uses it. Runs with incomparable accuracies have
neither groups nor equal budgets.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from eggroll_llm.config.compare import flat
from eggroll_llm.config.schema import OF_EVALUATIONS
from eggroll_llm.errors import RunDirError, SamplesError
from eggroll_llm.records.accuracy import mean
from eggroll_llm.records.answers import TASK, Sample
from eggroll_llm.records.baseline import Constant, Share, by_kind
from eggroll_llm.records.diagnosis import diagnose
from eggroll_llm.records.figures import figures
from eggroll_llm.system.jsonl import to_json
from eval.runs import Budget, Group, Point, Run, constants_of, group_seeds
from eval.statistics import Paired, compare_paired, stderr

EXAMPLES = 3
"""Examples of wins, and of losses, in each test."""

BUDGETS: dict[Budget, str] = {"completions": "same completions", "tokens": "same tokens", "seconds": "same time"}

Side = Sequence[tuple[Run, Point]]
"""One side of a test: a run or several seeds, each at one of its evaluations."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """A run in one line."""

    name: str
    method: str
    seed: int
    finished: bool
    """Whether the final model is that of the last step."""
    total: Point
    """The last step: what the run spent."""
    base: Point | None
    """Evaluation before the first update; None without one."""
    final: Point
    """Last evaluation."""
    best: Point
    """First of the evaluations with the highest accuracy."""
    kinds: Mapping[str, tuple[Share | None, Share]]
    """Accuracy at `base` and at `final` by kind of problem; empty without kinds."""
    figures: Mapping[str, str]
    """What its diagnosis rests on, see `records.figures`; empty before the first update."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """A problem that one of two models solves; of a group the answer of one of its runs."""

    id: str | int
    problem: Mapping[str, Any]
    first: str
    second: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedTest:
    """Two models, or groups of them, on the problems that all answered."""

    first: str
    second: str
    at: str
    """Where groups are compared: "final", "same tokens"...; empty for a run and its own base model."""
    available: int
    """Problems in the largest of the evaluations."""
    accuracies: tuple[float, float]
    """On the common problems; means over seeds."""
    result: Paired
    won: tuple[Example, ...]
    """Some problems that the second solves more often."""
    lost: tuple[Example, ...]
    """Some problems that the first solves more often."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """All runs at the same budget."""

    budget: Budget
    amount: float
    """The smallest total of the runs that were trained and recorded theirs; time in seconds."""
    set_by: str
    """The run of which it is the total."""
    reached: Mapping[str, Point | None]
    """By run its last evaluation within the budget; None without one, and for runs that are left out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mean:
    """Mean accuracy over seeds; NaN where a seed has none."""

    value: float
    stderr: float
    """Over seeds; NaN for one seed, and where all agree, which does not mean that others would."""


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
    """The contents of a report on runs."""

    runs: tuple[Summary, ...]
    comparable: bool
    """Whether the accuracies of all runs are comparable."""
    groups: tuple[Seeds, ...]
    """Of the runs with an evaluation after an update, if any; none unless comparable, like `cuts`."""
    tests: tuple[PairedTest, ...]
    cuts: tuple[Cut, ...]
    constants: tuple[Constant, ...]
    """The best constant answers to the problems of the runs, each once."""
    notes: tuple[str, ...]
    """What is missing and what limits the conclusions; one sentence each."""

    def json(self) -> str:
        """Return everything as strict JSON: no NaN, ASCII only."""
        return to_json(asdict(self)) + "\n"


class _Answers:
    """The answers of evaluations, each read once. A number of them that is not the recorded one is noted."""

    def __init__(self, notes: list[str]) -> None:
        self._notes = notes
        self._read: dict[tuple[str, int], Mapping[str, Sample]] = {}

    def __call__(self, run: Run, point: Point) -> Mapping[str, Sample]:
        """Raises what `Run.answers` raises."""
        key = (run.name, point.step)
        if key not in self._read:
            self._read[key] = run.answers(point.step)
            if (found := len(self._read[key])) != point.problems:
                self._notes.append(
                    f"{_model(run, point)}: {found} answers are recorded, its accuracy is of {point.problems} problems"
                )
        return self._read[key]


def compare_runs(runs: Sequence[Run]) -> Comparison:
    """Compare runs; other groups are tested against the group of the first run."""
    notes = [_unfinished(run) for run in runs if not run.finished]
    for run in runs:
        found = diagnose(run.config, run.rows, ended=run.finished)
        notes += [f"{run.name}: {finding}" for finding in found if finding.severity != "note"]
    answers = _Answers(notes)
    groups = groups_of(runs)
    grouped = {run.name for group in groups for run in group.runs}
    notes += [
        f"{run.name} has no evaluation after an update and is left out of the groups"
        for run in runs
        if run.name not in grouped
    ]
    for group in groups:
        if len({run.config.seed for run in group.runs}) < len(group.runs):
            notes.append(f"{group.label} contains runs with the same seed, which are not independent")
    if obstacles := _obstacles(runs, answers):
        notes.append(
            f"accuracies of these runs are not comparable, so there are no means, equal budgets or ranking: "
            f"they differ in {', '.join(obstacles)}"
        )
    if machines := _machines(runs):
        notes.append(f"training times are not comparable: {', '.join(machines)} differ")
    cuts = [] if obstacles else [cut for budget in BUDGETS if (cut := _cut(runs, budget, notes))]
    tests = [*_own_tests(runs, answers, notes), *_group_tests(groups, cuts, answers, notes)]
    return Comparison(
        runs=tuple(_summary(run, answers) for run in runs),
        comparable=not obstacles,
        groups=() if obstacles else tuple(_seeds(group, cuts) for group in groups),
        tests=tuple(tests),
        cuts=tuple(cuts),
        constants=tuple(constants_of(runs)),
        notes=tuple(notes),
    )


def groups_of(runs: Sequence[Run]) -> list[Group]:
    """Return the groups of seeds among the runs with an evaluation after an update; of all when there are none."""
    return group_seeds([run for run in runs if run.evaluations[-1].step] or runs)


def _unfinished(run: Run) -> str:
    return (
        f"{run.name} is not finished, or has continued since: it has no final model of step {run.points[-1].step}; "
        f"its final accuracy is that of step {run.evaluations[-1].step}"
    )


_GRADING = {"grader": "robust", "use_all": True, "rewards": []}
"""Task options that decide what counts as right, with their defaults."""


def _obstacles(runs: Sequence[Run], answers: _Answers) -> list[str]:
    """Return the differences between runs that make their accuracies incomparable."""
    known = all(run.base_model for run in runs)
    kinds: dict[str, set[Any]] = {
        "base model": {run.base_model if known else run.config.model for run in runs},
        "task": {run.config.task for run in runs},
        "eval.split": {run.config.eval.split for run in runs},
        "eval.max_tokens": {run.config.eval.max_tokens or run.config.sampling.max_tokens for run in runs},
    }
    for name in OF_EVALUATIONS:
        kinds[f"sampling.{name}"] = {getattr(run.config.sampling, name) for run in runs}
    for option, default in _GRADING.items():
        given = (run.config.task_options.get(option, default) for run in runs)
        # Of several rewards the first says what is right.
        first = (each[:1] if isinstance(each, list | tuple) else [each] for each in given)
        kinds[f"task_options.{option}"] = set(map(repr, first))
    evaluated: list[frozenset[Any]] = []
    for run in runs:
        with contextlib.suppress(RunDirError, SamplesError):  # said where they are missed in a test
            evaluated.append(frozenset(answers(run, run.evaluations[-1])))
    if len(evaluated) == len(runs):
        kinds["held-out problems"] = set(evaluated)
    else:
        kinds["eval.problems"] = {run.config.eval.problems for run in runs}
    return [name for name, found in kinds.items() if len(found) > 1]


def _machines(runs: Sequence[Run]) -> list[str]:
    """Return the differences that training time depends on: engine settings, machines, versions."""
    tables: list[dict[str, Any]] = [
        {
            key: value
            for key, value in flat(run.config).items()
            if key.startswith("engine.") and not (key == "engine.slots" and run.config.method == "grpo")  # it has none
        }
        for run in runs
    ]
    for start in (start for run in runs for start in run.starts):
        packages = start.get("packages")
        tables.append({key: start[key] for key in ("machine", "cpu_count") if key in start})
        tables.append(dict(packages) if isinstance(packages, Mapping) else {})
    keys = dict.fromkeys(key for table in tables for key in table)
    return [key for key in keys if len({f"{table[key]}" for table in tables if key in table}) > 1]


def _summary(run: Run, answers: _Answers) -> Summary:
    return Summary(
        name=run.name,
        method=run.config.method,
        seed=run.config.seed,
        finished=run.finished,
        total=run.points[-1],
        base=run.base,
        final=run.evaluations[-1],
        best=run.best,
        kinds=_kinds(run, answers),
        figures=figures(run.config, run.rows),
    )


def _kinds(run: Run, answers: _Answers) -> dict[str, tuple[Share | None, Share]]:
    base, final = run.base, run.evaluations[-1]
    try:
        after = by_kind(answers(run, final).values())
        before = by_kind(answers(run, base).values()) if base else {}
    except (RunDirError, SamplesError):  # said where they are missed in a test
        return {}
    return {kind: (before.get(kind), share) for kind, share in after.items()}


def _cut(runs: Sequence[Run], budget: Budget, notes: list[str]) -> Cut | None:
    totals = {run.name: getattr(run.points[-1], budget) for run in runs if run.evaluations[-1].step}
    if missing := [name for name, total in totals.items() if not total]:
        notes.append(f"{', '.join(missing)} recorded no {budget}: left out at the {BUDGETS[budget]}")
    if not (measured := {name: total for name, total in totals.items() if total}):
        return None
    name = min(measured, key=lambda name: measured[name])
    amount = measured[name]
    reached = {run.name: run.within(budget, amount) if run.name in measured else None for run in runs}
    return Cut(budget=budget, amount=amount, set_by=name, reached=reached)


def _seeds(group: Group, cuts: Sequence[Cut]) -> Seeds:
    return Seeds(
        label=group.label,
        runs=tuple(run.name for run in group.runs),
        base=_mean([run.base for run in group.runs]),
        final=_mean([run.evaluations[-1] for run in group.runs]),
        within={cut.budget: _mean([cut.reached[run.name] for run in group.runs]) for cut in cuts},
    )


def _mean(reached: Sequence[Point | None]) -> Mean:
    values = [point.accuracy if point else math.nan for point in reached]
    return Mean(value=mean(values), stderr=stderr(values) if len(set(values)) > 1 else math.nan)


def _own_tests(runs: Sequence[Run], answers: _Answers, notes: list[str]) -> Iterator[PairedTest]:
    for run in runs:
        final = run.evaluations[-1]
        if run.base and final.step:
            names = (_model(run, run.base), _model(run, final))
            yield from _test([(run, run.base)], [(run, final)], names, "", answers, notes)


def _group_tests(
    groups: Sequence[Group], cuts: Sequence[Cut], answers: _Answers, notes: list[str]
) -> Iterator[PairedTest]:
    """Each group against the first: at the end, and where all have an evaluation at each equal budget."""
    for second in groups[1:]:
        runs = [*groups[0].runs, *second.runs]
        found: dict[str, list[Point | None]] = {"final": [run.evaluations[-1] for run in runs]}
        found |= {BUDGETS[cut.budget]: [cut.reached[run.name] for run in runs] for cut in cuts}
        places: dict[tuple[int, ...], list[str]] = {}  # the same evaluations are tested once
        for place, reached in found.items():
            steps = tuple(point.step for point in reached if point)
            if len(steps) == len(runs):
                places.setdefault(steps, []).append(place)
        for names in places.values():
            pairs = [(run, point) for run, point in zip(runs, found[names[0]], strict=True) if point]
            sides = pairs[: len(groups[0].runs)], pairs[len(groups[0].runs) :]
            labels = [
                _model(*side[0]) if len(side) == 1 else group.label
                for group, side in zip((groups[0], second), sides, strict=True)
            ]
            yield from _test(*sides, (labels[0], labels[1]), ", ".join(names), answers, notes)


def _test(
    first: Side, second: Side, names: tuple[str, str], at: str, answers: _Answers, notes: list[str]
) -> Iterator[PairedTest]:
    """Yield the test, or add to `notes` why there is none."""
    try:
        sides = [[answers(*each) for each in side] for side in (first, second)]
    except (RunDirError, SamplesError) as error:
        notes.append(f"{' and '.join(names)} are not tested in pairs: {error}")
        return
    all_of_them = [each for side in sides for each in side]
    common = [problem for problem in all_of_them[0] if all(problem in each for each in all_of_them)]
    if not common:
        notes.append(
            f"{' and '.join(names)} are not tested in pairs: they have no problem in common. Compare runs with the "
            "same task, task_options and eval.problems."
        )
        return
    scores = [[[int(each[problem].scores[TASK].correct) for problem in common] for each in side] for side in sides]
    result = compare_paired(*scores)

    def examples(indices: Sequence[int], *, won: bool) -> tuple[Example, ...]:
        found = []
        for problem in (common[i] for i in indices[:EXAMPLES] if "final" in at or not at):
            a, b = (
                next(each[problem] for each in side if each[problem].scores[TASK].correct == right)
                for side, right in zip(sides, (not won, won), strict=True)
            )
            found.append(Example(id=a.id, problem=a.doc, first=a.completion, second=b.completion))
        return tuple(found)

    yield PairedTest(
        first=names[0],
        second=names[1],
        at=at,
        available=max(map(len, all_of_them)),
        accuracies=(mean([mean(each) for each in scores[0]]), mean([mean(each) for each in scores[1]])),
        result=result,
        won=examples(result.wins, won=True),
        lost=examples(result.losses, won=False),
    )


def _model(run: Run, point: Point) -> str:
    return f"{run.name}, {f'step {point.step}' if point.step else 'base model'}"
