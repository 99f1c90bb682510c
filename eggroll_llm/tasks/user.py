"""A task from a user's own Python file: `task = "my_task.py:TASK"`.

    class Reverse:
        def problems(self, split): return [{"word": "drawer"}, ...]
        def prompt(self, problem): return f"Reverse {problem['word']}:"
        def score(self, completion, problem): return float(completion.strip() == problem["word"][::-1])

    TASK = Reverse()

The file is imported, so it can do anything; name only files that you trust. `TASK` may also be a class or
function that takes the task options and returns such an object. `stop`, `notes`, `gold` and `answer(completion)`
(what majority votes count) are optional, and so are `truncated` (the length limit cut the completion off) and
`thought_open` (the prompt ended in a thought) in `score`, which may return a number (correct from 1 on) or a
`rewards.Score`; anything else is a failure, like an exception. In a run, `score` and `answer` are
called in a process of their own (`process`), which imports once more what was read from the file here.
"""

import contextlib
import difflib
import hashlib
import importlib.machinery
import importlib.util
import inspect
import linecache
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

from eggroll_llm.errors import TaskError
from eggroll_llm.tasks.base import Message, Place, Problem, Split, no_place, problem_text, short_traceback
from rewards import Score


@dataclass(frozen=True, kw_only=True, slots=True)
class UserTask:
    """The user's object, completed to a `Task`."""

    path: Path
    """The user's file."""
    name: str
    """What it is called there."""
    options: Mapping[str, Any]
    """What it was made with."""
    source: bytes
    """What the file held when it was read; it may be edited during a run."""
    hashes: Mapping[str, str]
    """SHA-256 of the problems of each split, as loaded."""
    inner: Any
    train: Sequence[Problem]
    test: Sequence[Problem]
    stop: tuple[str, ...]
    notes: tuple[str, ...]
    takes: frozenset[str]
    """Which of the optional arguments, `truncated` and `thought_open`, the user's score has."""

    def problems(self, split: Split) -> Sequence[Problem]:
        """All problems of the split."""
        return self.train if split == "train" else self.test

    def prompt(self, problem: Problem) -> str | list[Message]:
        """The user's prompt. Raises TaskError when there is none."""
        what = f"prompt() of problem {problem.get('id')!r:.60}"
        with _calling(self.path, what):
            prompt: Any = self.inner.prompt(problem)
            if isinstance(prompt, str):
                return prompt
            if isinstance(prompt, Sequence) and prompt and all(map(_is_message, prompt)):
                return list(prompt)
        raise TaskError(
            f"{self.path}: {what} is {prompt!r:.80}. Return a text to complete, or a list of chat messages, each a "
            "dict with a role and a content."
        )

    def score(self, completion: str, problem: Problem, *, truncated: bool = False, thought_open: bool = False) -> Score:
        """The user's score; what it raises is not caught. Raises TypeError when it is none."""
        given = {"truncated": truncated, "thought_open": thought_open}
        options = {name: value for name, value in given.items() if name in self.takes}
        return as_score(self.inner.score(completion, problem, **options))

    def answer(self, completion: str, *, truncated: bool = False, thought_open: bool = False) -> str | None:
        """The user's answer, if there is such a method."""
        if not hasattr(self.inner, "answer"):
            return None
        answer = self.inner.answer(completion)
        return None if answer is None else str(answer)

    def gold(self, problem: Problem) -> str | None:
        """The user's gold answer, if there is such a method. Raises TaskError when it is no text."""
        if not hasattr(self.inner, "gold"):
            return None
        what = f"gold() of problem {problem.get('id')!r:.60}"
        with _calling(self.path, what):
            gold: Any = self.inner.gold(problem)
        if gold is None or isinstance(gold, str):
            return gold
        raise TaskError(f"{self.path}: {what} is {gold!r:.80}. Return the text of an answer, or None.")


def as_score(value: object) -> Score:
    """A Score from what a user's score returned: a Score, a number, or a tensor or array with one number.

    Raises TypeError, saying what it was, for anything else.
    """
    if isinstance(value, Score):
        return value
    number = value
    if callable(item := getattr(value, "item", None)) and getattr(value, "size", None) is not None:
        with contextlib.suppress(TypeError, ValueError, RuntimeError):  # several numbers, or none
            number = item()
    if not isinstance(number, bool | int | float):
        raise TypeError(f"score() returned {value!r:.80}; return a number or a rewards.Score")
    return Score(float(number), number >= 1, "reward")


