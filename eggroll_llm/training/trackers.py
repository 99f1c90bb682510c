"""Copies of the metrics for TensorBoard and Weights & Biases. Neither can stop, delay or block a run.

A resumed run goes on in both where it was logged before: steps that are done again replace those in TensorBoard, and
W&B, which takes no step twice, keeps the equal ones that it has.

Each tracker is a process of its own (`python -m eggroll_llm.training.trackers`), fed by a thread behind a queue:
whatever it raises, a network that does not answer, and what it would do at exit stay there. The first failure
becomes one warning, given by the thread that trains, and switches that tracker off. metrics.jsonl has every row
in any case.
"""

import contextlib
import dataclasses
import json
import os
import queue
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from eggroll_llm.config.schema import LogConfig
from eggroll_llm.system.files import write_text
from eggroll_llm.system.installed import import_failure
from eggroll_llm.system.invocation import child_python
from eggroll_llm.system.jsonl import to_json

QUEUED_ROWS = 1000  # a tracker that is further behind has stopped working
WANDB_ID = "wandb-id"  # file of a run directory, so that a resumed run goes on where it was logged before
CLOSE_SECONDS = 15.0  # patience at the end of a run, for all trackers together

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Where a tracker writes."""

    tracker: str
    """Package that is needed: "tensorboard" or "wandb"."""
    project: str
    """Project at Weights & Biases."""
    run_dir: str
    """Directory of the run."""
    settings: Mapping[str, Any]
    """Recorded with the run."""


class Trackers:
    """The trackers that the configuration names. `log` and `close` raise nothing."""

    def __init__(
        self, config: LogConfig, run_dir: Path, settings: Mapping[str, Any], warn: Callable[[str], None]
    ) -> None:
        """Start them; `settings` are recorded with the run, `warn` is called at most once a tracker."""
        self._warn = warn
        names = [name for name, wanted in (("tensorboard", config.tensorboard), ("wandb", config.wandb)) if wanted]
        self._trackers = [
            _Tracker(Target(tracker=name, project=config.wandb, run_dir=str(run_dir.absolute()), settings=settings))
            for name in names
        ]

    def log(self, row: Row) -> None:
        """Hand over the metrics of a step."""
        for tracker in self._trackers:
            tracker.put(to_json(row))
        self._drop_failed()

    def close(self) -> None:
        """Let the trackers finish, end those that take over CLOSE_SECONDS; a second call does nothing."""
        deadline = time.monotonic() + CLOSE_SECONDS
        for tracker in self._trackers:
            tracker.put(None)
        for tracker in self._trackers:
            tracker.join(max(0.0, deadline - time.monotonic()))
        self._drop_failed()
        self._trackers = []

    def _drop_failed(self) -> None:
        for tracker in self._trackers:
            if tracker.failure:
                self._warn(f"{tracker.name} is off from here on, metrics.jsonl goes on: {tracker.failure}")
        self._trackers = [tracker for tracker in self._trackers if not tracker.failure]


class _Tracker:
    """One tracker's process and the thread that feeds it."""

    def __init__(self, target: Target) -> None:
        self.name = target.tracker
        self.failure = ""
        self._target = target
        self._lines: queue.Queue[str | None] = queue.Queue(QUEUED_ROWS)
        self._process: subprocess.Popen[str] | None = None
        self._thread = threading.Thread(target=self._work, name=f"tracker {self.name}", daemon=True)
        self._thread.start()

    def put(self, line: str | None) -> None:
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._stop(f"it is {QUEUED_ROWS} rows behind")

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._stop(f"it did not finish within {CLOSE_SECONDS:g} s")

    def _stop(self, reason: str) -> None:
        self.failure = self.failure or reason
        if self._process is not None:
            with contextlib.suppress(OSError):  # it has just ended
                os.killpg(self._process.pid, signal.SIGKILL)

    def _work(self) -> None:
        try:
            # Of its own session: Ctrl-C ends the run, which then lets the tracker finish.
            self._process = subprocess.Popen(
                [*child_python(), "-m", "eggroll_llm.training.trackers"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            with self._process as process:
                assert process.stdin is not None
                with contextlib.suppress(BrokenPipeError):  # it has failed, and says why on its output
                    self._feed(process.stdin)
                said, _ = process.communicate()
            if process.returncode:
                self.failure = self.failure or said.strip().rpartition("\n")[2] or f"status {process.returncode}"
        except Exception as error:
            self.failure = self.failure or f"{type(error).__name__}: {error}"

    def _feed(self, pipe: IO[str]) -> None:
        line: str | None = to_json(dataclasses.asdict(self._target))
        while line is not None:
            pipe.write(line + "\n")
            pipe.flush()
            line = self._lines.get()


def main() -> int:
    """Be a tracker: a target and then rows, one JSON object a line, on standard input."""
    os.nice(10)  # training comes first
    target = Target(**json.loads(sys.stdin.readline()))
    rows = (json.loads(line) for line in sys.stdin)
    try:
        {"tensorboard": _to_tensorboard, "wandb": _to_wandb}[target.tracker](target, rows)
    except ImportError as error:
        print(import_failure(error) or f"ImportError: {error}".replace("\n", " "))
    except BaseException as error:  # SystemExit among them, by which some clients give up
        print(f"{type(error).__name__}: {str(error) or 'no message'}".replace("\n", " "))
    else:
        return 0
    sys.stdout.flush()
    os._exit(1)  # what a failed client has registered to do at exit could hang


def _to_tensorboard(target: Target, rows: Iterable[Row]) -> None:
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = None
    for row in rows:
        # Steps that a killed process had logged and a resumed one does again are there once.
        writer = writer or SummaryWriter(os.path.join(target.run_dir, "tensorboard"), purge_step=row["step"])
        for key, value in row.items():
            if key != "step" and isinstance(value, int | float):
                writer.add_scalar(key, value, row["step"])
        writer.flush()
    if writer:
        writer.close()


def _to_wandb(target: Target, rows: Iterable[Row]) -> None:
    import wandb

    run = wandb.init(
        project=target.project,
        id=_run_id(Path(target.run_dir) / WANDB_ID),
        resume="allow",  # a run of that id goes on, and is made where there is none
        name=os.path.basename(target.run_dir),
        dir=target.run_dir,
        config=dict(target.settings),
        settings=wandb.Settings(console="off"),
    )
    for row in rows:
        run.log(
            {key: value for key, value in row.items() if key != "step" and value is not None},
            step=row["step"],
        )
    run.finish()


def _run_id(path: Path) -> str:
    """Return the run's id at Weights & Biases: the one in the file, or a new one, which is put there."""
    known = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
    if not known:
        known = secrets.token_hex(8)
        write_text(path, f"{known}\n")
    return known


if __name__ == "__main__":
    sys.exit(main())
