"""Rows of a data set as problems: which columns are prompt and answer, what is said of a row that cannot be used."""

import datetime
import difflib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eggroll_llm.errors import TaskError
from eggroll_llm.tasks.dataset.options import DatasetOptions
from eggroll_llm.tasks.read import Row
from eggroll_llm.tasks.task import Message, Place, Problem

PROMPTS = ("prompt", "question", "problem", "query", "instruction", "input", "messages", "text")
"""Names of columns that hold a prompt, the first that is there."""
ANSWERS = ("answer", "solution", "ground_truth", "reward_model.ground_truth", "gold", "target", "label", "answerKey")
"""Names of columns that hold the right answer, the first that is there; with dots as verl has them."""
CHOICES = ("choices", "options", "endings")
"""Names of columns that hold choices."""
_FIELD = re.compile(r"\{\{|\}\}|\{([^{}\n]*)\}")
_NAME = re.compile(r"[A-Za-z_][\w.]*")
SHOWN = 5
"""Bad rows that are named; the others are counted."""


class BadRowError(Exception):
    """A row cannot be used; the message says why, and begins with the column."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """Which columns are what."""

    names: tuple[str, ...]
    """All that a row has."""
    prompt: str
    """Column with the prompt; empty where the template is all of it."""
    answer: str
    """Column with the right answer; empty where there is none."""
    template: str
    chat: bool
    """Whether text becomes a chat message."""
    kind: str = ""
    """Column with the kind of a problem; empty where there is none."""
    choices: str = ""
    """Column whose list the template shows with letters, of which a right answer may be the position; empty: none."""

    def asked(self, row: Mapping[str, Any]) -> str | list[Message]:
        """Return the prompt as the data set has it: text, or messages. Raises BadRowError."""
        if self.template:
            return fill(self.template, row, self.choices)
        value = lookup(row, self.prompt)
        if isinstance(value, list):
            return _messages(value, self.prompt)
        return _text(value, self.prompt)

    def sent(self, row: Mapping[str, Any]) -> str | list[Message]:
        """Return the prompt as the model gets it. Raises BadRowError."""
        asked = self.asked(row)
        return [{"role": "user", "content": asked}] if self.chat and isinstance(asked, str) else asked

    def gold(self, row: Mapping[str, Any]) -> str:
        """Return the right answer. Raises BadRowError."""
        value = lookup(row, self.answer)
        if isinstance(value, float):
            if not math.isfinite(value):
                raise BadRowError(f"{self.answer} is missing or {value}")
            value = int(value) if value.is_integer() else value  # integers beside a null are floats in many a table
        choices = lookup(row, self.choices) if self.choices else None
        if isinstance(choices, list) and (position := position_of(value, choices)) is not None:
            if position >= len(choices):
                raise BadRowError(f"{self.answer} = {position}, but {self.choices} has {len(choices)}, counted from 0")
            return chr(ord("A") + position)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        return _text(str(value) if isinstance(value, bool) else value, self.answer)


def find_columns(rows: Sequence[Row], options: DatasetOptions, place: Place, *, graded: bool) -> Columns:
    """Return the columns of a data set; `graded` says that an answer is needed. Raises TaskError."""
    at = rows[0][0]
    names = tuple(dict.fromkeys(name for _, row in rows for name in row))
    sample = {name: next((row[name] for _, row in rows if row.get(name) is not None), None) for name in names}
    if options.template and options.prompt_column:
        raise TaskError(f"{place('template')}: template and prompt_column are both a prompt. Remove one.")
    prompt = "" if options.template else _found("prompt_column", options.prompt_column, PROMPTS, sample, place, at)
    answer = ""
    if graded or options.answer_column:
        answer = _found("answer_column", options.answer_column, ANSWERS, sample, place, at)
    if options.template:
        _check_template(options.template, sample, answer, place)
    return Columns(
        names=names,
        prompt=prompt,
        answer=answer,
        template=options.template,
        chat=options.prompt_style == "chat",
        choices=_lettered(options, sample),
        kind=_found("kind_column", options.kind_column, (), sample, place, at) if options.kind_column else "",
    )


def _lettered(options: DatasetOptions, sample: Mapping[str, Any]) -> str:
    """Return the column of choices that the template shows, where a letter is to be the answer."""
    rewards = [options.rewards] if isinstance(options.rewards, str) else options.rewards
    lists = [
        name
        for name in _names_in(options.template)
        if isinstance(lookup(sample, name), list) and not _has_labels(name, sample)
    ]
    lists = [name for name in lists if name in CHOICES] or lists
    return lists[0] if len(lists) == 1 and "choice" in rewards else ""


def _names_in(template: str) -> list[str]:
    return [match[1].strip() for match in _FIELD.finditer(template) if match[1]]


def _has_labels(name: str, sample: Mapping[str, Any]) -> bool:
    """Whether the choices of a column have labels beside them, as ARC's have, of which the answer is one."""
    around = lookup(sample, name.rpartition(".")[0]) if "." in name else None
    return isinstance(around, Mapping) and "label" in around


