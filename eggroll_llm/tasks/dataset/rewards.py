"""What an answer earns: the weighted sum of graders by name and of the user's functions, called as TRL calls them.

    reward(prompts=[...], completions=[...], completion_ids=[[...]], **columns) -> [1.0, None, ...]

A function gets one value per completion, and those of the arguments that it has; all, where it has **kwargs. None (or
NaN) says that it does not apply, and adds nothing. Functions may be `async`: those of a batch then run side by side, on
an event loop that lives as long as the process.
"""

import asyncio
import difflib
import inspect
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eggroll_llm.errors import TaskError
from eggroll_llm.tasks.dataset.columns import Columns
from eggroll_llm.tasks.dataset.graders import GRADERS, Grader
from eggroll_llm.tasks.modules import Modules, packed, unpacked
from eggroll_llm.tasks.task import Answer
from eggroll_llm.tasks.user import WrongCountError, as_score, import_file, named, read_file
from rewards import Score

NONE_APPLIES = "every reward returned None: none applies to this completion"
_OWN = ("prompts", "completions", "completion_ids")
_NOT_COLUMNS = ("prompt", "completion", *_OWN)
_TRL_ONLY = ("trainer_state", "log_extra", "log_metric", "environments")


class NoneAppliesError(Exception):
    """No reward applies to a completion, so nothing is known of it."""


class Rewards:
    """The rewards of a data set, loaded; also in the process that scores."""

    hashes: Mapping[str, str] = {}
    """Of problems that this loads itself: none."""

    def __init__(self, spec: Mapping[str, Any]) -> None:
        """Load what `describe` has described. Raises TaskError when a function cannot be loaded."""
        self.weights: list[float] = spec["weights"]
        self.columns = Columns(**{**spec["columns"], "names": tuple(spec["columns"]["names"])})
        self.messages: bool = spec["messages"]
        read = {path: unpacked(sent) for path, sent in spec["files"].items()}
        # Each load forgets the modules of the one before: all know all.
        modules = {name: module for _, own in read.values() for name, module in own.items()}
        loaded = {path: import_file(Path(path), source, modules) for path, (source, _) in read.items()}
        self.terms: dict[str, Grader | Any] = {}
        for name in spec["names"]:
            if name in GRADERS:
                self.terms[name] = GRADERS[name]
                continue
            path, _, attribute = name.rpartition(":")
            self.terms[attribute] = named(loaded[path], attribute, Path(path))
        self._runner: asyncio.Runner | None = None

    @property
    def functions(self) -> dict[str, Any]:
        """Return the user's functions by name."""
        return {name: term for name, term in self.terms.items() if not isinstance(term, Grader)}

    @property
    def takes_ids(self) -> bool:
        """Return whether a function gets the tokens of completions."""
        return any("completion_ids" in self._arguments(function) for function in self.functions.values())

    def score_batch(self, answers: Sequence[Answer]) -> list[Score]:
        """Return the score of each answer. What functions raise is not caught.

        Raises WrongCountError when a function returns another number of values, and NoneAppliesError.
        """
        scores = {
            name: [term.score(answer, self._gold(answer, term)) for answer in answers]
            for name, term in self.terms.items()
            if isinstance(term, Grader)
        }
        given = self._call(answers)
        values = {
            name: [score.reward for score in scores[name]] if name in scores else given[name] for name in self.terms
        }
        return [
            self._sum({name: column[i] for name, column in values.items()}, {n: s[i] for n, s in scores.items()})
            for i in range(len(answers))
        ]

    def score(self, answer: Answer) -> Score:
        """Return the score of one answer."""
        return self.score_batch([answer])[0]

    def answer(self, answer: Answer) -> str | None:
        """Return the answer that the first grader reads; None where all are functions."""
        grader = next((term for term in self.terms.values() if isinstance(term, Grader)), None)
        return grader.read(answer.text, **answer.options) if grader else None

    def check(self) -> None:
        """Raise TaskError when a function needs an argument that it will not get."""
        columns = [name for name in self.columns.names if name not in _NOT_COLUMNS]
        for name, function in self.functions.items():
            if not callable(function):
                raise TaskError(f"{name} = {function!a:.60} is not a function. Name one as file.py:NAME in rewards.")
            for parameter in _parameters(function):
                missing = parameter.default is parameter.empty and parameter.kind in _NAMED
                if not missing or parameter.name in (*_OWN, *columns):
                    continue
                if parameter.name in _TRL_ONLY:
                    raise TaskError(
                        f"{name}() needs {parameter.name}, which only TRL's trainer has. Give it a default."
                    )
                nearest = difflib.get_close_matches(parameter.name, columns, n=1)
                hint = f" Did you mean {nearest[0]}?" if nearest else ""
                raise TaskError(
                    f"{name}() needs {parameter.name}, but the columns are {', '.join(columns)}.{hint} A reward takes "
                    "prompts, completions, completion_ids and columns, by these names."
                )

    def _gold(self, answer: Answer, grader: Grader) -> str:
        return self.columns.gold(answer.problem) if grader.gold else ""

    def _call(self, answers: Sequence[Answer]) -> dict[str, list[float | None]]:
        if not (functions := self.functions):
            return {}
        asked = [self.columns.sent(a.problem) if self.messages else self.columns.asked(a.problem) for a in answers]
        texts = [answer.text for answer in answers]
        given: dict[str, list[Any]] = {
            "prompts": asked,
            "completions": [[{"role": "assistant", "content": text}] for text in texts] if self.messages else texts,
            "completion_ids": [list(answer.token_ids) for answer in answers],
        }
        for name in self.columns.names:
            if name not in _NOT_COLUMNS:
                given[name] = [answer.problem.get(name) for answer in answers]
        returned: dict[str, Any] = {}
        waiting: dict[str, Any] = {}
        for name, function in functions.items():
            result = function(**{key: given[key] for key in self._arguments(function)})
            (waiting if inspect.isawaitable(result) else returned)[name] = result
        if waiting:
            self._runner = self._runner or asyncio.Runner()
            returned |= dict(zip(waiting, self._runner.run(_together(list(waiting.values()))), strict=True))
        return {name: _values(name, returned[name], len(answers)) for name in functions}

    def _arguments(self, function: Any) -> list[str]:
        """Return which arguments a function gets."""
        own = [*_OWN, *(name for name in self.columns.names if name not in _NOT_COLUMNS)]
        parameters = _parameters(function)
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return own
        names = {parameter.name for parameter in parameters}
        return [name for name in own if name in names]

    def _sum(self, values: Mapping[str, float | None], scores: Mapping[str, Score]) -> Score:
        weighted = zip(self.weights, values.values(), strict=True)
        parts = [weight * value for weight, value in weighted if value is not None]
        if not parts:
            raise NoneAppliesError(NONE_APPLIES)
        first, value = next(iter(values.items()))
        correct = scores[first].correct if first in scores else value is not None and value >= 1
        detail = scores[first].detail if first in scores else "reward"
        return Score(sum(parts), correct, detail, values if len(values) > 1 else {})


