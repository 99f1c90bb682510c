"""The command line. The only module that may import everything; each command imports what it needs when it runs."""

import argparse
import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from eggroll_llm.errors import ConfigError, UserError

if TYPE_CHECKING:
    from rich.table import Table

    from eggroll_llm.session import Outcome
    from eggroll_llm.trainer import Display

EXIT_MISTAKE = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status. A user's mistake is one line on standard error and status 2."""
    parser = _parser()
    signal.signal(signal.SIGTERM, _terminate)
    _set_up_messages()
    try:
        options, rest = parser.parse_known_args(arguments)
        if rest and not options.takes_settings:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        return int(options.command(options, _settings(rest)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_MISTAKE
    except KeyboardInterrupt:
        print("interrupted; a run continues with --on-existing resume", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _set_up_messages() -> None:
    """Show what we have to say, and not vLLM's remarks about how it starts: what stops it is an exception."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("eggroll_llm").setLevel(logging.INFO)
    logging.getLogger("vllm").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="vllm")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="eggroll-llm",
        description="Fine-tune language models for math reasoning with evolution strategies at inference speed.",
        epilog="Start with: eggroll-llm train recipes/countdown_smollm2.toml",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    train = _command(commands, "train", _train, "train a model as a recipe says", takes_settings=True)
    train.add_argument("recipe", type=Path, metavar="RECIPE.toml")
    train.add_argument("--run-dir", type=Path, metavar="DIR", help="default: runs/<recipe>-<time>")
    train.add_argument("--on-existing", choices=("fail", "resume", "overwrite"), default="fail")
    train.add_argument(
        "--dry-run", action="store_true", help="print the resolved settings and the budget, train nothing"
    )
    train.add_argument(
        "--settings", action=_ListSettings, nargs=0, help="list every setting that --KEY VALUE can change"
    )

    evaluate = _command(
        commands, "eval", _eval, "accuracy of a model or a run on a task's test split", takes_settings=True
    )
    evaluate.add_argument("model", metavar="MODEL_OR_RUN", help="directory, hub id, embedded model, or run directory")
    evaluate.add_argument("--task", help="gsm8k, gsm8k_cot, countdown or file.py:NAME; default: the run's, as trained")
    evaluate.add_argument("--at", default="final", metavar="STEP", help="of a run: final (default), best, or a step")
    evaluate.add_argument(
        "--protocol",
        choices=("lm-eval", "task"),
        help="whose prompts: lm-evaluation-harness's (default for gsm8k, gsm8k_cot) or those of training",
    )
    evaluate.add_argument("--num-fewshot", type=_not_negative, metavar="N", help="worked examples in lm-eval's prompts")
    evaluate.add_argument(
        "--apply-chat-template", action="store_true", help="put lm-eval's prompts through the chat template"
    )
    evaluate.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="folder with the task's train.jsonl and test.jsonl"
    )
    evaluate.add_argument("--limit", type=_positive, default=0, metavar="N", help="only the first N problems")
    evaluate.add_argument("--max-tokens", type=_positive, default=0, metavar="N", help="length limit of an answer")
    evaluate.add_argument("--samples", type=_positive, default=1, metavar="N", help="completions per problem")
    evaluate.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default) is greedy")
    evaluate.add_argument("--top-p", type=float, default=1.0, metavar="P", help="nucleus of sampling")
    evaluate.add_argument("--seed", type=_not_negative, default=0, metavar="N", help="of sampling")
    evaluate.add_argument(
        "--k", type=_ks, metavar="K,K", help="k of pass@k and maj@k; default: the number of samples, if above 1"
    )
    evaluate.add_argument(
        "--out",
        type=Path,
        metavar="FILE.json",
        help="write the result, and every answer to FILE.samples.jsonl, from which an interrupted evaluation continues",
    )
    evaluate.add_argument("--on-existing", choices=("resume", "overwrite"), default="resume")

    replay = _command(commands, "replay", _replay, "rebuild the weights of a step from a run's journal")
    replay.add_argument("run", type=Path, metavar="RUN")
    replay.add_argument("--step", type=_not_negative, metavar="N", help="default: the last")
    replay.add_argument("--out", type=Path, required=True, metavar="DIR", help="new directory for the model")

    compare = _command(commands, "compare", _compare, "accuracy of runs, paired tests, equal budgets and plots")
    compare.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    compare.add_argument(
        "--out",
        type=Path,
        default=Path("comparison"),
        metavar="DIR",
        help="for report.html and figures; default: %(default)s",
    )

    push = _command(commands, "push", _push, "put a run's model, or a model directory, on the Hugging Face hub")
    push.add_argument("model", type=Path, metavar="RUN_OR_DIR")
    push.add_argument("repo_id", metavar="OWNER/NAME")
    push.add_argument("--at", default="final", metavar="STEP", help="of a run: final (default), best, or a step")
    push.add_argument("--private", action="store_true", help="make the repository private")
    push.add_argument("--revision", metavar="BRANCH", help="default: main")
    push.add_argument("--dry-run", action="store_true", help="say what would be uploaded; uses no network")

    bench = _command(commands, "bench", _bench, "sampling and update speed next to plain vLLM", takes_settings=True)
    bench.add_argument("recipe", type=Path, metavar="RECIPE.toml")
    bench.add_argument("--out", type=Path, metavar="FILE.json")
    bench.add_argument("--repeats", type=_positive, default=3, metavar="N", help="measurements of each variant")
    bench.add_argument("--variants", default="", metavar="TEXT", help="only variants with this in their name")

    _command(commands, "doctor", _doctor, "what is installed, what will run here, what is wrong")
    return parser


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    function: object,
    text: str,
    *,
    takes_settings: bool = False,
) -> argparse.ArgumentParser:
    epilog = "Any setting of a recipe can be given as --KEY VALUE, such as --es.sigma 5e-4." if takes_settings else None
    command = commands.add_parser(name, help=text, description=text, epilog=epilog, allow_abbrev=False)
    command.set_defaults(command=function, takes_settings=takes_settings)
    return command


class _ListSettings(argparse.Action):
    """Lists the settings and ends, like --help: no recipe is needed."""

    def __call__(self, parser: argparse.ArgumentParser, *rest: object) -> NoReturn:
        from eggroll_llm.config import RunConfig, field_help

        for row in field_help(RunConfig):
            print(f"--{row.key} ({row.kind}{', default ' + row.default if row.default else ''})\n      {row.doc}")
        parser.exit()


def _settings(rest: Sequence[str]) -> list[tuple[str, str]]:
    """Return the (key, text) pairs of `--key value` and `--key=value`."""
    pairs: list[tuple[str, str]] = []
    words = iter(rest)
    for word in words:
        key, equals, text = word.partition("=")
        if not key.startswith("--") or len(key) == 2:
            raise ConfigError(f"{word!r} is neither a flag nor the value of one; settings are --KEY VALUE")
        value = text if equals else next(words, None)
        if value is None:
            raise ConfigError(f"{key} has no value; write {key} VALUE")
        pairs.append((key, value))
    return pairs


def _train(options: argparse.Namespace, settings: list[tuple[str, str]]) -> int:
    from eggroll_llm.config import load_recipe, to_toml
    from eggroll_llm.tasks import PATH_OPTIONS

    # Paths in a recipe are relative to its folder, paths on the command line to where the user stands.
    path_flags = {f"--task_options.{key}" for keys in PATH_OPTIONS.values() for key in keys}
    settings = [
        (key, os.path.abspath(text) if text and f"--{key[2:].replace('-', '_')}" in path_flags else text)
        for key, text in settings
    ]
    config = load_recipe(options.recipe, settings)
    recipe_dir = options.recipe.resolve().parent

    from eggroll_llm.run_dir import default_run_dir
    from eggroll_llm.session import prepare, train

    if options.dry_run:
        from eggroll_llm.budget import budget

        prepared = prepare(config, recipe_dir)
        print(to_toml(prepared.config))
        for line in budget(prepared):
            print(f"# {line}")
        return 0

    from eggroll_llm.display import ConsoleDisplay

    run_path = options.run_dir or default_run_dir(options.recipe, datetime.now())
    display = ConsoleDisplay()
    display.message(f"run directory: {run_path}")
    outcome = train(config, recipe_dir, run_path, options.on_existing, display)
    display.table(_outcome_table(outcome))
    _report(run_path, display)
    display.message(f"model: {outcome.final} (loads in transformers and vLLM)")
    display.message(
        f"go on: eggroll-llm train {run_path}/config.toml --run-dir {run_path} --on-existing resume "
        "--minutes 0 --steps N"
    )
    display.message(f"test:  eggroll-llm eval {run_path}")
    return 0


def _report(run_path: Path, display: "Display") -> None:
    """Write report.html. The run is finished: a report that fails is a warning."""
    try:
        from eval.report import write_run_report

        display.message(f"report: {write_run_report(run_path)}")
    except (UserError, ImportError, OSError) as error:
        display.message(f"no report was written: {error}")


def _compare(options: argparse.Namespace, settings: list[tuple[str, str]]) -> int:
    from eggroll_llm.display import ConsoleDisplay
    from eval.compare import compare
    from eval.tables import tables

    comparison = compare(options.runs)
    display = ConsoleDisplay()
    for table in tables(comparison):
        display.table(table)
    for note in comparison.notes:
        display.message(note)

    from eval.report import write_comparison

    display.message(f"report: {write_comparison(options.runs, options.out)}")
    return 0


def _outcome_table(outcome: "Outcome") -> "Table":
    from rich.table import Table

    first, last = outcome.first, outcome.last
    table = Table(title=f"{outcome.steps} updates in {outcome.wall_time / 60:.1f} minutes of training")
    for column in ("", "before", "after", "change"):
        table.add_column(column, justify="left" if not column else "right")
    gain = last["eval/accuracy"] - first["eval/accuracy"]
    table.add_row(
        f"accuracy on {last['eval/problems']} held-out problems",
        f"{first['eval/accuracy']:.3f} ± {first['eval/stderr']:.3f}",
        f"{last['eval/accuracy']:.3f} ± {last['eval/stderr']:.3f}",
        f"{gain:+.3f}",
    )
    steps = [row for row in outcome.metrics if "time/sample" in row]
    if steps:
        tokens = sum(row["tokens/prompt"] + row["tokens/generated"] for row in steps)
        seconds = sum(row["time/sample"] for row in steps)
        overhead = sum(row["time/noise"] + row["time/update"] + row["time/serve"] for row in steps)
        table.add_row("tokens/s while sampling (prompt + generated)", "", f"{tokens / seconds:,.0f}", "")
        table.add_row(
            "noise, update and repacking, share of a step",
            "",
            f"{overhead / sum(r['time/step'] for r in steps):.1%}",
            "",
        )
    return table


def _eval(options: argparse.Namespace, settings: list[tuple[str, str]]) -> int:
    from eggroll_llm.display import ConsoleDisplay
    from eval.evaluation import evaluate_subject, settings_for
    from eval.subject import find_subject
    from eval.summary import summarize, table, write_summary

    if options.out and not options.out.parent.is_dir():  # found out now, not after an hour of evaluation
        raise ConfigError(f"--out {options.out}: there is no folder {options.out.parent}: create it")
    if options.data_dir:
        settings = [*settings, ("task_options.data_dir", str(options.data_dir.resolve()))]
    how = settings_for(
        find_subject(options.model, options.at),
        settings,
        task=options.task,
        protocol=options.protocol,
        shots=options.num_fewshot,
        chat=options.apply_chat_template,
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
    display = ConsoleDisplay()
    results = evaluate_subject(
        how,
        Path.cwd(),
        options.out.with_suffix(".samples.jsonl") if options.out else None,
        overwrite=options.on_existing == "overwrite",
        on_progress=lambda done, total: display.sampling("eval", done, total),
    )
    summary = summarize(results, ks)
    if options.out:
        write_summary(options.out, summary)
    print(table(summary))
    return 0


def _replay(options: argparse.Namespace, settings: list[tuple[str, str]]) -> int:
    from eggroll_llm.card import write_card
    from eggroll_llm.config import load_recipe
    from eggroll_llm.journal import read_journal
    from eggroll_llm.models import model_identity, resolve_model
    from eggroll_llm.run_dir import RunDir

    run = RunDir.open(options.run)
    if options.out.exists():
        raise ConfigError(f"--out {options.out}: exists already: name a new directory")
    config = load_recipe(run.config)
    step = len(read_journal(run.journal).entries) if options.step is None else options.step

    from eggroll_llm.replay import replay

    base = resolve_model(config.model)
    checksum = replay(config, base, run.journal, step, options.out)
    write_card(
        options.out,
        config=config,
        base_model=model_identity(base),
        step=step,
        metrics=run.read_metrics(),
        journal=run.journal,
    )
    print(f"step {step}: {options.out}, weights {checksum}")
    return 0


def _push(options: argparse.Namespace, settings: list[tuple[str, str]]) -> int:
    from eggroll_llm.push import plan_push, push

    plan = plan_push(options.model, options.repo_id, at=options.at, private=options.private, revision=options.revision)
    print(*plan.lines(), sep="\n")
    if not options.dry_run:
        print(push(plan))
    return 0


def _bench(options: argparse.Namespace, settings: list[tuple[str, str]]) -> int:
    from eggroll_llm.bench import bench
    from eggroll_llm.config import load_recipe

    config, folder = load_recipe(options.recipe, settings), options.recipe.resolve().parent
    bench(config, folder, options.repeats, options.out, options.variants)
    return 0


def _doctor(options: argparse.Namespace, settings: list[tuple[str, str]]) -> int:
    from eggroll_llm.doctor import run

    return run()


def _ks(text: str) -> list[int]:
    return [_positive(k) for k in text.split(",")]


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return value


def _not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text}: must not be negative")
    return value


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
