"""Graded completions on disk: one JSON object a line, from which an interrupted evaluation continues.

    {"format": 1, "settings": {"task": "gsm8k", "prompts": "sha256...", "max_tokens": 256, ...}}
    {"problem": 0, "sample": 0, "id": "test-1", "doc": {...}, "prompt_hash": "...", "completion": " 16 - 3 ...",
     "tokens": 81, "truncated": false, "scores": {"strict-match": {"correct": true, "answer": "18", ...}}}

The first line holds every setting that the completions depend on. A completion is identified by (problem, sample):
one that is there twice is an error, one that was cut short by a kill is dropped and done again.
"""

import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eggroll_llm.errors import SamplesError
from eggroll_llm.system.files import append, describe_failure, try_lock, unlock, write_text
from eggroll_llm.system.jsonl import parse_json, to_json

FORMAT = 1
_START = b'{"format": '
TASK = "task"
"""Name of the score that the task's own grader gives: what training calls correct."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Graded:
    """What one grader says of one completion."""

    correct: bool
    """What accuracy counts."""
    reward: float
    """What training maximises; 1 or 0 where there is no shaping. NaN where the grader gave no finite number."""
    detail: str
    """Why, in a word of the grader."""
    answer: str | None = None
    """Answer read from the completion, for majority votes; None without one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One completion with its grades."""

    problem: int
    """Index of the problem in its set, from 0."""
    sample: int
    """Which of the completions of that problem, from 0."""
    id: str | int
    """The problem's own name, the same in every run."""
    doc: Mapping[str, Any]
    """The problem."""
    prompt_hash: str
    """SHA-256 of the prompt's text, chat template applied."""
    completion: str
    """Generated text up to a stop string."""
    tokens: int
    """Number of generated tokens."""
    truncated: bool
    """Whether the length limit ended it."""
    scores: Mapping[str, Graded]
    """Grade by the name of its grader."""
    kind: str = ""
    """What kind of problem it is, as its task tells them apart; empty, and not in the file, without kinds."""


class SampleFile(AbstractContextManager["SampleFile"]):
    """An open file of graded completions that grows by one line at a time. Use as a context manager."""

    def __init__(self, path: Path, settings: Mapping[str, Any], *, overwrite: bool = False) -> None:
        """Open or create the file, taking over what an earlier evaluation with the same settings left in it.

        Raises SamplesError when the file is of an evaluation with other settings, is damaged, is in use by another
        process, or cannot be written.
        """
        self.path = path
        self.settings: dict[str, Any] = json.loads(to_json(settings))
        self.samples: dict[tuple[int, int], Sample] = {}
        """Completions by (problem, sample)."""
        try:
            self._file = path.open("a+b", buffering=0)
        except OSError as error:
            raise SamplesError(describe_failure(path, error, "completions")) from error
        try:
            self._lock()
            self._take_over(overwrite)
        except BaseException:
            self._file.close()
            raise

    def append(self, sample: Sample) -> None:
        """Add a completion. Raises SamplesError when the file has it already or cannot be written."""
        key = (sample.problem, sample.sample)
        if key in self.samples:
            raise SamplesError(f"{self.path}: problem {key[0]}, sample {key[1]} is already in the file")
        self._write(sample_line(sample))
        self.samples[key] = sample

    def replace(self, samples: Iterable[Sample]) -> None:
        """Replace all completions, or their grades; after a kill either the old or the new ones are there."""
        samples = list(samples)
        try:
            write_samples(self.path, self.settings, samples)
            self._file.close()
            self._file = self.path.open("a+b", buffering=0)
        except OSError as error:
            raise SamplesError(describe_failure(self.path, error, "completions")) from error
        self._lock()
        self.samples = {(sample.problem, sample.sample): sample for sample in samples}

    def _lock(self) -> None:
        with contextlib.suppress(OSError):  # a file system without locks
            if not try_lock(self._file.fileno()):
                raise SamplesError(
                    f"{self.path}: another evaluation is writing this file: wait for it, or name another file"
                )

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Flush to disk and release the file. Raises SamplesError when the disk does not take it."""
        if self._file.closed:
            return
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise SamplesError(describe_failure(self.path, error, "completions")) from error
        finally:
            unlock(self._file.fileno())
            self._file.close()

    def _take_over(self, overwrite: bool) -> None:
        settings = self.settings
        data = b"" if overwrite else self.path.read_bytes()
        complete = data[: data.rfind(b"\n") + 1]
        if not complete and data[: len(_START)] == _START[: len(data)]:
            self._file.truncate(0)
            self._write(to_json({"format": FORMAT, "settings": settings}))
            return
        saved, samples = _parse(self.path, complete)
        if changed := [key for key in {**saved, **settings} if saved.get(key) != settings.get(key)]:
            shown = "; ".join(
                f"{key} was {saved.get(key)!r:.80} and is now {settings.get(key)!r:.80}" for key in changed
            )
            raise SamplesError(
                f"{self.path}: belongs to another evaluation: {shown}. Name another --out, or delete it with "
                "--on-existing overwrite"
            )
        self._file.truncate(len(complete))
        self.samples = {(sample.problem, sample.sample): sample for sample in samples}

    def _write(self, line: str) -> None:
        data = line.encode() + b"\n"
        try:
            append(self._file, data)
        except OSError as error:
            raise SamplesError(describe_failure(self.path, error, f"{len(data)} bytes")) from error


def read_samples(path: Path) -> tuple[dict[str, Any], list[Sample]]:
    """Return settings and completions, in the order of the file; a last line that was cut short is left out.

    Raises SamplesError, naming file and line, for anything that is not such a file.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SamplesError(f"{path}: cannot be read ({error.strerror}): name a file of graded completions") from error
    return _parse(path, data[: data.rfind(b"\n") + 1])