_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_ONLY)


def describe(
    names: Sequence[str], weights: Sequence[float], columns: Columns, base_dir: Path, *, messages: bool
) -> dict[str, Any]:
    """Return, as JSON, what `Rewards` loads; functions as their files are now. Raises TaskError."""
    full, files = [], {}
    modules: dict[str, str] = {}
    for name in names:
        if name in GRADERS:
            full.append(name)
            continue
        file, _, attribute = name.rpartition(":")
        path = str((base_dir / file).absolute())
        full.append(f"{path}:{attribute}")
        if path in files:
            continue
        source, own = read_file(Path(path))
        _check_modules(own, modules)
        files[path] = packed(source, own)
    described = {name: getattr(columns, name) for name in Columns.__dataclass_fields__}
    return {"names": full, "weights": list(weights), "files": files, "columns": described, "messages": messages}


def _check_modules(own: Modules, known: dict[str, str]) -> None:
    for name, module in own.items():
        if known.setdefault(name, module.path) != module.path:
            raise TaskError(f"{module.path} and {known[name]} are both imported as {name} by rewards. Rename one.")


def _parameters(function: Any) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some callables in C have none
        return []


async def _together(waiting: Sequence[Any]) -> list[Any]:
    return list(await asyncio.gather(*waiting))


def _values(name: str, returned: Any, count: int) -> list[float | None]:
    try:
        values = list(returned)
    except TypeError:
        raise WrongCountError(
            f"{name}() returned {returned!r:.80}; return a list with one reward per completion"
        ) from None
    if len(values) != count:
        raise WrongCountError(f"{name}() returned {len(values)} rewards for {count} completions; return one for each")
    numbers = [None if value is None else as_score(value, f"{name}()").reward for value in values]
    return [None if number is not None and math.isnan(number) else number for number in numbers]
