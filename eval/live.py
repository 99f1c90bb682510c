"""A run while it goes on, as a page: where it stands, what its steps learn from, and all that its report has.

The page carries a script of ours that asks for it again and changes what has changed; everything that comes from the
run is text, as in `eval.report`, and the policy lets no other script run.
"""

import base64
import hashlib
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from markupsafe import Markup

from eggroll_llm.config.recipe import load_recipe
from eggroll_llm.config.schema import RunConfig
from eggroll_llm.errors import UserError
from eggroll_llm.records.accuracy import percent
from eggroll_llm.records.diagnosis import diagnose
from eggroll_llm.records.run_dir import RunDir, is_run_dir
from eggroll_llm.system.invocation import command
from eggroll_llm.system.jsonl import number
from eggroll_llm.training.limits import Limits
from eval import plots
from eval.compare import compare_runs
from eval.page import HERE, part, render, section, table
from eval.report import figure, run_headline, run_parts, settings
from eval.runs import Run, read_runs
from eval.tables import Grid

_SCRIPT = (HERE / "live.js").read_text(encoding="utf-8")
_DIGEST = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
POLICY = (
    f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{_DIGEST}'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Content security policy of the page."""
FOOTER = "This page follows the run while eggroll-llm watch runs, and loads nothing from anywhere else."
LAST_STEPS = 10  # in the table
IDLE = 10  # times as long as a page took to make, no other is made: the processor is the run's


class LivePage:
    """The page of a directory, made again when the run has changed, by several threads."""

    def __init__(self, path: Path) -> None:
        """Take a run, or a place where training may still create one. Raises RunDirError for any other."""
        self._path, self._lock = path, threading.Lock()
        self._seen: object = None
        self._page, self._not_before = "", 0.0
        if not _may_become_a_run(path):
            RunDir.open(path)

    def __call__(self) -> str:
        """Return the page as it is now, or was a moment ago."""
        with self._lock:
            seen = _state(RunDir(self._path))
            if seen != self._seen and time.monotonic() >= self._not_before:
                start = time.thread_time()
                self._page, self._seen = live_page(self._path), seen
                self._not_before = time.monotonic() + IDLE * (time.thread_time() - start)
            return self._page


def live_page(path: Path) -> str:
    """Return the page of a directory; what cannot be read is said on it."""
    directory = RunDir(path)
    name = path.resolve().name
    body: list[Markup] = []
    try:
        if not is_run_dir(path) or not directory.config.is_file():
            headline = part("status", f"waiting: {path} holds no run yet")
        elif not directory.read_metrics():
            headline = part("status", _before_the_first_evaluation(directory))
            body = [settings(load_recipe(directory.config))]
        else:
            (run,) = read_runs([path])
            status, ended = _standing(run)
            comparison = compare_runs([run])
            notes = [str(finding) for finding in diagnose(run.config, run.rows, ended=ended)]
            headline = part("status", status) + run_headline(comparison, "Final" if ended else "Latest")
            body = run_parts(run, comparison, notes, _signal(run))
    except (UserError, OSError) as error:  # a run that is overwritten just now
        headline = part("status", f"cannot be shown now: {error}")
    return render("Live", name, headline, body, script=_SCRIPT, footer=FOOTER)


def _may_become_a_run(path: Path) -> bool:
    """Return whether training could create a run there, as in an empty directory."""
    if path.is_dir():
        return not any(path.iterdir())
    return not path.exists() and (path.parent.is_dir() or path.parent == Path("runs"))


def _state(run: RunDir) -> object:
    """Return what changes when the page does."""

    def stamp(path: Path) -> tuple[int, int] | None:
        try:
            found = path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size

    return run.holder(), [stamp(path) for path in (run.config, run.metrics, run.completions, run.journal, run.final)]


def _before_the_first_evaluation(run: RunDir) -> str:
    if run.holder():
        return "starting: the model is loaded and the base model evaluated first"
    return f"stopped before the first evaluation; continue it with: {command('resume', run.path)}"


def _standing(run: Run) -> tuple[str, bool]:
    """Return where a run stands, in words, and whether it has ended."""
    last, config = run.points[-1], run.config
    limits = Limits(steps=config.steps, minutes=config.minutes)
    step, at = " ".join(limits.label(last.step).split()), datetime.fromtimestamp(run.directory.metrics.stat().st_mtime)
    if run.directory.holder():
        left = limits.seconds_left(last.step, last.seconds)
        return (
            f"running, {step}{'' if left is None else f', {_duration(left)} left'} (last result at {at:%H:%M:%S})",
            False,
        )
    if run.finished:
        return f"ended after step {last.step}, {at:%Y-%m-%d %H:%M}", True
    return f"stopped after {step}, {at:%Y-%m-%d %H:%M}; continue it with: {command('resume', run.directory.path)}", True


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def _signal(run: Run) -> Markup:
    """Return what the steps of a run learn from; nothing before the first."""
    steps = [row for row in run.rows if row["step"]]
    if not steps:
        return Markup()
    who = "members, which are perturbed" if run.config.members_answer else "the weights"
    caption = (
        "A problem is tied when all its answers earn the same, so that nothing is learned from it. Answers in training "
        f"are those of {who}, to the problems of the step; dots are steps, lines running means."
    )
    alt = f"Share of tied problems and accuracy of answers by step. {_last(run.config, steps[-1])}"
    drawn = figure(lambda theme: plots.signal_figure(run, theme), "Signal of each step", alt, caption)
    return section("Signal", drawn, table(_steps_grid(run.config, steps[-LAST_STEPS:])))


def _last(config: RunConfig, row: Mapping[str, Any]) -> str:
    tied, accuracy = _shares(config, row)
    return f"In step {row['step']}: {tied} tied, accuracy {accuracy}."


def _shares(config: RunConfig, row: Mapping[str, Any]) -> tuple[str, str]:
    return percent(number(row, "prompts/tied") / config.problems_per_step), percent(number(row, "reward/accuracy"))


def _steps_grid(config: RunConfig, rows: Sequence[Mapping[str, Any]]) -> Grid:
    def cells(row: Mapping[str, Any]) -> list[str]:
        reward, seconds = f"{number(row, 'reward/mean'):.3f}", f"{number(row, 'time/step'):.1f}"
        return [f"{row['step']}", reward, *_shares(config, row), percent(number(row, "completions/truncated")), seconds]

    return Grid(
        title="Last steps",
        columns=["step", "reward", "tied problems", "accuracy", "cut short", "seconds"],
        rows=[cells(row) for row in reversed(rows)],
        note="The last steps, the newest first.",
    )
