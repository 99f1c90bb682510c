"""Progress on a terminal (a moving line below those that stay) or in a log (one line a step). Models' text is inert.

A closed or broken output never stops a run: what cannot be shown is dropped.
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import IO, TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from eggroll_llm.records.accuracy import accuracy_text
from eggroll_llm.system.terminal import inert
from eggroll_llm.training.evaluation import Evaluation

if TYPE_CHECKING:
    from eggroll_llm.training.limits import Course

INDENT = " " * 11  # of completions, below the step's line
QUESTION_CHARACTERS = 80
DETAIL_CHARACTERS = 40
LEAST_BAR, MOST_BAR = 8, 40


def duration(seconds: float) -> str:
    """Return "m:ss" or "h:mm:ss"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def give_up(file: IO[str]) -> None:
    """Send nowhere what is written, and what is still buffered: it would fail once more when the interpreter exits."""
    with contextlib.suppress(OSError, ValueError):  # it may be no file, or closed
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


class _Console(Console):
    """A console whose reader may go away, where rich would end the process.

    The cursor stays visible: a process that is killed could not show it again.
    """

    def on_broken_pipe(self) -> None:
        self.quiet = True
        give_up(self.file)

    def show_cursor(self, show: bool = True) -> bool:
        return False


class _Live(Live):
    """Redraws in a thread of its own, so that it moves while the engine computes, and ends with a broken output."""

    def refresh(self) -> None:
        try:
            super().refresh()
        except (OSError, ValueError):
            self.console.quiet = True
            give_up(self.console.file)


class Line:
    """The line that moves: what is being done, the bar of the run, time left, best accuracy.

    Every part keeps its width while it changes, and the last ones are left out where the terminal is too narrow.
    """

    def __init__(self) -> None:
        self._spinner = Spinner("dots", style="green")
        self._activity = ""
        self._widest = 0
        self._since: float | None = None
        self.course: Course | None = None

    def working(self, text: str) -> None:
        """Show a text with the time that has passed since."""
        self._activity, self._since = text, time.monotonic()

    def counting(self, label: str, done: int, total: int) -> None:
        """Show how much of something is done."""
        self._activity, self._since = f"{label}: {done:>{len(str(total))}}/{total}", None
        self._widest = max(self._widest, cell_len(self._activity))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        room = options.max_width - 1  # a line that fills the terminal would wrap when that is made narrower
        passed = "" if self._since is None else f" {duration(time.monotonic() - self._since)}"
        activity = Text(f"{self._activity}{passed}".ljust(self._widest))
        parts = [self._spinner.render(console.get_time()), activity]
        fraction = self.course.fraction if self.course else None
        if self.course and fraction is not None:
            parts += [Text(f"{fraction:4.0%}"), *self._facts(self.course)]
        grid = Table.grid(padding=(0, 1))
        widths = [1, *(cell_len(str(part)) for part in parts[1:])]
        widths[1] = min(widths[1], room - 2)
        while len(parts) > 2 and sum(widths) + len(widths) > room:
            parts.pop(), widths.pop()
        free = room - sum(widths) - len(widths)
        if fraction is not None and len(parts) > 2 and free >= LEAST_BAR:
            width = min(free, MOST_BAR)
            parts.insert(2, ProgressBar(total=1.0, completed=fraction, width=width))
            widths.insert(2, width)
        for width in widths:
            grid.add_column(width=width, no_wrap=True, overflow="ellipsis")
        grid.add_row(*parts)
        yield grid

    def _facts(self, course: "Course") -> Iterator[Text]:
        left = "" if course.seconds_left is None else f"left {duration(course.seconds_left)}"
        best = "" if course.best is None else f"best {course.best:.3f}"
        yield Text(left.ljust(10))
        yield Text(best.ljust(10), style="bold")


class ConsoleDisplay(AbstractContextManager["ConsoleDisplay"]):
    """Shows a run on standard output. As a context manager it leaves the terminal as it was, whatever happened."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or _Console(highlight=False, soft_wrap=not sys.stdout.isatty())
        self._line = Line()
        self._live: Live | None = None

    @property
    def moves(self) -> bool:
        """Return whether there is a terminal that can redraw a line."""
        return self.console.is_terminal

    def working(self, text: str) -> None:
        """Show that something of unknown length has begun."""
        if not self.moves:
            self.message(text)
            return
        self._line.working(text)
        self._start()

    def sampling(self, label: str, done: int, total: int) -> None:
        """Show how far the sampling of a step or an evaluation is; only on a live terminal."""
        if self.moves:
            self._line.counting(label, done, total)
            self._start()

    def course(self, course: "Course") -> None:
        """Take where the run stands."""
        self._line.course = course

    def step(
        self, row: dict[str, Any], samples: Sequence[dict[str, Any]], *, seconds_left: float | None, note: str = ""
    ) -> None:
        """Show one line for the step and a few of its completions."""
        left = "" if seconds_left is None else f"  left {duration(seconds_left)}"
        said = f"  {note}" if note else ""
        if row["completions"]:
            work = f"{row['throughput/tokens_per_second']:,.0f} tokens/s"
        else:  # the answers are those of an earlier step
            work = f"{row['tokens/scored']:,} tokens scored"
        with self._surviving():
            self.console.print(
                f"step {row['step']:>4}  reward {row['reward/mean']:.3f}  accuracy {row['reward/accuracy']:.3f}  "
                f"{work}  {row['time/step']:.1f} s{left}{said}"
            )
            for sample in samples:
                self.console.print(self._sample(sample))

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
            self.console.print(table)

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove what still moves."""
        with self._surviving():
            if self._live:
                self._live.stop()
        self._live = None

    def _start(self) -> None:
        with self._surviving():
            if self._live is None:
                # What others print goes above the line. What they send to a file stays in that.
                redirect = sys.stderr.isatty()
                self._live = _Live(self._line, console=self.console, transient=True, redirect_stderr=redirect)
                self._live.start(refresh=True)

    def _sample(self, sample: dict[str, Any]) -> Text:
        """Return question, answer, reward and why, on a terminal in one line of it."""
        why = ", ".join(
            f"{name} {'–' if value is None else format(value, '.3g')}"
            for name, value in sample.get("rewards", {}).items()
        )
        why = inert(why or sample["detail"], DETAIL_CHARACTERS)
        detail = f": {why}" if why else ""
        verdict = f"  [{'right' if sample['correct'] else 'wrong'}, reward {sample['reward']:g}{detail}]"
        question = Text(inert(str(sample["question"]), QUESTION_CHARACTERS))
        answer = Text(inert(sample["completion"].strip()))
        if self.moves:
            room = max(20, self.console.width - len(INDENT) - cell_len(verdict) - len(" → "))
            question.truncate(max(room // 2, room - answer.cell_len), overflow="ellipsis")
            answer.truncate(room - question.cell_len, overflow="ellipsis")
        return Text(f"{INDENT}{question} → {answer}{verdict}", style="dim")

    def _print(self, text: str, style: str) -> None:
        with self._surviving():
            # Not wrapped here: a path or command that the terminal wraps is copied in one piece.
            self.console.print(Text(inert(text, 4000), style=style), soft_wrap=True)

    @contextlib.contextmanager
    def _surviving(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError):
            self.console.quiet = True
            give_up(self.console.file)