def load_user_task(
    name: str, options: Mapping[str, Any], base_dir: Path, place: Place = no_place, source: bytes | None = None
) -> UserTask:
    """The object that `name`, "file.py:NAME", points to; with `source`, the file is not read, but has held that.

    Raises:
        TaskError: no such file or name, the file fails, or the object is not a task.
    """
    file, _, attribute = name.rpartition(":")
    path = base_dir / file
    source = _read(path) if source is None else source
    module = _import(path, source)
    inner = _attribute(module, attribute, path)
    if isinstance(inner, type) or (callable(inner) and not hasattr(inner, "problems")):
        _check_options(inner, options, f"{path}: {attribute}", place)
        with _calling(path, f"{attribute}({', '.join(options)})"):
            inner = inner(**options)
    elif options:
        raise TaskError(
            f"{place(next(iter(options)))}: {path}: {attribute} is an object, so it takes no task_options, but "
            f"{', '.join(options)} is set. Make {attribute} a class or function that takes them, or remove them."
        )
    missing = [method for method in ("problems", "prompt", "score") if not callable(getattr(inner, method, None))]
    if missing:
        raise TaskError(
            f"{path}: {attribute} has no method {missing[0]}. A task needs problems(split), prompt(problem), "
            f"score(completion, problem)."
        )
    train, test = _rows(inner, "train", path), _rows(inner, "test", path)
    return UserTask(
        path=path,
        name=attribute,
        options=options,
        source=source,
        hashes={"train": _hash(train), "test": _hash(test)},
        inner=inner,
        train=train,
        test=test,
        stop=_texts(inner, "stop", path),
        notes=_texts(inner, "notes", path),
        takes=_taken(inner.score),
    )


@contextlib.contextmanager
def _calling(path: Path, what: str) -> Iterator[None]:
    """Make what the user's code raises a TaskError with the end of its traceback."""
    try:
        yield
    except (Exception, SystemExit) as error:
        raise TaskError(f"{path}: {what} failed:\n{short_traceback(error)}") from error


class _Loader(importlib.machinery.SourceFileLoader):
    """Loads a file as it was when it was read, whatever is in it, and in Python's cache of it, by now."""

    def __init__(self, name: str, path: str, source: bytes) -> None:
        super().__init__(name, path)
        self._source = source

    def get_code(self, fullname: str) -> CodeType:
        # Tracebacks show these lines; an entry without a time is not compared with the file.
        text = importlib.util.decode_source(self._source)
        linecache.cache[self.path] = len(text), None, [f"{line}\n" for line in text.split("\n")], self.path
        return self.source_to_code(self._source, self.path)

    def get_data(self, path: str) -> bytes:
        return self._source if path == self.path else super().get_data(path)


def _import(path: Path, source: bytes) -> Any:
    """The module of a file that held `source`."""
    name = f"eggroll_llm_user_task_{path.stem}"
    loader = _Loader(name, str(path.absolute()), source)
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickle look their module up by name.
    sys.modules[name] = module
    try:
        with _calling(path, "importing it"):
            loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise TaskError(f"{path}: there is no such file. Give task as file.py:NAME, relative to the recipe's folder.")
    if path.suffix != ".py":
        raise TaskError(f"{path}: this is not a Python file. Its name must end with .py.")
    with _calling(path, "reading it"):
        return path.read_bytes()


def _attribute(module: Any, name: str, path: Path) -> Any:
    if hasattr(module, name):
        return getattr(module, name)
    names = [other for other in vars(module) if not other.startswith("_")]
    nearest = difflib.get_close_matches(name, names, n=1)
    raise TaskError(
        f"{path}: there is no {name} in it."
        + (f" Did you mean {nearest[0]}?" if nearest else f" It has: {', '.join(names)}.")
    )


def _check_options(factory: Any, options: Mapping[str, Any], name: str, place: Place) -> None:
    """Raise TaskError when the user's class or function does not take the options."""
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # some classes in C have none: the call itself decides
        return
    try:
        signature.bind(**options)
    except TypeError as error:
        unknown = [key for key in options if key not in signature.parameters]
        key = [*unknown, *options, ""][0]
        raise TaskError(f"{place(key)}: {name} does not accept task_options {dict(options)}: {error}.") from error


def _rows(inner: Any, split: str, path: Path) -> list[Problem]:
    with _calling(path, f'problems("{split}")'):
        rows = list(inner.problems(split))
    if not rows:
        raise TaskError(f'{path}: problems("{split}") is empty. Training needs "train", evaluation "test".')
    wrong = next((row for row in rows if not isinstance(row, Mapping)), None)
    if wrong is not None:
        raise TaskError(f'{path}: problems("{split}") holds {wrong!r:.80}, which is not a dict.')
    return [row if "id" in row else {"id": f"{split}-{number}", **row} for number, row in enumerate(rows, start=1)]


def _hash(problems: Sequence[Problem]) -> str:
    return hashlib.sha256("\n".join(map(problem_text, problems)).encode()).hexdigest()


def _texts(inner: Any, name: str, path: Path) -> tuple[str, ...]:
    """One text or several, where the object has such an attribute."""
    with _calling(path, name):
        given = getattr(inner, name, ())
        texts = [given] if isinstance(given, str) or not isinstance(given, Iterable) else list(given)
    if not all(isinstance(text, str) for text in texts):
        raise TaskError(f"{path}: {name} = {given!r:.80} is not text. Write a text, or a tuple of texts.")
    return tuple(texts)


def _taken(score: Any) -> frozenset[str]:
    """The optional arguments of a user's score; one that takes any gets `truncated`, as it always did."""
    try:
        parameters = inspect.signature(score).parameters
    except (TypeError, ValueError):
        return frozenset()
    anything = {"truncated"} if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) else set()
    return frozenset(({"truncated", "thought_open"} & parameters.keys()) | anything)


def _is_message(message: object) -> bool:
    return isinstance(message, Mapping) and all(isinstance(message.get(key), str) for key in ("role", "content"))
