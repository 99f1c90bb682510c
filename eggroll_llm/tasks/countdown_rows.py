"""Countdown problems from a file or the hub: columns `nums` (or `numbers`), `target`, perhaps `solution`."""

import math
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from eggroll_llm.errors import TaskError
from eggroll_llm.tasks.base import Problem
from eggroll_llm.tasks.countdown_problems import Key, key_of, make_row
from eggroll_llm.tasks.rows import load_hub, read_jsonl
from rewards import countdown


def hub_problems(name: str, rng: random.Random) -> Iterator[Problem]:
    """The problems of a data set in random order, checked when reached: there may be half a million."""
    table = load_hub(name, "train", instead="write the problems into a JSONL file and set file")
    for index in rng.sample(range(len(table)), len(table)):
        yield _parse(table[index], f"{name}[{index}]")


def file_problems(path: Path) -> list[Problem]:
    """The problems of a JSONL file, all checked.

    Raises:
        TaskError: a row is not usable, or repeats an earlier problem.
    """
    problems: list[Problem] = []
    seen: dict[Key, str] = {}
    for at, row in read_jsonl(path):
        problem = _parse(row, at)
        first = seen.setdefault(key_of(problem["numbers"], problem["target"]), at)
        if first != at:
            raise TaskError(f"{at}: the same problem is already at {first}. Remove one of them.")
        problems.append(problem)
    return problems


def _parse(row: Mapping[str, Any], at: str) -> Problem:
    numbers, target, solution = row.get("nums", row.get("numbers")), row.get("target"), row.get("solution")
    if numbers is None or target is None:
        missing = "nums" if numbers is None else "target"
        raise TaskError(f"{at}: {missing} is missing. A row needs nums (or numbers) and target.")
    if not isinstance(numbers, list) or not numbers or not all(type(n) is int and n >= 0 for n in numbers):
        remedy = "Write them without quotes, none below 0."
        raise TaskError(f"{at}: nums = {numbers!r:.80} is not a list of whole numbers. {remedy}")
    if type(target) not in (int, float) or (type(target) is float and not math.isfinite(target)):
        raise TaskError(f"{at}: target = {target!r:.80} is not a number. Write it without quotes.")
    if countdown.score("", numbers, target).detail == "bad_problem":
        raise TaskError(
            f"{at}: nums = {numbers!r:.80}, target = {target!r:.80}: too large or too small. Remove the row."
        )
    if solution is not None and not _solves(solution, numbers, target):
        remedy = "Correct or remove it."
        raise TaskError(f"{at}: solution = {solution!r:.80} does not make {target} of {numbers!r:.80}. {remedy}")
    return make_row(numbers, target, solution)


def _solves(solution: object, numbers: list[int], target: int | float) -> bool:
    if not isinstance(solution, str):
        return False
    return countdown.score(f"<answer>{solution}</answer>", numbers, target, use_all=False).correct
