"""A task from a user's own Python file: `task = "my_task.py:TASK"`.

    class Reverse:
        def problems(self, split): return [{"word": "drawer"}, ...]
        def prompt(self, problem): return f"Reverse {problem['word']}:"
        def score(self, completion, problem): return float(completion.strip() == problem["word"][::-1])

    TASK = Reverse()

The file is imported, so it can do anything; name only files that you trust. `TASK` may also be a class or
function that takes the task options and returns such an object. `stop`, `notes`, `gold`, `kind(problem)` and
`answer(completion)` (what majority votes count) are optional, and so are `truncated` (the length limit cut the
completion off) and `thought_open` (the prompt ended in a thought) in `score`, which may return a number (correct from 1
on) or a `rewards.Score`; anything else is a failure, like an exception. `score_batch(completions, problems)`, instead
of `score` or beside it, returns a list of those; its `truncated` and `thought_open` are lists, too. In a run, `score`
is called in processes of its own (`sandbox.pool`), and so is `answer` on what the model wrote. They import again what
was read here, from the file and the modules next to it (`modules`).
"""

import contextlib
import difflib
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from eggroll_llm.config.toml import is_unicode, write_toml
from eggroll_llm.errors import TaskError
from eggroll_llm.tasks.modules import Modules, find_modules, is_hidden, load_module, packed, source_hash
from eggroll_llm.tasks.signatures import check_calls, check_factory, optional_arguments
from eggroll_llm.tasks.task import Answer, Message, Place, Problem, Split, no_place, problem_text, short_traceback
from rewards import Score


@dataclass(frozen=True, kw_only=True, slots=True)
class UserTask:
    """The user's object, as a complete `Task`."""

    path: Path
    """The user's file."""
    name: str
    """What it is called there."""
    options: Mapping[str, Any]
    """What it was made with."""
    source: bytes
    """What the file held when it was read; it may be edited during a run."""
    modules: Modules
    """The modules beside the file that it imports, as they were then."""
    hashes: Mapping[str, str]
    """SHA-256 of the problems of each split, as loaded."""
    inner: Any
    train: Sequence[Problem]
    test: Sequence[Problem]
    stop: tuple[str, ...]
    notes: tuple[str, ...]
    takes: frozenset[str]
    """Which of the optional arguments, `truncated` and `thought_open`, the user's score has."""
    batch_takes: frozenset[str] | None
    """Which of them the user's score_batch has; None when there is no such method."""

    needs_process: ClassVar[bool] = True
    """The user's code may hang, exit or take all memory."""
    reloads: ClassVar[bool] = True
    """A process that scores loads the problems itself: they may hold what JSON cannot."""
    takes_ids: ClassVar[bool] = False
    """No score gets the tokens of completions."""

    @property
    def label(self) -> str:
        """Return what messages call it."""
        return str(self.path)

    @property
    def batched(self) -> bool:
        """Return whether there is a score_batch."""
        return self.batch_takes is not None

    def hello(self) -> dict[str, Any]:
        """Return what a process that scores loads."""
        name, options = f"{self.path.absolute()}:{self.name}", write_toml(dict(self.options))
        return {"name": name, "options": options, **packed(self.source, self.modules)}

    @property
    def file_hash(self) -> str:
        """Return the SHA-256 of the file and of what it imports from beside it."""
        return source_hash(self.source, self.modules)

    def problems(self, split: Split) -> Sequence[Problem]:
        """Return all problems of the split."""
        return self.train if split == "train" else self.test

    def prompt(self, problem: Problem) -> str | list[Message]:
        """Return the user's prompt. Raises TaskError when prompt() fails or returns something else."""
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

    def score(self, answer: Answer) -> Score:
        """Return the user's score; its exceptions propagate. Raises TypeError when it is not a score."""
        if not hasattr(self.inner, "score"):
            return as_score(self.score_batch([answer])[0])
        options = {name: getattr(answer, name) for name in self.takes}
        return as_score(self.inner.score(answer.text, answer.problem, **options))

    def score_batch(self, answers: Sequence[Answer]) -> list[object]:
        """Return what the user's score_batch returns; its exceptions propagate.

        Raises WrongCountError when that is not a sequence of as many values.
        """
        options = {name: [getattr(answer, name) for answer in answers] for name in self.batch_takes or ()}
        texts, problems = [answer.text for answer in answers], [answer.problem for answer in answers]
        given: Any = self.inner.score_batch(texts, problems, **options)
        try:
            values = list(given)
        except TypeError:
            raise WrongCountError(f"score_batch() returned {given!r:.80}; return a list of scores") from None
        if len(values) != len(answers):
            raise WrongCountError(
                f"score_batch() returned {len(values)} scores for {len(answers)} completions; return one for each"
            )
        return values

    def answer(self, answer: Answer) -> str | None:
        """Return the user's answer, if there is such a method."""
        if not hasattr(self.inner, "answer"):
            return None
        given = self.inner.answer(answer.text)
        return None if given is None else str(given)

    def gold(self, problem: Problem) -> str | None:
        """Return the user's gold answer, if there is such a method. Raises TaskError when it is not text."""
        return self._text_of("gold", problem, "the text of an answer")

    def kind(self, problem: Problem) -> str:
        """Return the user's kind, if there is such a method. Raises TaskError when it is not text."""
        return self._text_of("kind", problem, "a few words") or ""

    def _text_of(self, method: str, problem: Problem, wanted: str) -> str | None:
        if not hasattr(self.inner, method):
            return None
        what = f"{method}() of problem {problem.get('id')!r:.60}"
        with _calling(self.path, what):
            found: Any = getattr(self.inner, method)(problem)
        if found is None or isinstance(found, str):
            return found
        raise TaskError(f"{self.path}: {what} is {found!r:.80}. Return {wanted}, or None.")


