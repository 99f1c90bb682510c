"""Runs read from disk: what was spent up to each step, what was measured there, and which runs are seeds of one.

    metrics.jsonl                        a row a step; completions and tokens are summed here, wall time is cumulative
    evaluations/step-000040.jsonl        an answer a problem, as `eggroll_llm.records.answers` writes it

Runs that differ only in `seed` and in settings that no update depends on are repetitions of one experiment.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from eggroll_llm.config.compare import applies, flat, outcome_differences
from eggroll_llm.config.recipe import load_recipe
from eggroll_llm.config.schema import RunConfig
from eggroll_llm.config.toml import format_value
from eggroll_llm.errors import ConfigError, RunDirError, SamplesError
from eggroll_llm.models.called import called
from eggroll_llm.records.accuracy import percent
from eggroll_llm.records.answers import TASK, Sample, read_samples
from eggroll_llm.records.baseline import Constant
from eggroll_llm.records.run_dir import RunDir, earlier_starts
from eggroll_llm.records.weights import final_step
from eggroll_llm.system.jsonl import number, parse_json, read_rows, whole
from eggroll_llm.system.terminal import inert
from eggroll_llm.tasks.constant import best_pattern

Budget = Literal["completions", "tokens", "seconds"]
"""Budgets, named as in `Point`."""

OF_THE_METHOD = ("sampling.prompts_per_step", "sampling.samples_per_prompt", "sampling.temperature")
"""Settings that two methods need not share: how a step samples."""
LABEL_SETTINGS = 3
"""Settings in the label of a group, unless more are needed to tell the groups apart."""
LABEL_VALUE = 24
"""Characters of a value in a label."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A step: what training had spent by then, and what was measured there. NaN stands for what was not measured."""

    step: int
    """Updates made; 0 is the base model."""
    seconds: float
    """Training time so far, evaluations not counted."""
    completions: int
    """Completions sampled in training so far."""
    tokens: int
    """Tokens generated in training so far."""
    reward: float
    """Mean reward of the step's completions."""
    accuracy: float
    """Fraction of the held-out problems answered correctly."""
    problems: int
    """Number of held-out problems."""
    truncated: float
    """Fraction of the held-out answers that the length limit ended."""
    memory: float
    """Most GiB resident in the training process so far."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A run, finished or not, with at least one evaluation."""

    directory: RunDir
    name: str
    """The directory's name, with as much of the path before it as tells it from the others."""
    config: RunConfig
    rows: tuple[Mapping[str, Any], ...]
    """Rows of metrics.jsonl."""
    points: tuple[Point, ...]
    """One for each row."""
    starts: tuple[Mapping[str, Any], ...]
    """What the run ran on, once for each time it was started; empty when that is not known."""
    base_model: str
    """Identity of the base model; empty when that is not known."""
    constant: Constant | None
    """The best constant answer to the held-out problems; None where there is none, or it was not recorded."""

    @property
    def evaluations(self) -> list[Point]:
        """Return the points with an accuracy, in order."""
        return [point for point in self.points if math.isfinite(point.accuracy)]

    @property
    def base(self) -> Point | None:
        """Return the evaluation before the first update; None without one."""
        first = self.evaluations[0]
        return first if first.step == 0 else None

    @property
    def best(self) -> Point:
        """Return the first of the evaluations with the highest accuracy."""
        return max(self.evaluations, key=lambda point: point.accuracy)

    @property
    def finished(self) -> bool:
        """Return whether the final model is that of the last step."""
        return final_step(self.directory) == self.points[-1].step

    def within(self, budget: Budget, amount: float) -> Point | None:
        """Return the last evaluation for which no more than that was spent; None before the first."""
        return next((point for point in reversed(self.evaluations) if getattr(point, budget) <= amount), None)

    def answers(self, step: int) -> dict[str, Sample]:
        """Return the answers of an evaluation by problem: id, content and how often it was there before.

        By content, so that an edited problem is another one; counted, so that repeated problems stay apart.
        Raises RunDirError when they were not recorded, SamplesError when the file is damaged.
        """
        path = self.directory.evaluation_file(step)
        if not path.is_file():
            raise RunDirError(
                f"{path}: no such file, so single answers cannot be compared. Restore it, or train again to record it."
            )
        samples = [sample for sample in read_samples(path)[1] if sample.sample == 0]
        if any(TASK not in sample.scores for sample in samples):
            raise RunDirError(f'{path}: its answers have no score "{TASK}". Name a run whose evaluations have it.')
        answers: dict[str, Sample] = {}
        seen: Counter[str] = Counter()
        for sample in samples:
            problem = json.dumps([sample.id, sample.doc], sort_keys=True)
            answers[f"{problem} {seen[problem]}"] = sample
            seen[problem] += 1
        return answers


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """The same experiment with different seeds."""

    label: str
    """Method, the settings in which the groups differ, and the number of seeds."""
    runs: tuple[Run, ...]


