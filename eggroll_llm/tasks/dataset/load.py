"""Loads task "dataset", and says at the start all that can be said of the data."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from eggroll_llm.config.schema import RewardConfig
from eggroll_llm.errors import TaskError
from eggroll_llm.system import installed
from eggroll_llm.system.jsonl import to_json
from eggroll_llm.tasks.dataset.columns import BadRowError, Columns, find_columns, listed, plain, problems_of
from eggroll_llm.tasks.dataset.graders import GRADERS
from eggroll_llm.tasks.dataset.options import DatasetOptions
from eggroll_llm.tasks.dataset.rewards import NONE_APPLIES, Rewards, describe
from eggroll_llm.tasks.dataset.source import load_splits
from eggroll_llm.tasks.dataset.task import DatasetTask
from eggroll_llm.tasks.sandbox.pool import ScorePool
from eggroll_llm.tasks.task import Answer, Place, Problem, Verdict, judge

_Problems = dict[str, Problem]
"""Problems by where their rows stand."""


def load_dataset(options: DatasetOptions, base_dir: Path, place: Place, limits: RewardConfig) -> DatasetTask:
    """Return the task with its problems loaded, and every right answer checked by its grader.

    Raises:
        TaskError: contradictory options, unusable data, or a reward that cannot be called.
        InstallError: a package is missing.
    """
    names, weights = _rewards(options, place)
    splits = load_splits(options, base_dir, place)
    rows, left_out = plain([*splits.train, *splits.test])
    train_rows, test_rows = rows[: len(splits.train)], rows[len(splits.train) :]
    graded = any(name in GRADERS and GRADERS[name].gold for name in names)
    columns = find_columns(rows, options, place, graded=graded)
    spec = describe(names, weights, columns, base_dir, messages=_as_messages(options, columns, rows[0][1]))
    rewards = Rewards(spec)
    rewards.check()

    def check(problem: Problem) -> None:
        columns.sent(problem)
        if graded:
            columns.gold(problem)

    train, bad_train = problems_of(train_rows, "train", check)
    test, bad_test = problems_of(test_rows, "test", check)
    bad = {**bad_train, **bad_test, **dict(_bad_golds({**train, **test}, spec, limits))}
    reasons = listed([f"{at}: {reason}" for at, reason in bad.items()])
    if bad and not options.skip_bad_rows:
        are = "is" if len(bad) == 1 else "are"
        raise TaskError(
            f"{len(bad):,} of {len(rows):,} rows {are} not usable: {reasons}. Correct them, or set skip_bad_rows = "
            "true in [task_options]."
        )
    notes = [f"data set: {splits.told}; {_told(columns)}; rewards: {_listed(names, weights)}"]
    if left_out:
        notes.append(f"columns left out because rewards get only text, numbers and lists: {', '.join(left_out)}")
    if bad:
        notes.append(f"{len(bad):,} of {len(rows):,} rows were left out: {reasons}")
    tested = _once({at: p for at, p in test.items() if at not in bad}, {}, columns, "test", notes)
    trained = _once({at: p for at, p in train.items() if at not in bad}, tested, columns, "training", notes)
    if not tested or not trained:
        raise TaskError(
            f"{place('dataset')}: {options.dataset}: {len(trained)} training and {len(tested)} test problems are left, "
            f"but both are needed. {' '.join(notes[1:])}"
        )
    task = DatasetTask(
        label=f"rewards of {options.dataset}",
        spec=spec,
        rewards=rewards,
        train=list(trained.values()),
        test=list(tested.values()),
        stop=options.stop,
        notes=tuple(notes),
    )
    if rewards.functions:
        _try(task, limits, graded=graded)
    return task


def _rewards(options: DatasetOptions, place: Place) -> tuple[list[str], list[float]]:
    """Return names and weights of the rewards. Raises TaskError."""
    names = [options.rewards] if isinstance(options.rewards, str) else list(options.rewards)
    if not [name for name in names if name]:
        raise TaskError(
            f"{place('rewards')}: rewards is missing. Name a grader ({', '.join(GRADERS)}), or a function with the "
            "arguments of a TRL reward as file.py:NAME."
        )
    for name in names:
        if name not in GRADERS and ".py:" not in name:
            raise TaskError(
                f"{place('rewards')}: rewards: {name!a:.60} is not known. Valid: {', '.join(GRADERS)}, or file.py:NAME."
            )
    short = [name if name in GRADERS else name.rpartition(":")[2] for name in names]
    if twice := [name for name, count in Counter(short).items() if count > 1]:
        raise TaskError(
            f"{place('rewards')}: two rewards are called {twice[0]}. Rename one, as each is logged by its name."
        )
    weights = list(options.reward_weights) or [1.0] * len(names)
    if len(weights) != len(names) or not all(map(math.isfinite, weights)):
        raise TaskError(
            f"{place('reward_weights')}: reward_weights = {weights} does not have a number for each of {len(names)} "
            "rewards."
        )
    if "math" in names:
        installed.check('reward "math"', "math_verify")
    return names, weights


def _as_messages(options: DatasetOptions, columns: Columns, row: dict[str, Any]) -> bool:
    if options.completions != "auto":
        return options.completions == "messages"
    try:
        return isinstance(columns.asked(row), list)
    except BadRowError:
        return False


def _bad_golds(problems: _Problems, spec: dict[str, Any], limits: RewardConfig) -> Iterator[tuple[str, str]]:
    """Yield where right answers stand that do not get 1 from their own grader, and what they get."""
    for name in spec["names"]:
        grader = GRADERS.get(name)
        if grader is None:
            continue
        alone = spec | {"names": [name], "weights": [1.0], "files": {}}
        task = DatasetTask(label=name, spec=alone, rewards=Rewards(alone), train=(), test=())
        golds = [Answer(text=task.gold(problem) or "", problem=problem) for problem in problems.values()]
        for at, answer, verdict in zip(problems, golds, _judge(task, golds, limits), strict=True):
            score = verdict.score
            if score is None:
                yield at, f"{name} failed: {verdict.failure.rpartition(chr(10))[2]:.200}"
            elif score.detail == "bad_problem" or (grader.gold and not score.reward >= 1):
                what = (
                    f"the right answer {task.rewards.columns.gold(answer.problem)!a:.60}" if grader.gold else "the row"
                )
                yield at, f"{name} gives {what} {score.reward:g} ({score.detail})"


def _judge(task: DatasetTask, answers: Sequence[Answer], limits: RewardConfig) -> Iterator[Verdict]:
    if not task.needs_process:
        yield from (judge(task, answer, voted=False) for answer in answers)
        return
    with ScorePool(task, limits) as pool:
        yield from pool.judge(answers, voted=False)


def _try(task: DatasetTask, limits: RewardConfig, *, graded: bool) -> None:
    """Call the functions once. Raises TaskError when they fail on answers to the first two problems."""
    columns = task.rewards.columns
    texts = [columns.gold(p) if graded else "1" for p in task.train[:2]]
    answers = [  # whose tokens are any, but as a completion some
        Answer(text=text, problem=p, token_ids=range(max(1, len(text))))
        for text, p in zip(texts, task.train, strict=False)
    ]
    for answer, verdict in zip(answers, _judge(task, answers, limits), strict=True):
        if verdict.score is None and NONE_APPLIES not in verdict.failure:
            form = "messages" if task.rewards.messages else "texts"
            raise TaskError(
                f"the rewards fail on the completion {answer.text!a:.60} of problem {answer.problem['id']!a:.60} (as "
                f"{form}: task_options.completions):\n{verdict.failure}"
            )


def _once(problems: _Problems, taken: _Problems, columns: Columns, split: str, notes: list[str]) -> _Problems:
    """Return the problems without those whose prompt came before or is in `taken`; a note says how many these are."""
    held_out = {_key(columns, problem) for problem in taken.values()}
    kept: _Problems = {}
    first: dict[str, str] = {}
    repeated, leaked = [], []
    for at, problem in problems.items():
        key = _key(columns, problem)
        if key in held_out:
            leaked.append(at)
        elif key in first:
            repeated.append(f"{at} as {first[key]}")
        else:
            first[key], kept[at] = at, problem
    if leaked:
        notes.append(
            f"{len(leaked):,} training rows were left out: they have the prompt of a test row: {listed(leaked)}"
        )
    if repeated:
        notes.append(f"{len(repeated):,} {split} rows were left out: they repeat a prompt: {listed(repeated)}")
    return kept


def _key(columns: Columns, problem: Problem) -> str:
    return to_json(columns.sent(problem))


def _told(columns: Columns) -> str:
    prompt = "prompt: the template" if columns.template else f"prompt: {columns.prompt}"
    return f"{prompt}; answer: {columns.answer}" if columns.answer else prompt


def _listed(names: Sequence[str], weights: Sequence[float]) -> str:
    if len(names) == 1:
        return names[0]
    return " + ".join(f"{weight:g} × {name}" for name, weight in zip(names, weights, strict=True))
