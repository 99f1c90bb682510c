"""`train`: train a model from a recipe. `resume` shares the second half.

Torch and the engine are imported when a command runs: `--help` needs neither.
"""

import argparse
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich.table import Table
from rich.text import Text

from eggroll_llm.cli.arguments import Settings
from eggroll_llm.config.compare import is_scheduled
from eggroll_llm.config.help import field_help
from eggroll_llm.config.recipe import load_recipe, to_toml
from eggroll_llm.config.schema import RunConfig
from eggroll_llm.errors import UserError
from eggroll_llm.records.accuracy import accuracy_text, p_text, points
from eggroll_llm.records.checkpoint import list_checkpoints
from eggroll_llm.records.diagnosis import RECENT, p_value
from eggroll_llm.records.figures import figures
from eggroll_llm.records.run_dir import OnExisting, RunDir, default_run_dir, is_run_dir
from eggroll_llm.records.weights import best_step
from eggroll_llm.system.invocation import command
from eggroll_llm.system.terminal import inert
from eggroll_llm.tasks.paths import absolute_settings

if TYPE_CHECKING:
    from eggroll_llm.training.harness import Display
    from eggroll_llm.training.session import Outcome


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument("recipe", type=Path, metavar="RECIPE.toml", help="TOML file with the settings")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="run directory; default: runs/<recipe>-<time>")
    parser.add_argument(
        "--on-existing",
        choices=("fail", "resume", "overwrite"),
        default="fail",
        help="what to do about an existing run; default: %(default)s",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print settings, budget and a time estimate, train nothing",
    )
    parser.add_argument(
        "--settings", action=_ListSettings, nargs=0, help="list every setting that --KEY VALUE can change"
    )


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Train from a recipe and flags."""
    config = load_recipe(options.recipe, absolute_settings(settings))
    recipe_dir = options.recipe.resolve().parent

    if options.dry_run:
        from eggroll_llm.training.budget import budget, check_memory
        from eggroll_llm.training.prepare import prepare
        from eggroll_llm.training.step_time import estimate_lines, measure

        prepared = prepare(config, recipe_dir)
        print(to_toml(prepared.config))
        _print_comments([*prepared.task.notes, *prepared.notes, *budget(prepared)])
        check_memory(prepared)
        _print_comments(estimate_lines(prepared, measure(prepared)))
        return 0

    run_path = options.run_dir or default_run_dir(options.recipe, datetime.now())
    return train_and_report(options, config, recipe_dir, run_path, options.on_existing)


def _print_comments(lines: Iterable[str]) -> None:
    for line in lines:
        print(f"# {inert(line, 4000)}")


def train_and_report(
    options: argparse.Namespace, config: RunConfig, recipe_dir: Path, run_path: Path, on_existing: OnExisting
) -> int:
    """Train in a run directory, print the outcome and write the report."""
    from eggroll_llm.cli.display import ConsoleDisplay

    display = ConsoleDisplay()
    display.message(f"run directory: {run_path}")
    try:
        with display:
            display.working("loading task and model")
            from eggroll_llm.training.session import train

            outcome = train(config, recipe_dir, run_path, on_existing, display)
    except KeyboardInterrupt:
        if is_run_dir(run_path):
            lost = config.method == "grpo" and not list_checkpoints(RunDir(run_path).checkpoints)
            starts_over = "there is no checkpoint yet, so the run starts over; " if lost else ""
            options.again = f"{starts_over}resume with: {command('resume', run_path)}"
        raise
    display.table(_outcome_table(outcome))
    if seen := figures(config, outcome.metrics):
        display.table(_figures_table(seen))
    _report(run_path, display)
    display.message(f"model: {outcome.final} (loads in transformers and vLLM)")
    if longer := _twice_as_long(config, outcome.steps):
        display.message(f"continue: {command('resume', run_path, *longer)}")
    display.message(f"test: {command('eval', run_path)}")
    for finding in outcome.findings:  # last, and status 0: the files are whole, and scripts go by them
        display.message(f"{finding}")
    return 0


def _twice_as_long(config: RunConfig, reached: int) -> list[str]:
    """Return the flags that continue a run beyond its limits; none where a schedule fixes its number of steps."""
    if config.steps and is_scheduled(config):
        return []
    steps = ["--steps", f"{2 * max(config.steps, reached)}"] if config.steps else []
    return steps + (["--minutes", f"{2 * config.minutes:g}"] if config.minutes else [])


def _report(run_path: Path, display: "Display") -> None:
    """Write report.html. The run is finished: a report that fails is a warning."""
    try:
        from eval.report import write_run_report

        display.message(f"report: {write_run_report(run_path)}")
    except (UserError, ImportError, OSError) as error:
        display.message(f"no report was written: {error}")


def _figures_table(seen: Mapping[str, str]) -> Table:
    table = Table(title=f"what there was to learn from, in the last {RECENT} steps", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, figure in seen.items():
        table.add_row(name, figure)
    return table


def _outcome_table(outcome: "Outcome") -> Table:
    def shown(row: Mapping[str, Any]) -> str:
        return accuracy_text(row["eval/accuracy"], row["eval/problems"])

    def gain(row: Mapping[str, Any]) -> str:
        return f"{points(row['eval/accuracy'] - first['eval/accuracy'])} points"

    first, last = outcome.first, outcome.last
    caption = f"before: the base model, {inert(outcome.base_model)}"
    evaluated = "after"
    if last["step"] < outcome.steps:  # it was resumed to end at once
        evaluated = f"after step {last['step']}"
        caption += "\nfinal/ was not evaluated"
    table = Table(title=f"{outcome.steps} updates in {outcome.wall_time / 60:.1f} minutes of training", caption=caption)
    for column in ("", "before", evaluated, "change"):
        table.add_column(column, justify="right" if column else "left", no_wrap=bool(column))
    problems = f"accuracy on {last['eval/problems']} held-out problems"
    table.add_row(problems, shown(first), shown(last), f"{gain(last)}\n{p_text(p_value(first, last))}")
    for kind, (before, after) in outcome.kinds.items():
        shares = (accuracy_text(share.accuracy, share.problems) for share in (before, after))
        label = Text(f"  {inert(kind, 40)} ({after.problems})")
        table.add_row(label, *shares, f"{points(after.accuracy - before.accuracy)} points")
    if constant := outcome.constant:
        label = Text(f"the best constant answer: {constant.pattern}")
        table.add_row(label, "", accuracy_text(constant.accuracy, constant.problems), "")
    best = best_step(outcome.metrics)
    if best and best["step"] and best["eval/accuracy"] > last["eval/accuracy"]:
        table.add_row(
            f"best of the evaluations, after step {best['step']} (optimistic)",
            "",
            shown(best),
            gain(best),
        )
    steps = [row for row in outcome.metrics if "time/sample" in row]
    if steps:
        tokens = sum(row["tokens/prompt"] + row["tokens/generated"] for row in steps)
        seconds = sum(row["time/sample"] for row in steps)
        overhead = sum(row.get(f"time/{part}", 0.0) for row in steps for part in ("noise", "update", "serve"))
        table.add_row("tokens/s while sampling (prompt + generated)", "", f"{tokens / seconds:,.0f}", "")
        table.add_row(
            f"{'noise, update and repacking' if 'time/noise' in steps[0] else 'update and serving'}, share of a step",
            "",
            f"{overhead / sum(r['time/step'] for r in steps):.1%}",
            "",
        )
    return table


class _ListSettings(argparse.Action):
    """List the settings and exit, as --help does; no recipe is needed."""

    def __call__(self, parser: argparse.ArgumentParser, *rest: object) -> NoReturn:
        for row in field_help(RunConfig):
            print(f"--{row.key} ({row.kind}{', default ' + row.default if row.default else ''})\n      {row.doc}")
        parser.exit()
