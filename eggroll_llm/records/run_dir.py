"""The directory of a run: who may use it, where things are, and the append-only logs.

    config.toml  environment.json  metrics.jsonl  completions.jsonl  journal.jsonl  evaluations/  checkpoints/  final/
    drawn.json, where several steps learn from the same answers
    reference.json, answers of the base model by which its divergence from later weights is measured

One process at a time holds a run. A directory counts as a run when it has our lock file, or both config.toml
and journal.jsonl; nothing else is ever deleted.

Raises `RunDirError` with path and remedy when the directory cannot be used.
"""

import json
import os
import shutil
import stat
import tomllib
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, Self

from eggroll_llm.errors import RunDirError, SamplesError
from eggroll_llm.records.answers import Sample, read_samples, samples_text
from eggroll_llm.records.baseline import Constant
from eggroll_llm.records.drawn import Drawn, drawn_text
from eggroll_llm.records.lock import RunLock, holder_of
from eggroll_llm.system.files import (
    append,
    describe_failure,
    fsync_directory,
    recover,
    replace_directory,
    write_text,
)
from eggroll_llm.system.invocation import command
from eggroll_llm.system.jsonl import cut_after_step, last_step, parse_json, read_rows, to_json
from eggroll_llm.system.versions import describe_environment

OnExisting = Literal["fail", "resume", "overwrite"]

LOCK = ".eggroll-llm.lock"


def default_run_dir(recipe: Path | str, now: datetime) -> Path:
    """Return `runs/<recipe name>-<time>`, relative to the working directory."""
    return Path("runs") / f"{Path(recipe).stem}-{now:%Y%m%d-%H%M%S}"


def is_run_dir(path: Path) -> bool:
    """Return whether the directory was made by a run."""
    # os.path answers no where Path raises OSError, as for a name that is too long.
    return os.path.isfile(path / LOCK) or all(os.path.isfile(path / name) for name in ("config.toml", "journal.jsonl"))