class WrongCountError(Exception):
    """A batch has another number of scores than of completions."""


def as_score(value: object, what: str = "score()") -> Score:
    """Return a Score from what a user's function returned: a Score, a number, or a tensor or array with one number.

    Raises TypeError, saying what it was, for anything else.
    """
    if isinstance(value, Score):
        return value
    number = value
    if callable(item := getattr(value, "item", None)) and getattr(value, "size", None) is not None:
        with contextlib.suppress(TypeError, ValueError, RuntimeError):  # several numbers, or none
            number = item()
    if not isinstance(number, bool | int | float):
        raise TypeError(f"{what} returned {value!r:.80}; return a number or a rewards.Score")
    return Score(float(number), number >= 1, "reward")


def load_user_task(
    name: str,
    options: Mapping[str, Any],
    base_dir: Path,
    place: Place = no_place,
    read: tuple[bytes, Modules] | None = None,
) -> UserTask:
    """Return the object that `name`, "file.py:NAME", points to; `read` is what its files held, so none is read.

    Raises:
        TaskError: no such file or name, the file fails, or the object is not a task.
    """
    file, _, attribute = name.rpartition(":")
    path = base_dir / file
    source, modules = read or read_file(path)
    inner, where = named(import_file(path, source, modules), attribute, path), f"{path}: {attribute}"
    if isinstance(inner, type) or (callable(inner) and not hasattr(inner, "problems")):
        check_factory(inner, options, where, place)
        with _calling(path, f"{attribute}({', '.join(options)})"):
            inner = inner(**options)
    elif options:
        raise TaskError(
            f"{place(next(iter(options)))}: {where} is an object, so it takes no task_options, but "
            f"{', '.join(options)} is set. Make {attribute} a class or function that takes them, or remove them."
        )
    check_calls(inner, where)
    train, test = _rows(inner, "train", path), _rows(inner, "test", path)
    return UserTask(
        path=path,
        name=attribute,
        options=options,
        source=source,
        modules=modules,
        hashes={"train": _hash(train), "test": _hash(test)},
        inner=inner,
        train=train,
        test=test,
        stop=_texts(inner, "stop", path),
        notes=_texts(inner, "notes", path),
        takes=optional_arguments(inner.score) if hasattr(inner, "score") else frozenset(),
        batch_takes=optional_arguments(inner.score_batch) if hasattr(inner, "score_batch") else None,
    )


@contextlib.contextmanager
def _calling(path: Path, what: str) -> Iterator[None]:
    """Turn exceptions of the user's code into a TaskError with the end of the traceback."""
    try:
        yield
    except (Exception, SystemExit) as error:
        raise TaskError(f"{path}: {what} failed:\n{short_traceback(error)}") from error


def import_file(path: Path, source: bytes, modules: Modules) -> Any:
    """Import the file's `source` and return the module."""
    try:
        with _calling(path, "importing it"):
            return load_module(path, source, modules)
    except TaskError as error:
        name = str(getattr(error.__cause__, "name", None)).partition(".")[0]
        if isinstance(error.__cause__, ImportError) and is_hidden(path, name):
            raise TaskError(
                f"{error}\nThe {name} next to {path.name} cannot be imported, because an installed or loaded module "
                "has that name. Rename yours."
            ) from error
        raise


def read_file(path: Path) -> tuple[bytes, Modules]:
    """Return what a user's file and the modules beside it hold. Raises TaskError."""
    if not path.is_file():
        raise TaskError(f"{path}: there is no such file. Name it as file.py:NAME, relative to the recipe's folder.")
    if path.suffix != ".py":
        raise TaskError(f"{path}: this is not a Python file. Its name must end with .py.")
    with _calling(path, "reading it"):
        source = path.read_bytes()
        return source, find_modules(path, source)


def named(module: Any, name: str, path: Path) -> Any:
    """Return what a user's module calls `name`. Raises TaskError."""
    if hasattr(module, name):
        return getattr(module, name)
    names = [other for other in vars(module) if not other.startswith("_")]
    nearest = difflib.get_close_matches(name, names, n=1)
    raise TaskError(
        f"{path}: does not define {name}."
        + (f" Did you mean {nearest[0]}?" if nearest else f" It defines: {', '.join(names)}.")
    )


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
    """Return one text or several, where the object has such an attribute."""
    with _calling(path, name):
        given = getattr(inner, name, ())
        texts = [given] if isinstance(given, str) or not isinstance(given, Iterable) else list(given)
    if not all(isinstance(text, str) for text in texts):
        raise TaskError(f"{path}: {name} = {given!r:.80} is not text. Write a text, or a tuple of texts.")
    if name == "stop" and not all(texts):
        raise TaskError(f"{path}: stop = {given!r:.80} has an empty text, at which every answer would end. Remove it.")
    if not is_unicode("".join(texts)):
        raise TaskError(f"{path}: {name} = {given!a:.80} is not valid Unicode text: it holds half of a surrogate pair.")
    return tuple(texts)


def _is_message(message: object) -> bool:
    return isinstance(message, Mapping) and all(isinstance(message.get(key), str) for key in ("role", "content"))
