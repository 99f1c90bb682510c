"""The record from which a run can be rebuilt: one line per update, on disk before the update is applied.

Replay rebuilds the weights from base model, configuration and journal, without sampling. A line holds the
fitness of every member, exactly: float32 values that read back to the same bits (`packed`).
Every line ends in the CRC-32 of the rest of it, and steps are consecutive from 1, so that a lost, repeated or
changed line is noticed. A last line that does not check out is what a crash left of an update that was never applied:
it is dropped and reported. Updates are read when they are looked at, one at a time.

Raises `JournalError`, naming file and line, for a journal that is damaged elsewhere or belongs to another run.
"""

import contextlib
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO, Self, overload

from eggroll_llm.errors import JournalError
from eggroll_llm.records.packed import pack, unpack
from eggroll_llm.system.files import describe_failure, fsync_directory, try_lock, unlock
from eggroll_llm.system.jsonl import parse_json

FORMAT = 2
_READS = (1, 2)  # 1 has no packed fitness
_CRC_LENGTH = len(b',"crc":"00000000"}')


@dataclass(frozen=True, kw_only=True, slots=True)
class JournalHeader:
    """The run that the updates of a journal belong to."""

    frozen_hash: str
    """Hash of the settings that may not change within a run."""
    base_model: str
    """Identity of the base model."""
    train: str = ""
    """Hash of the problems to train on and their prompts; empty in journals that do not say."""
    held_out: str = ""
    """Hash of the problems to evaluate on and their prompts; empty in journals that do not say."""
    task_file: str = ""
    """Hash of the file of a user's task; empty for other tasks, and in journals that do not say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JournalEntry:
    """One update."""

    step: int
    """Number of the update, from 1."""
    noise_step: int
    """Step whose noise was used."""
    fitness: tuple[float, ...]
    """Fitness of every member, each exactly a float32."""
    sigma: float
    """Perturbation size at this step."""
    learning_rate: float
    """Learning rate at this step."""
    dropped: tuple[int, ...] = ()
    """Members left out because a reward was not finite."""
    tied: tuple[int, ...] = ()
    """Problems of the step, by position, that taught nothing; only where that decides which come next."""
    checksum: str = ""
    """Checksum of the weights before this update; empty when none was taken."""


_HEADER_KEYS = JournalHeader.__dataclass_fields__.keys()
_ENTRY_KEYS = JournalEntry.__dataclass_fields__.keys()
_LISTS = ("dropped", "tied")
_TOO_LARGE = 2.0**128  # for float32


class Entries(Sequence[JournalEntry]):
    """Updates of a journal in order, each read from its file when it is looked at.

    All fitness of a run with a large population would not fit into memory. The file must stay as it was read.
    """

    def __init__(self, path: Path, line_ends: Sequence[int], steps: range) -> None:
        """Take the byte position after each line, header included, and which steps these are."""
        self._path, self._line_ends, self._steps = path, line_ends, steps

    def __len__(self) -> int:
        return len(self._steps)

    @overload
    def __getitem__(self, at: int) -> JournalEntry: ...
    @overload
    def __getitem__(self, at: slice) -> "Entries": ...
    def __getitem__(self, at: int | slice) -> "JournalEntry | Entries":
        if isinstance(at, slice):
            return Entries(self._path, self._line_ends, self._steps[at])
        step = self._steps[at]
        start, end = self._line_ends[step - 1 : step + 1]
        with self._path.open("rb") as file:
            file.seek(start)
            fields, problem = _decode(file.read(end - start))
        if problem:
            raise JournalError(f"{self._path}:{step + 1}: {problem}: the file has changed since it was opened")
        return _parse_entry(self._path, step + 1, fields, expected_step=step)


@dataclass(frozen=True, kw_only=True, slots=True)
class JournalContents:
    """A journal as read."""

    header: JournalHeader | None
    """None when a crash came before the header was complete."""
    entries: Entries
    """Updates in order, steps 1, 2, 3..."""
    dropped_tail: str
    """What was wrong with a dropped last line; empty when nothing was dropped."""
    line_ends: tuple[int, ...]
    """Byte position after each valid line, header included."""


def _locked(path: Path) -> FileIO:
    """Open a journal to write. Raises JournalError when another writer has it."""
    file = path.open("r+b", buffering=0)
    with contextlib.suppress(OSError):  # a file system without locks
        if not try_lock(file.fileno()):
            file.close()
            raise JournalError(
                f"{path}: is being written by another process, or another object of this one: close that, or name a "
                "new file"
            )
    return file


class Journal(AbstractContextManager["Journal"]):
    """An open journal, to append to. Use as a context manager or call `close`."""

    def __init__(self, path: Path, contents: JournalContents, file: FileIO) -> None:
        """Append to what was read from `file`, which is locked."""
        self.path = path
        self.header = contents.header
        self.entries = contents.entries
        """Updates found when the journal was opened."""
        self.dropped_tail = contents.dropped_tail
        self._line_ends = list(contents.line_ends)
        self._file = file
        self._file.seek(self._end)
        self._has_tail = bool(contents.dropped_tail)  # stays until something is written: it tells what happened

    @classmethod
    def open(cls, path: Path, header: JournalHeader) -> Self:
        """Open the journal for appending, creating it when it does not exist.

        Raises:
            JournalError: damaged, of another run, or not writable.
        """
        try:
            path.touch()
            fsync_directory(path.parent)
            file = _locked(path)
            try:  # under the lock: what was read before it may have grown
                contents = read_journal(path)
                if contents.header is not None:
                    check_same_run(path, contents.header, header)
                journal = cls(path, contents, file)
            except BaseException:
                file.close()
                raise
        except OSError as error:
            raise JournalError(describe_failure(path, error, "the journal")) from error
        if journal.header is None:
            try:
                journal._write({"format": FORMAT, **asdict(header)})
            except BaseException:
                journal.close()
                raise
            journal.header = header
        return journal

    @property
    def last_step(self) -> int:
        """Return the number of the last update in the journal; 0 without one."""
        return len(self._line_ends) - 1

    def append(self, entry: JournalEntry) -> None:
        """Write one update; it is on disk when this returns.

        Raises:
            JournalError: the line could not be written; the journal is then as before.
            ValueError: not the next step, or a fitness that is not a finite float32.
        """
        if entry.step != self.last_step + 1:
            raise ValueError(f"step {entry.step} cannot follow step {self.last_step}")
        fields = {key: getattr(entry, key) for key in _ENTRY_KEYS} | {"fitness": pack(entry.fitness)}
        if not entry.tied:
            del fields["tied"]
        self._write(fields)

    def truncate_after(self, step: int) -> None:
        """Forget the updates after `step`, and a dropped tail: for a run that goes back to it."""
        if step < self.last_step or self._has_tail:
            del self._line_ends[step + 1 :]
            self.entries = self.entries[:step]
            self._truncate(self._end)

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if not self._file.closed:
            unlock(self._file.fileno())
        self._file.close()

    @property
    def _end(self) -> int:
        return self._line_ends[-1] if self._line_ends else 0

    def _truncate(self, size: int) -> None:
        self._file.truncate(size)
        self._file.seek(size)
        os.fsync(self._file.fileno())
        self._has_tail = False

    def _write(self, fields: dict[str, Any]) -> None:
        line = _encode(fields)
        try:
            if self._has_tail:
                self._truncate(self._end)
            done = 0
            while done < len(line):
                done += self._file.write(line[done:])
            os.fsync(self._file.fileno())
        except BaseException as error:  # Ctrl-C, too, after which a notebook may go on
            try:
                self._truncate(self._end)
            except OSError:
                # Nothing may follow half a line.
                self.close()
            if not isinstance(error, OSError):
                raise
            raise JournalError(describe_failure(self.path, error, f"{len(line)} bytes")) from error
        self._line_ends.append(self._end + len(line))


def read_journal(path: Path) -> JournalContents:
    """Return everything valid in a journal; the file is not changed.

    Raises:
        JournalError: no such file, or damage before the last line.
    """
    header: JournalHeader | None = None
    line_ends: list[int] = []
    tail, end = "", 0
    try:
        with path.open("rb") as file:
            for number, (line, last) in enumerate(_lines(file), start=1):
                fields, problem = _decode(line)
                if problem and last:
                    tail = f"{path}:{number}: last line dropped, {problem}; its update is done again"
                    break
                if problem:
                    raise JournalError(f"{path}:{number}: {problem}. {_remedy(number)}")
                if number == 1:
                    header = _parse_header(path, fields)
                else:
                    _parse_entry(path, number, fields, expected_step=number - 1)
                end += len(line)
                line_ends.append(end)
    except OSError as error:
        raise JournalError(f"{path}: cannot be read ({error.strerror}). Name a run directory with a journal.") from None
    entries = Entries(path, line_ends, range(1, len(line_ends)))
    return JournalContents(header=header, entries=entries, dropped_tail=tail, line_ends=tuple(line_ends))


def _lines(file: BinaryIO) -> Iterator[tuple[bytes, bool]]:
    """Yield lines with their newline, nothing but which ends one, and whether it is the last."""
    line = file.readline()
    while line:
        following = file.readline()
        yield line, not following
        line = following


def _encode(fields: dict[str, Any]) -> bytes:
    body = json.dumps(fields, separators=(",", ":"), allow_nan=False).encode()
    return body[:-1] + b',"crc":"%08x"}\n' % zlib.crc32(body)


def _decode(line: bytes) -> tuple[dict[str, Any], str]:
    """Return fields of a line and what is wrong with it. The CRC is of bytes: no change can hide in equal JSON."""
    if not line.endswith(b"\n"):
        return {}, "incomplete line"
    body = line[:-1]
    rest = body[:-_CRC_LENGTH] + b"}"
    if body[-_CRC_LENGTH:] != b',"crc":"%08x"}' % zlib.crc32(rest):
        return {}, "damaged line (its CRC does not match)"
    try:
        return parse_json(rest), ""
    except ValueError:
        # Whoever computed the CRC wrote that, so that it is not a line to be dropped: it is refused as an update.
        return {}, ""


def _parse_header(path: Path, fields: dict[str, Any]) -> JournalHeader:
    if "frozen_hash" not in fields:
        raise JournalError(f"{path}:1: the header line is missing. Restore the file from a backup.")
    if fields.get("format") not in _READS:
        raise JournalError(
            f"{path}:1: journal format {fields.get('format')!r:.40}, but this version reads {_READS[0]} to {FORMAT}. "
            "Use the version that wrote it."
        )
    texts = {"train": "", "held_out": "", "task_file": ""} | {
        key: value for key, value in fields.items() if key != "format"
    }
    if texts.keys() != _HEADER_KEYS or not all(isinstance(text, str) for text in texts.values()):
        raise JournalError(f"{path}:1: is not the header of a journal. Restore the file from a backup.")
    return JournalHeader(**texts)


def _parse_entry(path: Path, number: int, fields: dict[str, Any], *, expected_step: int) -> JournalEntry:
    fitness = unpack(fields.get("fitness"))
    if fitness is None or not _is_update(fields):
        raise JournalError(f"{path}:{number}: is not an update. {_remedy(number)}")
    step = fields["step"]
    if step != expected_step:
        problem = "repeats an earlier line" if step < expected_step else "lines are missing before it"
        raise JournalError(
            f"{path}:{number}: step {step} where step {expected_step} belongs: {problem}. {_remedy(number)}"
        )
    lists = {key: tuple(fields[key]) for key in _LISTS if key in fields}
    return JournalEntry(**fields | lists | {"fitness": fitness})


def _remedy(number: int) -> str:
    """Return what to do about a bad line; line 1 is the header, so line n holds update n - 1."""
    if number < 3:
        return "Restore the file from a backup."
    return (
        f"Restore the file from a backup, or go back to step {number - 2}: cut it before this line, and metrics.jsonl "
        "after that step."
    )


def _is_update(fields: dict[str, Any]) -> bool:
    """Return whether fields and types other than fitness are those of an entry; a correct CRC does not prove that."""
    entry = {"checksum": "", "tied": []} | fields
    if entry.keys() != _ENTRY_KEYS or not all(isinstance(entry[key], list) for key in _LISTS):
        return False
    numbers = [entry["sigma"], entry["learning_rate"]]
    return (
        all(type(number) in (int, float) and abs(number) < _TOO_LARGE for number in numbers)
        and all(type(count) is int for count in (entry["step"], entry["noise_step"], *entry["dropped"], *entry["tied"]))
        and isinstance(entry["checksum"], str)
    )


def check_same_run(path: Path, found: JournalHeader, header: JournalHeader) -> None:
    """Raise JournalError unless the header that was found is of the run of the other."""
    if found.base_model != header.base_model:
        raise JournalError(
            f"{path}:1: the run's base model is {found.base_model}, now it is {header.base_model}. "
            "Restore that model, or start a new run."
        )
    if found.frozen_hash != header.frozen_hash:
        raise JournalError(
            f"{path}:1: the run has other settings (hash {found.frozen_hash[:12]}, now "
            f"{header.frozen_hash[:12]}). Restore those that it began with, or start a new run."
        )
    splits = {"to train on": (found.train, header.train), "to evaluate on": (found.held_out, header.held_out)}
    if changed := [split for split, (before, now) in splits.items() if before and now and before != now]:
        raise JournalError(
            f"{path}:1: the problems {' and '.join(changed)}, or their prompts, changed since the run started: "
            "restore the data or the task's file, or start a new run directory."
        )