def position_of(answer: object, choices: Sequence[object]) -> int | None:
    """Return the position that an answer is, from 0, also as text; None where it is none, or one of the choices."""
    if any(type(answer) is type(choice) and answer == choice for choice in choices):
        return None
    if isinstance(answer, str) and re.fullmatch(r"[0-9]{1,2}", answer):
        return int(answer)
    return answer if isinstance(answer, int) and not isinstance(answer, bool) and answer >= 0 else None


def fill(template: str, row: Mapping[str, Any], choices: str = "") -> str:
    """Return the template with the columns of a row in their places; nothing in them is looked at again.

    A list becomes lettered lines (A. ..., B. ...), but one of numbers that is not the column of choices stays in a
    line; choices as ARC has them, with labels and texts, become labelled lines. Raises BadRowError for a column that
    has nothing.
    """

    def put(match: re.Match[str]) -> str:
        if match[0] in ("{{", "}}"):
            return match[0][0]
        name = match[1].strip()
        if name not in row and not _NAME.fullmatch(name):
            return match[0]
        value = lookup(row, name)
        if name != choices and isinstance(value, list) and value and all(isinstance(n, int | float) for n in value):
            return ", ".join(map(str, value))
        return _shown(value, name)

    return _FIELD.sub(put, template)


def lookup(row: Mapping[str, Any], name: str) -> Any:
    """Return the value of a column, or what a dot in its name leads to; None without one."""
    if name in row or "." not in name:
        return row.get(name)
    head, _, rest = name.partition(".")
    inner = row.get(head)
    return lookup(inner, rest) if isinstance(inner, Mapping) else None


def problems_of(
    rows: Sequence[Row], split: str, check: Callable[[Problem], None]
) -> tuple[dict[str, Problem], dict[str, str]]:
    """Return the problems by where their rows stand, and what is wrong with the rows that are none, likewise.

    `check` raises BadRowError.
    """
    problems: dict[str, Problem] = {}
    bad: dict[str, str] = {}
    for number, (at, row) in enumerate(rows, start=1):
        own = row.get("id")
        name = own if isinstance(own, str | int) and not isinstance(own, bool) else f"{split}-{number}"
        problem = {**row, "id": name}
        try:
            check(problem)
        except BadRowError as error:
            bad[at] = str(error)
            continue
        problems[at] = problem
    return problems, bad


def plain(rows: Sequence[Row]) -> tuple[list[Row], list[str]]:
    """Return the rows with values that JSON can hold, and the columns left out because theirs are others.

    A date or time becomes its text.
    """
    left_out: dict[str, None] = {}
    kept = []
    for at, row in rows:
        values = {}
        for name, value in row.items():
            if isinstance(value, datetime.date | datetime.time):
                value = value.isoformat()
            try:
                json.dumps(value)
            except (TypeError, ValueError, RecursionError):
                left_out[name] = None
                continue
            values[name] = value
        kept.append((at, values))
    return [(at, {k: v for k, v in row.items() if k not in left_out}) for at, row in kept], list(left_out)