def read_runs(paths: Sequence[Path | str]) -> list[Run]:
    """Read run directories.

    Raises:
        RunDirError: a directory that is not a run, has no evaluation yet, or is damaged.
        ConfigError: a configuration that cannot be read, a directory that is named twice, or no directory at all.
    """
    directories = [RunDir.open(path) for path in paths]
    places = [directory.path.resolve() for directory in directories]
    if not places:
        raise ConfigError("no run given: name at least one run directory")
    if twice := [place for place in places if places.count(place) > 1]:
        raise ConfigError(f"{twice[0]}: given twice: name each run once")
    return [_read_run(directory, name) for directory, name in zip(directories, _names(places), strict=True)]


def group_seeds(runs: Sequence[Run]) -> list[Group]:
    """Return the runs in groups of the same experiment, in the order of their first runs."""
    groups: list[list[Run]] = []
    for run in runs:
        same = (group for group in groups if not _telling(run.config, group[0].config))
        if (group := next(same, None)) is None:
            groups.append([run])
        else:
            group.append(run)
    labels = _labels([group[0].config for group in groups])
    return [
        Group(label=f"{label} ({_count(len({run.config.seed for run in group}), 'seed')})", runs=tuple(group))
        for label, group in zip(labels, groups, strict=True)
    ]


def _read_run(directory: RunDir, name: str) -> Run:
    rows = read_rows(directory.metrics)
    steps = [row.get("step") for row in rows]
    for line, (before, step) in enumerate(zip([-1, *steps], steps, strict=False), start=1):
        if not isinstance(step, int) or not isinstance(before, int) or step <= before:
            raise RunDirError(f"{directory.metrics}:{line}: step {step!r:.40} after {before!r:.40}. Restore the file.")
    run = Run(
        directory=directory,
        name=name,
        config=load_recipe(directory.config),
        rows=tuple(rows),
        points=tuple(_points(rows)),
        starts=tuple(start for start in earlier_starts(directory.environment) if isinstance(start, dict)),
        base_model=_base_model(directory.journal),
        constant=directory.constant(),
    )
    if not run.evaluations:
        raise RunDirError(f"{directory.metrics}: has no evaluation yet. Wait for the first one, or name another run.")
    return run if run.constant else replace(run, constant=_pattern(run))


def _points(rows: Sequence[Mapping[str, Any]]) -> list[Point]:
    points, completions, tokens, seconds, memory = [], 0, 0, 0.0, math.nan
    for row in rows:
        completions += whole(row, "completions")
        tokens += whole(row, "tokens/generated")
        # Time cannot run back: a value that is missing is that of the step before.
        seconds = max(seconds, number(row, "wall_time"))
        known = [m for m in (memory, number(row, "memory/peak_gib")) if math.isfinite(m)]
        memory = max(known, default=math.nan)
        point = Point(
            step=row["step"],
            seconds=seconds,
            completions=completions,
            tokens=tokens,
            reward=number(row, "reward/mean"),
            accuracy=number(row, "eval/accuracy"),
            problems=whole(row, "eval/problems"),
            truncated=number(row, "eval/truncated"),
            memory=memory,
        )
        points.append(point)
    return points


