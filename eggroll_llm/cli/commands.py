"""What each command does. With `cli` the only module that may import everything; each command does so when it runs.

A command gets the parsed arguments and the (key, text) pairs of settings, and returns the exit status.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eggroll_llm.errors import ConfigError, UserError
from eggroll_llm.system.invocation import command

if TYPE_CHECKING:
    from rich.table import Table

    from eggroll_llm.cli.display import ConsoleDisplay
    from eggroll_llm.config.schema import RunConfig
    from eggroll_llm.records.run_dir import OnExisting
    from eggroll_llm.training.harness import Display
    from eggroll_llm.training.session import Outcome

GO_ON = "the same command goes on where this one stopped"
"""Said of an interrupted one whose results are on disk."""


def run_train(options: argparse.Namespace, settings: list[tuple[str, str]]) -> int:
    """Train as a recipe and flags say."""
    from eggroll_llm.config.recipe import load_recipe, to_toml
    from eggroll_llm.tasks.load import PATH_OPTIONS

    # Paths in a recipe are relative to its folder, paths on the command line to where the user stands.
    path_flags = {f"--task_options.{key}" for keys in PATH_OPTIONS.values() for key in keys}
    settings = [
        (key, os.path.abspath(text) if text and f"--{key[2:].replace('-', '_')}" in path_flags else text)
        for key, text in settings
    ]
    settings = [(key, _absolute_task(text) if key == "--task" else text) for key, text in settings]
    config = load_recipe(options.recipe, settings)
    recipe_dir = options.recipe.resolve().parent

    from eggroll_llm.records.run_dir import default_run_dir

    if options.dry_run:
        from eggroll_llm.training.budget import budget
        from eggroll_llm.training.prepare import prepare
        from eggroll_llm.training.step_time import estimate_lines, measure

        prepared = prepare(config, recipe_dir)
        print(to_toml(prepared.config))
        notes = [*prepared.task.notes, *prepared.notes]
        for line in [*notes, *budget(prepared), *estimate_lines(prepared, measure(prepared))]:
            print(f"# {inert(line, 4000)}")
        return 0

    run_path = options.run_dir or default_run_dir(options.recipe, datetime.now())
    return _train(options, config, recipe_dir, run_path, options.on_existing)


def run_resume(options: argparse.Namespace, settings: list[tuple[str, str]]) -> int:
    """Go on with a run by its own configuration, with those of the settings changed that may change."""
    from eggroll_llm.config.compare import check_resume
    from eggroll_llm.config.recipe import load_recipe
    from eggroll_llm.records.run_dir import RunDir

    run = RunDir.open(options.run)
    config = load_recipe(run.config, settings)
    check_resume(load_recipe(run.config), config, saved_in=str(run.config))
    return _train(options, config, run.path.resolve(), run.path, "resume")


def _train(
    options: argparse.Namespace, config: "RunConfig", recipe_dir: Path, run_path: Path, on_existing: "OnExisting"
) -> int:
    from eggroll_llm.cli.display import ConsoleDisplay
    from eggroll_llm.records.run_dir import is_run_dir

    display = ConsoleDisplay()
    display.message(f"run directory: {run_path}")
    try:
        with display:
            display.working("loading task and model")
            from eggroll_llm.training.session import train

            outcome = train(config, recipe_dir, run_path, on_existing, display)
    except KeyboardInterrupt:
        if is_run_dir(run_path):
            options.again = f"go on with: {command('resume', run_path)}"
        raise
    display.table(_outcome_table(outcome))
    _report(run_path, display)
    display.message(f"model: {outcome.final} (loads in transformers and vLLM)")
    if longer := _twice_as_long(config):
        display.message(f"go on: {command('resume', run_path, *longer)}")
    display.message(f"test:  {command('eval', run_path)}")
    for finding in outcome.findings:  # last, and status 0: the files are whole, and scripts go by them
        display.message(f"{finding}")
    return 0


def _twice_as_long(config: "RunConfig") -> list[str]:
    """The flags with which a run that has reached its limits goes on; none where a schedule holds it to its steps."""
    from eggroll_llm.config.compare import is_scheduled

    if config.steps and is_scheduled(config):
        return []
    steps = ["--steps", f"{2 * config.steps}"] if config.steps else []
    return steps + (["--minutes", f"{2 * config.minutes:g}"] if config.minutes else [])


def _report(run_path: Path, display: "Display") -> None:
    """Write report.html. The run is finished: a report that fails is a warning."""
    try:
        from eval.report import write_run_report

        display.message(f"report: {write_run_report(run_path)}")
    except (UserError, ImportError, OSError) as error:
        display.message(f"no report was written: {error}")


def run_sweep(options: argparse.Namespace, settings: list[tuple[str, str]]) -> int:
    """Train the runs of a file, those that are not there yet, and compare all."""
    from eggroll_llm.cli.display import ConsoleDisplay
    from eggroll_llm.cli.sweep import read_sweep, run_sweep
    from eggroll_llm.system.terminal import inert

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
        _compare(finished, out / "comparison", display)
    return 0 if len(finished) == len(planned) else 1


def run_compare(options: argparse.Namespace, settings: list[tuple[str, str]]) -> int:
    """Print the comparison of runs and write its report."""
    from eggroll_llm.cli.display import ConsoleDisplay

    _compare(options.runs, options.out, ConsoleDisplay())
    return 0


def _compare(paths: Sequence[Path], out: Path, display: "ConsoleDisplay") -> None:
    from eval.compare import compare_runs
    from eval.runs import about, read_runs
    from eval.tables import tables

    runs = read_runs(paths)
    comparison = compare_runs(runs)
    for table in tables(comparison):
        display.table(table)
    for note in (*about(runs), *comparison.notes):
        display.message(note)

    from eval.report import write_comparison

    display.message(f"report: {write_comparison(runs, comparison, out)}")


def _outcome_table(outcome: "Outcome") -> "Table":
    from rich.table import Table

    from eggroll_llm.records.accuracy import accuracy_text, p_text, percent, points
    from eggroll_llm.records.diagnosis import p_value
    from eggroll_llm.records.weights import best_step
    from eggroll_llm.system.terminal import inert

    def shown(row: Mapping[str, Any]) -> str:
        return accuracy_text(row["eval/accuracy"], row["eval/problems"])

    def gain(row: Mapping[str, Any]) -> str:
        return f"{points(row['eval/accuracy'] - first['eval/accuracy'])} points"

    first, last = outcome.first, outcome.last
    table = Table(
        title=f"{outcome.steps} updates in {outcome.wall_time / 60:.1f} minutes of training",
        caption=f"before: the base model, {inert(outcome.base_model)}",
    )
    for column in ("", "before", "after", "change"):
        table.add_column(column, justify="right" if column else "left", no_wrap=bool(column))
    problems = f"accuracy on {last['eval/problems']} held-out problems"
    table.add_row(problems, shown(first), shown(last), f"{gain(last)}\n{p_text(p_value(first, last))}")
    if outcome.constant:
        label = f"the best constant answer to them: {outcome.constant.pattern}"
        table.add_row(label, "", percent(outcome.constant.accuracy), "")
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


def run_eval(options: argparse.Namespace, settings: list[tuple[str, str]]) -> int:
    """Evaluate a model or a run, print the table and write the files."""
    from eggroll_llm.cli.display import ConsoleDisplay
    from eval.evaluation import evaluate_subject, settings_for
    from eval.subject import find_subject
    from eval.summary import summarize, table, write_summary

    samples_file = _samples_file(options.out) if options.out else None
    if options.data_dir:
        settings = [*settings, ("task_options.data_dir", str(options.data_dir.resolve()))]
    how = settings_for(
        find_subject(options.model, options.at),
        settings,
        task=_absolute_task(options.task) if options.task else None,
        protocol=options.protocol,
        shots=options.num_fewshot,
        apply_chat_template=options.apply_chat_template,
        limit=options.limit,
        max_tokens=options.max_tokens,
        samples=options.samples,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
    )
    ks = [k for k in (options.k or [options.samples]) if k > 1]
    if max(ks, default=0) > options.samples:
        raise ConfigError(f"--k {max(ks)}: there are only {options.samples} completions per problem: raise --samples")
    options.again = GO_ON if options.out else ""
    with ConsoleDisplay() as display:
        results = evaluate_subject(
            how,
            Path.cwd(),
            samples_file,
            overwrite=options.on_existing == "overwrite",
            on_progress=lambda done, total: display.sampling("eval", done, total),
            say=display.message,
        )
    summary = summarize(results, ks)
    if options.out:
        write_summary(options.out, summary)
    print(table(summary))
    return 0


def _samples_file(out: Path) -> Path:
    """FILE.samples.jsonl beside FILE.json. Raises ConfigError for what cannot be a file."""
    from eggroll_llm.system.output_file import check_output_file

    check_output_file(out, "eval.json")
    return out.with_name(f"{out.name.removesuffix('.json')}.samples.jsonl")


def _absolute_task(task: str) -> str:
    """The user's own task by the place where the user stands: in a recipe it is relative to the recipe's folder."""
    path, separator, name = task.rpartition(":")
    return f"{os.path.abspath(path)}:{name}" if separator and path.endswith(".py") else task


def run_replay(options: argparse.Namespace, settings: list[tuple[str, str]]) -> int:
    """Rebuild the weights of a step."""
    from eggroll_llm.config.recipe import load_recipe
    from eggroll_llm.models.card import write_card
    from eggroll_llm.models.resolve import model_identity, resolve_model
    from eggroll_llm.records.journal import read_journal
    from eggroll_llm.records.run_dir import RunDir
    from eggroll_llm.records.weights import write_provenance
    from eggroll_llm.system.files import describe_failure, replace_directory

    run = RunDir.open(options.run)
    if options.out.exists():
        raise ConfigError(f"--out {options.out}: exists already: name a new directory")
    config = load_recipe(run.config)
    if config.method != "es":
        raise ConfigError(
            f'{run.path}: trained with method "{config.method}", and only the updates of "es" are in a journal: take '
            f"{run.final}, or a checkpoint from {run.checkpoints}"
        )
    step = len(read_journal(run.journal).entries) if options.step is None else options.step

    from eggroll_llm.training.replay import replay

    base = resolve_model(config.model)
    identity, metrics = model_identity(base), run.read_metrics()
    checksum = ""

    def write(directory: Path) -> None:
        nonlocal checksum
        checksum = replay(config, base, run.journal, step, directory)
        write_provenance(directory, step=step, base_model=identity)
        write_card(
            directory,
            config=config,
            base_model=identity,
            step=step,
            metrics=metrics,
            journal=run.journal,
            prompt=run.example_prompt(),
        )

    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        replace_directory(options.out, write)
    except OSError as error:
        raise ConfigError(f"--out {describe_failure(options.out, error, 'the model')}") from error
    print(f"step {step}: {options.out}, weights {checksum}")
    return 0


def run_push(options: argparse.Namespace, settings: list[tuple[str, str]]) -> int:
    """Say what would be uploaded, and upload it."""
    from eggroll_llm.models.push import plan_push, push

    plan = plan_push(options.model, options.repo_id, at=options.at, private=options.private, revision=options.revision)
    print(*plan.lines(), sep="\n")
    if not options.dry_run:
        print(push(plan))
    return 0


def run_bench(options: argparse.Namespace, settings: list[tuple[str, str]]) -> int:
    """Measure sampling and update speed."""
    from eggroll_llm.bench.run import Size, bench
    from eggroll_llm.config.recipe import load_recipe
    from eggroll_llm.system.output_file import check_output_file

    config, folder = load_recipe(options.recipe, settings), options.recipe.resolve().parent
    if config.method != "es":
        raise ConfigError(
            f'{options.recipe}: method = "{config.method}": only the populations of "es" are measured here'
        )
    if options.out:
        check_output_file(options.out, "bench.json")
    size = Size(sequences=options.sequences, new_tokens=options.new_tokens)
    bench(config, folder, size, options.repeats, options.out, options.variants)
    return 0


def run_doctor(options: argparse.Namespace, settings: list[tuple[str, str]]) -> int:
    """Say what is installed and what is wrong."""
    from eggroll_llm.cli.doctor import run

    return run()
