"""The command line: arguments, messages and exit status. What the commands do is in `commands`."""

import argparse
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn, TextIO

from eggroll_llm.cli import commands
from eggroll_llm.cli.arguments import SETTINGS, check_no_rest, split
from eggroll_llm.config.compare import MAY_CHANGE
from eggroll_llm.config.flags import whole_number
from eggroll_llm.errors import ConfigError, UserError
from eggroll_llm.system import installed, signals
from eggroll_llm.system.invocation import NAME, command, find_own_packages_first, leave_working_directory
from eggroll_llm.system.terminal import inert
from eggroll_llm.system.versions import package_versions

ENGINE = ("torch", "vllm")
PLOTS = ("matplotlib", "numpy")
EXIT_MISTAKE = 2
ERROR_CHARACTERS = 4000  # of a line


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status. A user's mistake is one line on standard error and status 2."""
    _open_standard_descriptors()
    find_own_packages_first()
    parser, by_name = _parser()
    _set_up_messages()
    options = argparse.Namespace(again="")
    try:
        with signals.handled():
            words, settings = split(sys.argv[1:] if arguments is None else arguments, parser, by_name)
            _, rest = parser.parse_known_args(words, options)
            check_no_rest(rest, options.setting_keys is not None)
            installed.check(options.name, *options.needs)
            status = int(options.command(options, settings))
            if sys.stdout is not None:
                sys.stdout.flush()
            return status
    except UserError as error:
        _complain(f"error: {error}")
        return EXIT_MISTAKE
    except ImportError as error:
        if not (failure := installed.import_failure(error)):
            raise
        _complain(f"error: {failure}")
        return EXIT_MISTAKE
    except KeyboardInterrupt as error:
        _complain(f"interrupted{options.again and f'; {options.again}'}")
        return error.status if isinstance(error, signals.Interrupted) else 128 + signal.SIGINT
    except BrokenPipeError:
        from eggroll_llm.cli.display import give_up

        give_up(sys.stdout)
        return 128 + signal.SIGPIPE


def run() -> NoReturn:
    """The command `eggroll-llm`. After a signal it waits for no threads of a user's task."""
    status = main()
    if status > 128:
        signals.leave(status)
    sys.exit(status)


def _open_standard_descriptors() -> None:
    """Put nothing where standard input, output or error are closed: files of the run would get their numbers.

    And with them whatever a library prints below Python.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def _complain(text: str) -> None:
    """Print to standard error; text of models, which a grader's traceback may hold, is inert."""
    try:
        print(*(inert(line, ERROR_CHARACTERS) for line in text.split("\n")), sep="\n", file=sys.stderr)
    except OSError:  # nobody reads it, and the status says it too
        from eggroll_llm.cli.display import give_up

        give_up(sys.stderr)