def write_samples(path: Path, settings: Mapping[str, Any], samples: Iterable[Sample]) -> None:
    """Write a whole file at once, or leave what is there. Raises OSError."""
    write_text(path, samples_text(settings, samples))


def samples_text(settings: Mapping[str, Any], samples: Iterable[Sample]) -> str:
    """Return what a whole file holds."""
    lines = [to_json({"format": FORMAT, "settings": settings}), *map(sample_line, samples)]
    return "\n".join(lines) + "\n"


def sample_line(sample: Sample) -> str:
    """Return the line of a sample in a file, without its end."""
    row = {name: getattr(sample, name) for name in Sample.__dataclass_fields__ if name != "kind" or sample.kind}
    row["scores"] = {name: asdict(graded) for name, graded in sample.scores.items()}
    try:
        return to_json(row)
    except (RecursionError, ValueError):
        return to_json(row | {"doc": held(sample.doc)})


def held(problem: Mapping[str, Any]) -> dict[str, Any]:
    """Return what JSON holds of a problem; a value that is circular, too deep or too large a number is its type."""

    def value_of(value: object) -> Any:
        try:
            return parse_json(to_json(value))
        except (RecursionError, ValueError):
            return type(value).__name__

    return {str(key): value_of(value) for key, value in problem.items()}


def _parse(path: Path, data: bytes) -> tuple[dict[str, Any], list[Sample]]:
    lines = data.split(b"\n")[:-1]
    try:
        header = parse_json(lines[0])
        settings, version = dict(header["settings"]), header["format"]
    except (IndexError, ValueError, KeyError, TypeError) as error:
        raise SamplesError(
            f"{path}:1: is not a file of graded completions: name another, or delete it with --on-existing overwrite"
        ) from error
    if version != FORMAT:
        raise SamplesError(f"{path}:1: has format {version}, but this version reads {FORMAT}: evaluate again")
    samples: dict[tuple[int, int], Sample] = {}
    for number, line in enumerate(lines[1:], start=2):
        try:
            row = parse_json(line)
            scores = {name: _graded(score) for name, score in row.pop("scores").items()}
            sample = Sample(**row, scores=scores)
            if type(sample.problem) is not int or type(sample.sample) is not int:
                raise TypeError("problem and sample are counted")
            if not isinstance(sample.kind, str):
                raise TypeError("a kind is text")
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise SamplesError(f"{path}:{number}: is damaged ({error}): delete the line to repeat it") from error
        if (key := (sample.problem, sample.sample)) in samples:
            raise SamplesError(f"{path}:{number}: problem {key[0]}, sample {key[1]} appears twice: delete the line")
        samples[key] = sample
    return settings, list(samples.values())


def _graded(score: Mapping[str, Any]) -> Graded:
    reward = score["reward"]
    return Graded(**{**score, "reward": float("nan") if reward is None else float(reward)})
