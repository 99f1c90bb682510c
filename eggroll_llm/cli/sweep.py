"""Several runs from one file: trials of a sweep, or methods and seeds to compare.

    seeds = [0, 1, 2]               # each trial with each; without it, with the seed of its recipe
    recipe = "../countdown_smollm2.toml"
    [settings]                      # of every trial, over its recipe
    minutes = 3.0
    [[trials]]
    name = "es-small-sigma"
    es = { sigma = 0.006 }          # over [settings]
    [[trials]]
    name = "grpo"
    recipe = "../countdown_smollm2_grpo.toml"

Runs execute one after the other, each in its own process, so each has the whole machine and a fresh engine; all trials
of a seed come before the next seed. A run that already finished with these settings is skipped, an interrupted one
resumes, and one that fails (say, because its learning rate makes training diverge) is reported and does not stop the
others. Paths in the file are relative to its folder, except `model`; paths in flags to the working directory.
"""

import argparse
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eggroll_llm.cli.arguments import GO_ON, Settings
from eggroll_llm.cli.compare import show_comparison
from eggroll_llm.config.compare import outcome_differences
from eggroll_llm.config.flags import flag_text
from eggroll_llm.config.parse import parse_table
from eggroll_llm.config.recipe import load_recipe
from eggroll_llm.config.toml import format_value, read_toml
from eggroll_llm.errors import ConfigError, RunDirError, UserError
from eggroll_llm.records.run_dir import RunDir
from eggroll_llm.records.weights import final_step
from eggroll_llm.system.files import describe_failure
from eggroll_llm.system.invocation import child_python
from eggroll_llm.system.terminal import inert
from eggroll_llm.tasks.paths import absolute_settings, absolute_value

REPORT = "comparison"
"""Folder of the report, beside those of the runs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepFile:
    """The contents of a sweep file."""

    trials: tuple[Mapping[str, Any], ...]
    """Name, settings and optionally recipe of each."""
    recipe: str = ""
    """Recipe of the trials, relative to the file."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of every trial."""
    seeds: tuple[int, ...] = ()
    """Seeds to run each trial with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """A run to train."""

    name: str
    """Of its directory."""
    recipe: Path
    flags: Settings
    """Dotted key and text of every setting over those of the recipe."""

    @property
    def shown(self) -> str:
        """Return the flags as a user would type them."""
        return " ".join(f"--{key} {text}" for key, text in self.flags)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument("sweep", type=Path, metavar="SWEEP.toml", help="TOML file with the trials")
    parser.add_argument("--out", type=Path, metavar="DIR", help="directory of the runs; default: runs/<sweep>")
    parser.add_argument("--dry-run", action="store_true", help="list the runs, train nothing")


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Train the runs of a file that are not finished yet, and compare all of them."""
    from eggroll_llm.cli.display import ConsoleDisplay

    planned = read_sweep(options.sweep, settings)
    if options.dry_run:
        for run in planned:
            print(inert(f"{run.name}: {run.recipe} {run.shown}", 4000))
        return 0
    out = options.out or Path("runs") / options.sweep.stem
    options.again = GO_ON
    display = ConsoleDisplay()
    finished = run_sweep(planned, out, display.message)
    if finished:
        show_comparison(finished, out / REPORT, display)
    return 0 if len(finished) == len(planned) else 1


def read_sweep(path: Path, overrides: Sequence[tuple[str, str]] = ()) -> list[Planned]:
    """Return the runs of a file in order, with `overrides` applied to each.

    Raises:
        ConfigError: the file, a recipe or a setting is wrong, or a name is missing or repeated.
    """
    table, origin = read_toml(path)
    sweep = parse_table(SweepFile, table, origin)
    more = [(key.removeprefix("--"), text) for key, text in absolute_settings(overrides)]
    if sweep.seeds and (given := dict(more).get("seed")):
        raise ConfigError(
            f"--seed {given}: {path} sets seeds = {format_value(sweep.seeds)}, all of which the flag would replace. "
            "Leave it out, or remove seeds from the file."
        )
    planned = [_plan(path, sweep, trial, seed, more) for seed in sweep.seeds or (None,) for trial in sweep.trials]
    names = [run.name for run in planned]
    if not names:
        raise ConfigError(f"{path}: trials is empty: add a table [[trials]] with a name and settings")
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(
            f'{path}: two runs would be named "{twice[0]}": give each trial its own name and list each seed once'
        )
    if REPORT in names:
        raise ConfigError(f'{path}: "{REPORT}" is the folder of the report: give the trial another name')
    return planned


