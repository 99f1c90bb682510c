"""Copies of the metrics for TensorBoard and Weights & Biases. Neither can stop a run.

A resumed run continues its earlier log in both: repeated steps replace those in TensorBoard, while W&B keeps the equal
ones that it has. The first failure of a tracker becomes one warning
and switches it off. metrics.jsonl has every row in any case.
"""

import json
import math
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from eggroll_llm.config.schema import LogConfig
from eggroll_llm.system.files import write_text
from eggroll_llm.system.installed import import_failure
from eggroll_llm.system.jsonl import to_json

WANDB_ID = "wandb-id"  # file of a run directory, so that a resumed run continues its earlier log


class _Tracker(Protocol):
    def log(self, step: int, values: Mapping[str, int | float]) -> None: ...

    def close(self) -> None: ...


class Trackers:
    """The trackers that the configuration names. `log` and `close` raise nothing but an interruption."""

    def __init__(
        self, config: LogConfig, run_dir: Path, settings: Mapping[str, Any], warn: Callable[[str], None]
    ) -> None:
        """Prepare them; `settings` are recorded with the run, `warn` is called at most once a tracker."""
        self._warn = warn
        self._start: dict[str, Callable[[int], _Tracker]] = {}
        self._running: dict[str, _Tracker] = {}
        if config.tensorboard:
            self._start["tensorboard"] = lambda step: _TensorBoard(run_dir, step)
        if config.wandb:
            self._start["wandb"] = lambda step: _Wandb(config.wandb, run_dir, settings)

    def log(self, row: Mapping[str, Any]) -> None:
        """Hand over the finite numbers of a step; the first starts the trackers."""
        step = row["step"]
        values = {
            key: value
            for key, value in row.items()
            if key != "step" and isinstance(value, int | float) and math.isfinite(value)
        }

        def log(name: str) -> None:
            if name not in self._running:
                self._running[name] = self._start[name](step)
            self._running[name].log(step, values)

        self._each(log)

    def close(self) -> None:
        """Let the trackers finish; a second call does nothing."""
        self._each(lambda name: self._running[name].close() if name in self._running else None)
        self._start, self._running = {}, {}

    def _each(self, call: Callable[[str], None]) -> None:
        for name in list(self._start):
            try:
                call(name)
            except (Exception, SystemExit) as error:  # some clients give up by SystemExit
                cause = import_failure(error) if isinstance(error, ImportError) else ""
                cause = cause or f"{type(error).__name__}: {str(error) or 'no message'}".replace("\n", " ")
                self._warn(f"{name} is off for the rest of the run, metrics.jsonl is still written: {cause}")
                del self._start[name]


class _TensorBoard:
    def __init__(self, run_dir: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Steps that a killed process had logged and a resumed one does again are there once.
        self._writer: Any = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step)

    def log(self, step: int, values: Mapping[str, int | float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, project: str, run_dir: Path, settings: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project=project,
            id=_run_id(run_dir / WANDB_ID),
            resume="allow",  # continue the run of that id, or create it
            name=run_dir.name,
            dir=str(run_dir),
            config=_valid(settings),
            settings=wandb.Settings(console="off"),
        )

    def log(self, step: int, values: Mapping[str, int | float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def _valid(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings as JSON holds them: half surrogate pairs and numbers that are not finite replaced."""
    valid: dict[str, Any] = json.loads(to_json(settings))
    return valid


def _run_id(path: Path) -> str:
    """Return the run's id at Weights & Biases: the one in the file, or a new one, which is put there."""
    known = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
    if not known:
        known = secrets.token_hex(8)
        write_text(path, f"{known}\n")
    return known