def _set_up_messages() -> None:
    """Show what we have to say, and not vLLM's remarks about how it starts: what stops it is an exception.

    Those of its C++ (where it has bound its memory) are torch's to print, which reads its level when it is imported.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.basicConfig(format="%(message)s", level=logging.WARNING, handlers=[_StandardError()])
    logging.getLogger("eggroll_llm").setLevel(logging.INFO)
    logging.getLogger("vllm").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="vllm")


class _StandardError(logging.StreamHandler[TextIO]):
    """Writes to standard error as it is at the time: a line that moves puts itself in its place."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def _parser() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """The parser of all, and that of each command by its name."""
    parser = _Parser(
        prog=NAME,
        description="Fine-tune language models for math reasoning\nwith evolution strategies at inference speed.",
        formatter_class=argparse.RawDescriptionHelpFormatter,  # does not wrap the command below
        epilog=f"Start with: {command('train', 'recipes/countdown_smollm2.toml')}",
        allow_abbrev=False,
    )
    version = package_versions(NAME).get(NAME, "(not installed, used from a clone)")
    parser.add_argument("--version", action="version", version=f"{NAME} {version}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    train = _command(
        subparsers, "train", commands.run_train, "train a model as a recipe says", needs=ENGINE, keys=_setting_keys
    )
    train.add_argument("recipe", type=Path, metavar="RECIPE.toml")
    train.add_argument("--run-dir", type=Path, metavar="DIR", help="default: runs/<recipe>-<time>")
    train.add_argument("--on-existing", choices=("fail", "resume", "overwrite"), default="fail")
    train.add_argument(
        "--dry-run", action="store_true", help="print the resolved settings and the budget, train nothing"
    )
    train.add_argument(
        "--settings", action=_ListSettings, nargs=0, help="list every setting that --KEY VALUE can change"
    )

    resume = _command(
        subparsers, "resume", commands.run_resume, "go on with a run, or train on after its end",
        needs=ENGINE, keys=_setting_keys,
        epilog=f"Settings that may change: {MAY_CHANGE}. Give them as --KEY VALUE; --steps or --minutes raises the "
        "limit at which a run has ended.",
    )  # fmt: skip
    resume.add_argument("run", type=Path, metavar="RUN")

    evaluate = _command(
        subparsers, "eval", commands.run_eval, "accuracy on a task's test split", needs=ENGINE, keys=_eval_keys
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

    replay = _command(
        subparsers, "replay", commands.run_replay, "rebuild the weights of a step from a run's journal", needs=["torch"]
    )
    replay.add_argument("run", type=Path, metavar="RUN")
    replay.add_argument("--step", type=_not_negative, metavar="N", help="default: the last")
    replay.add_argument("--out", type=Path, required=True, metavar="DIR", help="new directory for the model")

    sweep = _command(
        subparsers, "sweep", commands.run_sweep, "train several runs as a file says, and compare them",
        needs=ENGINE, keys=_setting_keys,
    )  # fmt: skip
    sweep.add_argument("sweep", type=Path, metavar="SWEEP.toml")
    sweep.add_argument("--out", type=Path, metavar="DIR", help="for the runs; default: runs/<sweep>")
    sweep.add_argument("--dry-run", action="store_true", help="list the runs, train nothing")

    compare = _command(
        subparsers, "compare", commands.run_compare, "accuracy of runs, paired tests and plots", needs=PLOTS
    )
    compare.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    compare.add_argument(
        "--out",
        type=Path,
        default=Path("comparison"),
        metavar="DIR",
        help="for report.html and figures; default: %(default)s",
    )

    push = _command(subparsers, "push", commands.run_push, "put a model on the Hugging Face hub")
    push.add_argument("model", type=Path, metavar="RUN_OR_DIR")
    push.add_argument("repo_id", metavar="OWNER/NAME")
    push.add_argument("--at", default="final", metavar="STEP", help="of a run: final (default), best, or a step")
    push.add_argument("--private", action="store_true", help="make the repository private")
    push.add_argument("--revision", metavar="BRANCH", help="default: main")
    push.add_argument("--dry-run", action="store_true", help="say what would be uploaded; uses no network")

    bench = _command(
        subparsers, "bench", commands.run_bench, "speed next to plain vLLM", needs=ENGINE, keys=_setting_keys
    )
    bench.add_argument("recipe", type=Path, metavar="RECIPE.toml")
    bench.add_argument("--out", type=Path, metavar="FILE.json")
    bench.add_argument("--repeats", type=_positive, default=3, metavar="N", help="measurements of each variant")
    bench.add_argument("--sequences", type=_positive, default=128, metavar="N", help="decoded at once")
    bench.add_argument("--new-tokens", type=_positive, default=64, metavar="N", help="tokens per sequence, at most")
    bench.add_argument("--variants", default="", metavar="TEXT", help="only variants with this in their name")

    _command(subparsers, "doctor", commands.run_doctor, "what is installed, what will run here, what is wrong")
    return parser, subparsers.choices


class _Parser(argparse.ArgumentParser):
    """Complains in one line, as all our errors are."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see: {command(*self.prog.split()[1:], '--help')}")


def _command(
    subparsers: "argparse._SubParsersAction[_Parser]",
    name: str,
    function: object,
    text: str,
    *,
    needs: Sequence[str] = (),
    keys: Callable[[], list[str]] | None = None,
    epilog: str = "Any setting of a recipe can be given as --KEY VALUE, such as --es.sigma 5e-4.",
) -> argparse.ArgumentParser:
    """Add a command, with the modules that it needs and the settings that it takes as flags."""
    parser = subparsers.add_parser(
        name, help=text, description=text, epilog=epilog if keys else None, allow_abbrev=False
    )
    parser.set_defaults(command=function, name=name, needs=needs, **{SETTINGS: keys})
    return parser


def _setting_keys() -> list[str]:
    from eggroll_llm.config.parse import all_keys
    from eggroll_llm.config.schema import RunConfig

    return list(all_keys(RunConfig))


def _eval_keys() -> list[str]:
    return [key for key in _setting_keys() if key.partition(".")[0] in ("task_options", "chat", "engine", "reward")]


class _ListSettings(argparse.Action):
    """Lists the settings and ends, like --help: no recipe is needed."""

    def __call__(self, parser: argparse.ArgumentParser, *rest: object) -> NoReturn:
        from eggroll_llm.config.help import field_help
        from eggroll_llm.config.schema import RunConfig

        for row in field_help(RunConfig):
            print(f"--{row.key} ({row.kind}{', default ' + row.default if row.default else ''})\n      {row.doc}")
        parser.exit()


def _ks(text: str) -> list[int]:
    return [_positive(k) for k in text.split(",")]


def _positive(text: str) -> int:
    return _whole(text, 1, "must be at least 1")


def _not_negative(text: str) -> int:
    return _whole(text, 0, "must not be negative")


def _whole(text: str, least: int, limit: str) -> int:
    value = whole_number(text)
    if value is None:
        raise argparse.ArgumentTypeError(f"{text}: not a whole number")
    if value < least:
        raise argparse.ArgumentTypeError(f"{text}: {limit}")
    return value


if __name__ == "__main__":
    leave_working_directory()
    run()