def about(runs: Sequence[Run]) -> list[str]:
    """Return what to compare the figures of the runs with: base model and best constant answer."""
    models = dict.fromkeys(called(run.config.model) for run in runs)
    said = [f"Base model{'s' if len(models) > 1 else ''}: {'; '.join(models)}."]
    for constant in constants_of(runs):
        share = percent(constant.accuracy)
        said.append(f"The best constant answer to these problems ({constant.pattern}) is right for {share}.")
    return said


def constants_of(runs: Sequence[Run]) -> list[Constant]:
    """Return the best constant answers to the problems of the runs, each once."""
    return list(dict.fromkeys(run.constant for run in runs if run.constant))


def _pattern(run: Run) -> Constant | None:
    """Return the best pattern for Countdown of a run that did not record it, as those before it was recorded."""
    if run.config.task != "countdown":
        return None
    try:
        answers = run.answers(run.evaluations[-1].step)
    except (RunDirError, SamplesError):  # said where they are missed in a test
        return None
    operators = str(run.config.task_options.get("operators", "+-*/"))
    return best_pattern(operators, [sample.doc for sample in answers.values()])


def _base_model(journal: Path) -> str:
    try:
        with journal.open("rb") as file:
            return str(parse_json(file.readline())["base_model"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _names(places: Sequence[Path]) -> list[str]:
    """Return the last parts of the paths, as many as make them all different."""
    longest = max(len(place.parts) for place in places)
    for length in range(1, longest + 1):
        names = ["/".join(place.parts[-length:]) for place in places]
        if len(set(names)) == len(names):
            break
    return names


def _telling(a: RunConfig, b: RunConfig) -> list[str]:
    """Return the settings that make two runs different experiments; the limits of a run are among them."""
    return [key for key in outcome_differences(a, b) if key != "seed"]


def _labels(configs: Sequence[RunConfig]) -> list[str]:
    """Return a label for each: its method, with the settings in which it differs from others."""
    differing = {
        key
        for a, b in combinations(configs, 2)
        for key in _telling(a, b)
        if key != "method" and (a.method == b.method or key not in OF_THE_METHOD)
    }
    keys = [key for key in dict.fromkeys(key for config in configs for key in flat(config)) if key in differing]
    tables = [{key: v for key, v in flat(config).items() if applies(key, config)} for config in configs]
    needed = _needed(["method", *keys], tables)
    spare = [key for key in keys if key not in needed][: max(0, LABEL_SETTINGS - len(set(needed) - {"method"}))]
    chosen = [key for key in keys if key in needed + spare]
    labels = []
    for config, table in zip(configs, tables, strict=True):
        shown = [f"{_short(key, config)}={_value(table, key)}" for key in chosen if applies(key, config)]
        labels.append(" ".join([config.method, *shown, *(["…"] if len(chosen) < len(keys) else [])]))
    # Long values are cut, and may then look the same.
    return [f"{label} #{i}" if labels.count(label) > 1 else label for i, label in enumerate(labels, start=1)]


def _needed(keys: Sequence[str], tables: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys that each tell more tables apart than those before them: together they tell all apart."""
    needed: list[str] = []
    kinds = 1
    for key in keys:
        found = len({tuple(_value(table, k) for k in [*needed, key]) for table in tables})
        if found > kinds:
            needed, kinds = [*needed, key], found
    return needed


def _short(key: str, config: RunConfig) -> str:
    """Return the key without its table, unless another setting has the same name."""
    last = key.rpartition(".")[2]
    others = [other for other in flat(config) if applies(other, config)]
    return last if sum(other.rpartition(".")[2] == last for other in others) == 1 else key


def _value(table: Mapping[str, Any], key: str) -> str:
    value = table.get(key, "not set")
    text = f"{value:.6g}" if isinstance(value, float) else value
    return inert(text if isinstance(text, str) else format_value(text, key), LABEL_VALUE)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
