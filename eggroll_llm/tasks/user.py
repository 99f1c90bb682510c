"""A task from a user's own Python file: `task = "my_task.py:TASK"`.

    class Reverse:
        def problems(self, split): return [{"word": "drawer"}, ...]
        def prompt(self, problem): return f"Reverse {problem['word']}:"
        def score(self, completion, problem): return float(completion.strip() == problem["word"][::-1])

    TASK = Reverse()

The file is imported, so it can do anything; name only files that you trust. `TASK` may also be a class or
function that takes the task options and returns such an object. `stop`, `notes`, `gold` and `answer(completion)`
(what majority votes count) are optional, and so is `truncated` in `score`, which may return a number (correct
from 1 on) or a `rewards.Score`. Whatever else it returns becomes a reward of NaN, which no update uses.
"""

import difflib
import importlib.util
import inspect
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eggroll_llm.errors import TaskError
from eggroll_llm.tasks.base import Message, Problem, Split
from rewards import Score


@dataclass(frozen=True, kw_only=True, slots=True)
class UserTask:
    """The user's object, completed to a `Task`."""

    inner: Any
    train: Sequence[Problem]
    test: Sequence[Problem]
    stop: tuple[str, ...]
    notes: tuple[str, ...]
    takes_truncated: bool
    """Whether the user's score has the argument."""

    def problems(self, split: Split) -> Sequence[Problem]:
        """All problems of the split."""
        return self.train if split == "train" else self.test

    def prompt(self, problem: Problem) -> str | list[Message]:
        """The user's prompt."""
        prompt: str | list[Message] = self.inner.prompt(problem)
        return prompt

    def score(self, completion: str, problem: Problem, *, truncated: bool = False) -> Score:
        """The user's score; what it raises is not caught."""
        options = {"truncated": truncated} if self.takes_truncated else {}
        return as_score(self.inner.score(completion, problem, **options))

    def answer(self, completion: str, *, truncated: bool = False) -> str | None:
        """The user's answer, if there is such a method."""
        if not hasattr(self.inner, "answer"):
            return None
        answer = self.inner.answer(completion)
        return None if answer is None else str(answer)

    def gold(self, problem: Problem) -> str | None:
        """The user's gold answer, if there is such a method."""
        return self.inner.gold(problem) if hasattr(self.inner, "gold") else None


def as_score(value: object) -> Score:
    """A Score from what a user's score returned: a Score, a number, or a tensor or array with one number."""
    if isinstance(value, Score):
        return value
    if callable(item := getattr(value, "item", None)) and getattr(value, "size", None) is not None:
        try:
            value = item()
        except (TypeError, ValueError, RuntimeError):
            return Score(math.nan, False, "not_a_number")
    if not isinstance(value, bool | int | float):
        return Score(math.nan, False, "not_a_number")
    return Score(float(value), value >= 1, "reward")


def load_user_task(name: str, options: Mapping[str, Any], base_dir: Path) -> UserTask:
    """The object that `name`, "file.py:NAME", points to.

    Raises:
        TaskError: no such file or name, the file fails, or the object is not a task.
    """
    file, _, attribute = name.rpartition(":")
    path = base_dir / file
    inner = _attribute(_import(path), attribute, path)
    if isinstance(inner, type) or (callable(inner) and not hasattr(inner, "problems")):
        try:
            inner = inner(**options)
        except TypeError as error:
            raise TaskError(f"{path}: {attribute} does not accept task_options {dict(options)}: {error}.") from error
    elif options:
        raise TaskError(
            f"{path}: {attribute} is an object, so it takes no task_options, but {', '.join(options)} is "
            f"set. Make {attribute} a class or function that takes them, or remove them."
        )
    missing = [method for method in ("problems", "prompt", "score") if not callable(getattr(inner, method, None))]
    if missing:
        raise TaskError(
            f"{path}: {attribute} has no method {missing[0]}. A task needs problems(split), prompt(problem), "
            f"score(completion, problem)."
        )
    stop = getattr(inner, "stop", ())
    parameters = inspect.signature(inner.score).parameters
    return UserTask(
        inner=inner,
        train=_rows(inner, "train", path),
        test=_rows(inner, "test", path),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        notes=tuple(getattr(inner, "notes", ())),
        takes_truncated="truncated" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values()),
    )


def _import(path: Path) -> Any:
    if not path.is_file():
        raise TaskError(f"{path}: there is no such file. Give task as file.py:NAME, relative to the recipe's folder.")
    name = f"eggroll_llm_user_task_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise TaskError(f"{path}: this is not a Python file. Its name must end with .py.")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickle look their module up by name.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise TaskError(f"{path}: importing it failed: {type(error).__name__}: {error}.") from error
    return module


def _attribute(module: Any, name: str, path: Path) -> Any:
    if hasattr(module, name):
        return getattr(module, name)
    names = [other for other in vars(module) if not other.startswith("_")]
    nearest = difflib.get_close_matches(name, names, n=1)
    raise TaskError(
        f"{path}: there is no {name} in it."
        + (f" Did you mean {nearest[0]}?" if nearest else f" It has: {', '.join(names)}.")
    )


def _rows(inner: Any, split: str, path: Path) -> list[Problem]:
    rows = list(inner.problems(split))
    if not rows:
        raise TaskError(f'{path}: problems("{split}") is empty. Training needs "train", evaluation "test".')
    wrong = next((row for row in rows if not isinstance(row, Mapping)), None)
    if wrong is not None:
        raise TaskError(f'{path}: problems("{split}") holds {wrong!r:.80}, which is not a dict.')
    return [row if "id" in row else {"id": f"{split}-{number}", **row} for number, row in enumerate(rows, start=1)]