def listed(bad: Sequence[str]) -> str:
    """Return the first of the bad rows, and how many more there are."""
    more = f" (and {len(bad) - SHOWN} more)" if len(bad) > SHOWN else ""
    return "; ".join(bad[:SHOWN]) + more


def _found(option: str, given: str, usual: Sequence[str], sample: Mapping[str, Any], place: Place, at: str) -> str:
    """Return the column of an option, or the usual one that is there. Raises TaskError."""
    if given:
        if given in sample or lookup(sample, given) is not None:
            return given
        nearest = difflib.get_close_matches(given, sample, n=1)
        hint = f" Did you mean {nearest[0]!a}?" if nearest else ""
        raise TaskError(f"{place(option)}: {option} = {given!a:.80}: no such column; there are {_list(sample)}.{hint}")
    for name in usual:
        if lookup(sample, name) is not None:
            return name
    kind = option.partition("_")[0]
    raise TaskError(f"{at}: which column is the {kind}? There are {_list(sample)}. Set {option} in [task_options].")


def _check_template(template: str, sample: Mapping[str, Any], answer: str, place: Place) -> None:
    names = _names_in(template)
    for name in names:
        if answer and name == answer:
            raise TaskError(
                f"{place('template')}: template shows the answer, as {{{name}}}. Remove it, or write {{{{{name}}}}} "
                "for braces."
            )
        if name not in sample and _NAME.fullmatch(name) and lookup(sample, name) is None:
            nearest = difflib.get_close_matches(name, sample, n=1)
            hint = f" Did you mean {{{nearest[0]}}}?" if nearest else ""
            raise TaskError(
                f"{place('template')}: template has {{{name}}}, but the columns are {_list(sample)}.{hint} Write "
                f"{{{{{name}}}}} for braces."
            )
    if not any(name in sample or lookup(sample, name) is not None for name in names):
        raise TaskError(
            f"{place('template')}: template shows no column, so all prompts would be the same. Name one of "
            f"{_list(sample)} in braces."
        )


def _list(sample: Mapping[str, Any]) -> str:
    return f"{', '.join(map(ascii, sample)):.300}"


def _text(value: object, column: str) -> str:
    if value is None:
        raise BadRowError(f"{column} is missing or null")
    if not isinstance(value, str):
        raise BadRowError(f"{column} = {value!a:.60} is not text")
    if not value.strip():
        raise BadRowError(f"{column} is empty")
    return value


def _shown(value: object, column: str) -> str:
    if isinstance(value, Mapping) and isinstance(texts := value.get("text"), list):
        labels = value.get("label")
        if isinstance(labels, list) and len(labels) == len(texts):
            return "\n".join(f"{label}. {text}" for label, text in zip(labels, texts, strict=True))
    if isinstance(value, list):
        if not value or len(value) > 26 or not all(isinstance(item, str | int | float) for item in value):
            raise BadRowError(f"{column} = {value!a:.60} is not a list of texts")
        return "\n".join(f"{chr(ord('A') + i)}. {item}" for i, item in enumerate(value))
    if isinstance(value, int | float):
        return str(value)
    return _text(value, column)


def _messages(value: list[Any], column: str) -> list[Message]:
    for message in value:
        if not isinstance(message, Mapping) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise BadRowError(
                f"{column} holds {message!a:.60}, not a chat message with a role and a content that is text"
            )
    if not value:
        raise BadRowError(f"{column} has no messages")
    if value[-1]["role"] == "assistant":
        raise BadRowError(f"{column} ends with the assistant's message, which is what the model is to write")
    return [{"role": message["role"], "content": message["content"]} for message in value]