class RunDir(AbstractContextManager["RunDir"]):
    """Paths of a run; made by `create`, also its lock and logs. Use as a context manager or call `close`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.toml"
        self.environment = path / "environment.json"
        self.metrics = path / "metrics.jsonl"
        self.completions = path / "completions.jsonl"
        self.journal = path / "journal.jsonl"
        self.drawn = path / "drawn.json"
        self.reference = path / "reference.json"
        self.evaluations = path / "evaluations"
        self.checkpoints = path / "checkpoints"
        self.final = path / "final"
        self.resumed = False
        """Whether there are updates of an earlier process to continue from."""
        self.stale_lock = ""
        """Holder that died without closing the directory; empty when there was none."""
        self._lock: RunLock | None = None

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Return the run in that directory, to read: nothing is locked or changed."""
        path = _check_path(path)
        if not is_run_dir(path):
            raise RunDirError(
                f"{path}: not a run directory (no config.toml and journal.jsonl). Name a directory that "
                "training has written."
            )
        return cls(path)

    @classmethod
    def check(cls, path: Path | str, on_existing: OnExisting) -> None:
        """Raise the RunDirError that `create` would now raise, but for a run in use; nothing is made or changed."""
        path = _check_path(path)
        try:
            _check_directory(path)
            cls(path)._check_existing(on_existing)
        except OSError as error:
            raise RunDirError(describe_failure(path, error, "the run directory")) from error

    @classmethod
    def create(cls, path: Path | str, config_toml: str, on_existing: OnExisting = "fail") -> Self:
        """Make or reopen the directory and lock it.

        A run without journal, metrics, checkpoint and model has nothing to lose and counts as new. Resuming leaves
        config.toml as it is: compare it with the new configuration before `write_config` replaces it.

        Raises:
            RunDirError: not usable, in use, or holding a run although `on_existing` is "fail".
        """
        path = _check_path(path)
        run = cls(path)
        try:
            _check_directory(path)
            _make_directory(path)
            run._lock = RunLock(path / LOCK)
            run.stale_lock = run._lock.stale
            recover(path)
            if run.evaluations.is_dir():
                recover(run.evaluations)
            run._prepare(config_toml, on_existing)
        except OSError as error:
            run.close()
            raise RunDirError(describe_failure(path, error, "the run directory")) from error
        except BaseException:
            run.close()
            raise
        return run

    def holder(self) -> str:
        """Return the process that trains here now, as far as its lock says; empty without one. Changes nothing."""
        return holder_of(self.path / LOCK)

    def write_config(self, config_toml: str) -> None:
        """Replace config.toml, whole or not at all."""
        self._write_text(self.config, config_toml)

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Add one line, with its `step`, to metrics.jsonl and flush it to disk; numbers not finite become null."""
        self._append(self.metrics, [row], durable=True)

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the rows of metrics.jsonl, none when there is no file. Raises RunDirError for a damaged line."""
        return read_rows(self.metrics) if self.metrics.is_file() else []

    def append_completions(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add a line a row, each with its `step`, to completions.jsonl; half surrogates become U+FFFD."""
        self._append(self.completions, rows)

    def write_drawn(self, file: Path, drawn: Drawn) -> None:
        """Replace drawn.json or reference.json, whole or not at all."""
        self._write_text(file, drawn_text(drawn))

    def evaluation_file(self, step: int) -> Path:
        """Return the file with the graded answers of a step's evaluation."""
        return self.evaluations / f"step-{step:06d}.jsonl"

    def write_evaluation(self, step: int, settings: Mapping[str, Any], samples: Iterable[Sample]) -> None:
        """Write the graded answers of an evaluation to evaluations/, whole or not at all."""
        self._write_text(self.evaluation_file(step), samples_text(settings, samples))

    def read_evaluation(self, step: int) -> list[Sample]:
        """Return the graded answers of an evaluation. Raises SamplesError when they are missing or damaged."""
        return read_samples(self.evaluation_file(step))[1]

    def example_prompt(self) -> str:
        """Return the prompt in full that the base model's evaluation recorded; empty without one."""
        text = self._evaluation_settings().get("prompt")
        return text if isinstance(text, str) else ""

    def constant(self) -> Constant | None:
        """Return the best constant answer that the base model's evaluation recorded; None without one."""
        return Constant.of(self._evaluation_settings())

    def _evaluation_settings(self) -> dict[str, Any]:
        try:
            return read_samples(self.evaluation_file(0))[0]
        except SamplesError:
            return {}

    def write_final(self, write: Callable[[Path], None]) -> None:
        """Put the model that `write` writes into a new directory in the place of final/, whole or not at all."""
        try:
            replace_directory(self.final, write)
        except OSError as error:
            raise RunDirError(
                f"{describe_failure(self.final, error, 'the final model')} Nothing else is lost: resume the run, which "
                "writes it again."
            ) from error

    def has_updates_in_journal(self) -> bool:
        """Return whether the journal holds updates, as that of method "es" does."""
        return self._recorded("method", "es") == "es"

    def recorded_model(self) -> str:
        """Return the model that the run began from, as config.toml names it; empty where it does not."""
        return self._recorded("model", "")

    def _recorded(self, key: str, default: str) -> str:
        try:
            return str(tomllib.loads(self.config.read_text(encoding="utf-8-sig")).get(key, default))
        except (OSError, ValueError, RecursionError):
            return default

    def last_logged_step(self) -> int | None:
        """Return the `step` of the last complete line of metrics.jsonl; None without one."""
        return last_step(self.metrics)

    def truncate_logs(self, step: int) -> None:
        """Remove lines of later steps and lines cut short from both logs, and later evaluations: each step once."""
        for file in self.evaluations.glob("step-*.jsonl"):
            number = file.stem.removeprefix("step-")
            if number.isdecimal() and int(number) > step:
                file.unlink()
        for path in (self.metrics, self.completions):
            kept = cut_after_step(path, step)
            if kept is not None:
                self._write_text(path, kept)

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the directory for other processes; a second call does nothing."""
        if self._lock is not None:
            self._lock.close()

    def _check_existing(self, on_existing: OnExisting) -> bool:
        """Return whether an earlier run left something. Raises RunDirError when it cannot be treated as requested."""
        files, folders = (self.journal, self.metrics), (self.checkpoints, self.final)
        started = any(file.exists() for file in files) or any(_is_filled(folder) for folder in folders)
        if started and on_existing == "fail":
            raise RunDirError(
                f"{self.path}: already holds a run. Choose another --run-dir, delete it with --on-existing overwrite, "
                f"or continue it with: {command('resume', self.path)}"
            )
        if started and on_existing == "resume":
            for file in (self.config, self.journal):
                if not file.is_file():
                    raise RunDirError(f"{file}: missing, no way to resume. Restore it, or use --on-existing overwrite.")
        return started

    def _prepare(self, config_toml: str, on_existing: OnExisting) -> None:
        started = self._check_existing(on_existing)
        if started and on_existing == "resume":
            self.resumed = True
        elif on_existing == "overwrite":
            # The configuration goes first: what a kill leaves behind is then no run to resume.
            for entry in sorted(self.path.iterdir(), key=lambda entry: entry != self.config):
                _remove(entry, keep=self.path / LOCK)
        else:
            for file in (self.config, self.environment, self.metrics, self.completions):
                file.unlink(missing_ok=True)
            shutil.rmtree(self.evaluations, ignore_errors=True)
        starts = earlier_starts(self.environment) if self.resumed else []
        write_text(self.environment, json.dumps({"starts": [*starts, describe_environment()]}, indent=1) + "\n")
        self.checkpoints.mkdir(exist_ok=True)
        if not self.resumed:
            write_text(self.config, config_toml)
        fsync_directory(self.path)

    def _append(self, path: Path, rows: Iterable[Mapping[str, Any]], *, durable: bool = False) -> None:
        data = "".join(to_json(row) + "\n" for row in rows).encode()
        try:
            created = durable and not path.exists()
            with path.open("ab", buffering=0) as file:
                append(file, data, durable=durable)
            if created:
                fsync_directory(path.parent)
        except OSError as error:
            raise RunDirError(describe_failure(path, error, f"{len(data)} bytes")) from error

    def _write_text(self, path: Path, text: str) -> None:
        try:
            path.parent.mkdir(exist_ok=True)
            write_text(path, text)
        except OSError as error:
            raise RunDirError(describe_failure(path, error, f"{len(text.encode())} bytes")) from error


def _check_path(path: Path | str) -> Path:
    """Return the path. Raises RunDirError for text that is not a path."""
    text = str(path)
    try:
        encoded = os.fsencode(text)
    except UnicodeEncodeError:
        encoded = b""
    if text == ".":
        raise RunDirError(f"run directory '.': has no name. Write its path out: {Path.cwd()}.")
    if not encoded or b"\0" in encoded:
        raise RunDirError(f"run directory {text!a}: not a path. Name a directory.")
    return Path(path)


def _check_directory(path: Path) -> None:
    """Raise RunDirError unless the directory is empty or a run's, or can be created. Changes nothing.

    Raises OSError where the system cannot tell.
    """
    if ".." in path.parts:
        raise RunDirError(f'{path}: contains "..". Write the directory out: {os.path.abspath(path)}.')
    try:
        found = path.stat()
    except FileNotFoundError:
        _check_parent(path)
        return
    except NotADirectoryError:
        raise RunDirError(f"{path}: {path.parent} is not a folder. Choose another --run-dir.") from None
    if not stat.S_ISDIR(found.st_mode):
        raise RunDirError(f"{path}: is a file. Choose another --run-dir.")
    if not is_run_dir(path) and any(path.iterdir()):
        raise RunDirError(f"{path}: is neither empty nor a run directory. Choose another --run-dir.")
    if not os.access(path, os.W_OK | os.X_OK):
        raise RunDirError(f"{path}: is not writable. Change its permissions, or choose another --run-dir.")


def _check_parent(path: Path) -> None:
    parent = path.parent
    if parent == Path("runs") and not parent.exists():
        parent = Path()  # the only one that is created
    if not parent.is_dir():
        raise RunDirError(f"{path}: the folder {parent} does not exist. Create it, or choose another --run-dir.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise RunDirError(
            f"{path}: the folder {parent} is not writable. Change its permissions, or choose another --run-dir."
        )


def _make_directory(path: Path) -> None:
    """Create the directory, and of its parents only `runs`. Raises OSError."""
    if path.parent == Path("runs"):
        path.parent.mkdir(exist_ok=True)
    if not path.is_dir():
        path.mkdir()
        fsync_directory(path.parent)


def _remove(entry: Path, *, keep: Path) -> None:
    if entry == keep:
        return
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink()


def _is_filled(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def earlier_starts(path: Path) -> list[Any]:
    """Return what environment.json says of each start; nothing where it is missing or damaged."""
    try:
        starts = parse_json(path.read_bytes())["starts"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return starts if isinstance(starts, list) else []