def _plan(path: Path, sweep: SweepFile, trial: Mapping[str, Any], seed: int | None, more: Settings) -> Planned:
    own = dict(trial)
    name, recipe = own.pop("name", ""), own.pop("recipe", sweep.recipe)
    if not isinstance(name, str) or not _names_a_folder(name):
        raise ConfigError(
            f'{path}: a trial is named {name!r:.80}, which is not a folder name: write one such as "es-1"'
        )
    if not isinstance(recipe, str) or not recipe:
        raise ConfigError(f'{path}: trial "{name}" has no recipe: set recipe = "FILE.toml" for it or for all')
    seeds = [("seed", f"{seed}")] if seed is not None else []
    flags = [*_flags(sweep.settings, path.parent), *_flags(own, path.parent), *seeds, *more]
    where = path.parent / recipe
    try:
        load_recipe(where, flags)
    except ConfigError as error:
        raise ConfigError(f'{path}: trial "{name}": {error}') from error
    return Planned(name=name if seed is None else f"{name}-seed{seed}", recipe=where, flags=flags)


def _names_a_folder(name: str) -> bool:
    return bool(name) and name.isprintable() and name[0] != "." and not {*name} & {*"/\\"}


def _flags(settings: Mapping[str, Any], folder: Path, prefix: str = "") -> Settings:
    """Return settings of the file, which is in `folder`, as flags."""
    flags: Settings = []
    for name, value in settings.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            flags += _flags(value, folder, f"{key}.")
        else:
            flags.append((key, flag_text(key, absolute_value(key, value, folder))))
    return flags


def run_sweep(planned: Sequence[Planned], out: Path, show: Callable[[str], None]) -> list[Path]:
    """Train all runs in subfolders of `out`, and return those that finished."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirError(describe_failure(out, error, "the folder of the runs")) from error
    finished = []
    for i, run in enumerate(planned, start=1):
        directory, which = out / run.name, f"run {i} of {len(planned)}, {run.name}"
        if _is_finished(run, directory):
            show(f"{which}: already finished")
        else:
            show(f"{which}: {run.shown}")
            if (status := _train(run, directory)) != 0:
                how = f"failed with exit status {status}" if status > 0 else f"was killed by signal {-status}"
                show(f"{which}: {how}, see above")
                continue
        finished.append(directory)
    return finished


def _is_finished(run: Planned, directory: Path) -> bool:
    from eggroll_llm.training.prepare import settle

    try:
        found = RunDir.open(directory)
        metrics, saved = found.read_metrics(), load_recipe(found.config)
        asked = settle(load_recipe(run.recipe, run.flags), run.recipe.resolve().parent)
    except UserError:  # the run will say so itself
        return False
    ended = bool(metrics) and final_step(found) == metrics[-1].get("step", -1)
    return ended and not outcome_differences(saved, asked)


def _train(run: Planned, directory: Path) -> int:
    flags = [f"--{key}={text}" for key, text in run.flags]  # in one word, as a text may begin with dashes
    place = ["--run-dir", str(directory), "--on-existing", "resume"]
    command = [*child_python(), "-m", "eggroll_llm", "train", str(run.recipe), *place, *flags]
    with subprocess.Popen(command, preexec_fn=_leave_the_terminal_to_us) as process:
        try:
            return process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise


def _leave_the_terminal_to_us() -> None:
    """Ignore signals that the terminal sends to both: with ours the run would get two, and exit at once."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
