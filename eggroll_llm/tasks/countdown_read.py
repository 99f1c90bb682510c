"""Countdown problems from a file or the hub: columns `nums` (or `numbers`), `target`, perhaps `solution`.

Numbers and targets may be text in quotes. A solution that is null or wrong is left out, and counted: the problem can be
trained on all the same, as only its gold answer is not known.
"""

import contextlib
import math
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eggroll_llm.errors import TaskError
from eggroll_llm.system.jsonl import parse_json
from eggroll_llm.tasks.countdown_generate import Key, key_of, make_row
from eggroll_llm.tasks.read import load_file, load_hub, missing_column
from eggroll_llm.tasks.task import Problem
from rewards import countdown

_WHOLE = re.compile(r"\s*[0-9]{1,100}\s*", re.ASCII)
_NUMBER = re.compile(r"\s*[+-]?[0-9]{1,100}(\.[0-9]{1,100})?\s*", re.ASCII)


@dataclass(kw_only=True, slots=True)
class Solutions:
    """How many of the rows read so far have a solution."""

    use_all: bool
    """Whether one must use every number."""
    right: int = 0
    missing: int = 0
    wrong: int = 0
    first_wrong: str = ""

    def notes(self) -> list[str]:
        """Return a warning about solutions that are wrong, or that are missing where other rows have one."""
        total = self.right + self.missing + self.wrong
        notes = []
        if self.wrong:
            notes.append(
                f"Countdown: the solution of {self.wrong:,} of {total:,} rows is wrong and left out, first "
                f"{self.first_wrong}."
            )
        if 0 < self.missing < total:
            notes.append(f"Countdown: {self.missing:,} of {total:,} rows have no solution.")
        return notes


def hub_problems(name: str, rng: random.Random, solutions: Solutions) -> Iterator[Problem]:
    """Return the problems of a data set in random order, checked when reached: there may be half a million."""
    table = load_hub(name, "train", instead="write the problems into a file and set file")
    for index in rng.sample(range(len(table)), len(table)):
        yield _parse(table[index], f"{name}[{index}]", solutions)


def file_problems(path: Path, solutions: Solutions) -> list[Problem]:
    """Return the problems of a file, all checked.

    Raises:
        TaskError: a row is not usable, or repeats an earlier problem.
    """
    problems: list[Problem] = []
    seen: dict[Key, str] = {}
    for at, row in load_file(path):
        problem = _parse(row, at, solutions)
        first = seen.setdefault(key_of(problem["numbers"], problem["target"]), at)
        if first != at:
            raise TaskError(f"{at}: the same problem is already at {first}. Remove one of them.")
        problems.append(problem)
    return problems


def _parse(row: Mapping[str, Any], at: str, solutions: Solutions) -> Problem:
    given, target = row.get("nums", row.get("numbers")), _number(row.get("target"), _NUMBER)
    if given is None or target is None:
        missing = "nums" if given is None else "target"
        raise missing_column(missing, row, at, "nums (or numbers) and target")
    numbers = [_number(n, _WHOLE) for n in _list(given)]
    if not numbers or not all(type(n) is int and n >= 0 for n in numbers):
        raise TaskError(f"{at}: nums = {given!r:.80} is not a list of whole numbers. Write them as [3, 7, 25].")
    if type(target) not in (int, float) or (type(target) is float and not math.isfinite(target)):
        raise TaskError(f"{at}: target = {target!r:.80} is not a number. Write it as 46.")
    if countdown.score("", numbers, target).detail == "bad_problem":
        raise TaskError(
            f"{at}: nums = {numbers!r:.80}, target = {target!r:.80}: too large or too small. Remove the row."
        )
    return make_row(numbers, target, _solution(row.get("solution"), numbers, target, at, solutions))


def _list(value: object) -> list[Any]:
    """Return a list, also one that was written as text; an empty one for anything else."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = parse_json(value)
    return value if isinstance(value, list) else []


def _number(value: Any, pattern: re.Pattern[str]) -> Any:
    """Return a number that was written as text, and anything else as it is."""
    if not isinstance(value, str) or not (match := pattern.fullmatch(value)):
        return value
    return float(value) if match.re is _NUMBER and match[1] else int(value)


def _solution(solution: object, numbers: list[int], target: int | float, at: str, solutions: Solutions) -> str | None:
    """Return the solution when it makes the target, and count it."""
    if solution is None or solution == "":
        solutions.missing += 1
        return None
    if isinstance(solution, str):
        score = countdown.score(f"<answer>{solution}</answer>", numbers, target, use_all=solutions.use_all)
        if score.correct:
            solutions.right += 1
            return solution
    solutions.wrong += 1
    solutions.first_wrong = solutions.first_wrong or f"{at}: {solution!a:.80} for {target}"
    return None
