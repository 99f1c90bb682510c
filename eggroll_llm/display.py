"""Progress on a terminal (live) or in a log (one line a step). Text of models is shown inert.

A closed or broken output never stops a run: what cannot be shown is dropped.
"""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import IO, Any

from rich.console import Console
from rich.status import Status
from rich.table import Table
from rich.text import Text

from eggroll_llm.accuracy import accuracy_text
from eggroll_llm.closing import Closing
from eggroll_llm.evaluate import Evaluation
from eggroll_llm.inert import inert


def duration(seconds: float) -> str:
    """Return "m:ss" or "h:mm:ss"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def give_up(file: IO[str]) -> None:
    """Send nowhere what is written, and what is still buffered: it would fail once more when the interpreter exits."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # it may be closed, no file, or None
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


class _Console(Console):
    """A console whose reader may go away: rich would end the process."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        give_up(self.file)


class ConsoleDisplay(Closing):
    """Shows a run on standard output. As a context manager it leaves the terminal as it was, whatever happened."""

    def __init__(self, console: Console | None = None) -> None:
        # There is no sys.stdout at all when the process was started with it closed.
        live = sys.stdout is not None and sys.stdout.isatty()
        self.console = console or _Console(highlight=False, soft_wrap=not live)
        self._status: Status | None = None

    def sampling(self, label: str, done: int, total: int) -> None:
        """Show how far the sampling of a step or an evaluation is; only on a live terminal."""
        if not self.console.is_terminal:
            return
        with self._surviving():
            if self._status is None:
                self._status = self.console.status("")
                self._status.start()
            self._status.update(f"{label}: {done} of {total} completions")
            if done == total:
                self._stop_status()

    def step(
        self, row: dict[str, Any], samples: Sequence[dict[str, Any]], *, seconds_left: float | None, note: str = ""
    ) -> None:
        """Show one line for the step and a few of its completions."""
        left = "" if seconds_left is None else f"  left {duration(seconds_left)}"
        said = f"  {note}" if note else ""
        with self._surviving():
            self._stop_status()
            self.console.print(
                f"step {row['step']:>4}  reward {row['reward/mean']:.3f}  accuracy {row['reward/accuracy']:.3f}  "
                f"{row['throughput/tokens_per_second']:,.0f} tokens/s  {row['time/step']:.1f} s{left}{said}"
            )
            for sample in samples:
                mark = "right" if sample["correct"] else "wrong"
                line = f"           {sample['problem']}: {sample['completion'].strip()}"
                self.console.print(Text(f"{inert(line)}  [{mark}]", style="dim"))

    def evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Show an evaluation."""
        self._print(
            f"eval  {step:>4}  accuracy {accuracy_text(evaluation.accuracy, evaluation.problems)} on "
            f"{evaluation.problems} held-out problems, {evaluation.seconds:.1f} s",
            style="bold",
        )

    def message(self, text: str) -> None:
        """Show a sentence."""
        self._print(text, style="yellow")

    def table(self, table: Table) -> None:
        """Show a table."""
        with self._surviving():
            self._stop_status()
            self.console.print(table)

    def close(self) -> None:
        """Remove what still moves."""
        with self._surviving():
            self._stop_status()

    def _print(self, text: str, style: str) -> None:
        with self._surviving():
            self._stop_status()
            self.console.print(Text(inert(text, 4000), style=style))

    def _stop_status(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None

    @contextlib.contextmanager
    def _surviving(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError):
            self.console.quiet = True
