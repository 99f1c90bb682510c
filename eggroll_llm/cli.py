"""The command line: arguments, messages and exit status. What the commands do is in `commands`."""

import argparse
import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, TextIO

from eggroll_llm import commands, interruption
from eggroll_llm.errors import ConfigError, UserError
from eggroll_llm.inert import inert

EXIT_MISTAKE = 2
ERROR_CHARACTERS = 4000  # of a line
INTERRUPTED = (
    "interrupted; a run continues with --on-existing resume, a sweep or an evaluation that has --out with the same "
    "command"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status. A user's mistake is one line on standard error and status 2."""
    _open_standard_descriptors()
    parser = _parser()
    _set_up_messages()
    try:
        with interruption.handled():
            options, rest = parser.parse_known_args(arguments)
            if rest and not options.takes_settings:
                parser.error(f"unrecognized arguments: {' '.join(rest)}")
            status = int(options.command(options, _settings(rest)))
            if sys.stdout is not None:
                sys.stdout.flush()
            return status
    except UserError as error:
        _complain(f"error: {error}")
        return EXIT_MISTAKE
    except KeyboardInterrupt as error:
        _complain(INTERRUPTED)
        return error.status if isinstance(error, interruption.Interrupted) else 128 + signal.SIGINT
    except BrokenPipeError:
        from eggroll_llm.display import give_up

        give_up(sys.stdout)
        return 128 + signal.SIGPIPE


def run() -> NoReturn:
    """The command `eggroll-llm`. After a signal it waits for no threads of a user's task."""
    status = main()
    if status > 128:
        interruption.leave(status)
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
    from eggroll_llm.display import give_up

    try:
        print(*(inert(line, ERROR_CHARACTERS) for line in text.split("\n")), sep="\n", file=sys.stderr)
    except OSError:  # nobody reads it, and the status says it too
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="eggroll-llm",
        description="Fine-tune language models for math reasoning with evolution strategies at inference speed.",
        epilog="Start with: eggroll-llm train recipes/countdown_smollm2.toml",
        allow_abbrev=False,
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    train = _command(subparsers, "train", commands.run_train, "train a model as a recipe says", takes_settings=True)
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
        subparsers,
        "eval",
        commands.run_eval,
        "accuracy on a task's test split",
        takes_settings=True,
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

    replay = _command(subparsers, "replay", commands.run_replay, "rebuild the weights of a step from a run's journal")
    replay.add_argument("run", type=Path, metavar="RUN")
    replay.add_argument("--step", type=_not_negative, metavar="N", help="default: the last")
    replay.add_argument("--out", type=Path, required=True, metavar="DIR", help="new directory for the model")

    sweep = _command(
        subparsers,
        "sweep",
        commands.run_sweep,
        "train several runs as a file says, and compare them",
        takes_settings=True,
    )
    sweep.add_argument("sweep", type=Path, metavar="SWEEP.toml")
    sweep.add_argument("--out", type=Path, metavar="DIR", help="for the runs; default: runs/<sweep>")
    sweep.add_argument("--dry-run", action="store_true", help="list the runs, train nothing")

    compare = _command(subparsers, "compare", commands.run_compare, "accuracy of runs, paired tests and plots")
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

    bench = _command(subparsers, "bench", commands.run_bench, "speed next to plain vLLM", takes_settings=True)
    bench.add_argument("recipe", type=Path, metavar="RECIPE.toml")
    bench.add_argument("--out", type=Path, metavar="FILE.json")
    bench.add_argument("--repeats", type=_positive, default=3, metavar="N", help="measurements of each variant")
    bench.add_argument("--sequences", type=_positive, default=128, metavar="N", help="decoded at once")
    bench.add_argument("--new-tokens", type=_positive, default=64, metavar="N", help="tokens per sequence, at most")
    bench.add_argument("--variants", default="", metavar="TEXT", help="only variants with this in their name")

    _command(subparsers, "doctor", commands.run_doctor, "what is installed, what will run here, what is wrong")
    return parser


def _command(
    subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    function: object,
    text: str,
    *,
    takes_settings: bool = False,
) -> argparse.ArgumentParser:
    epilog = "Any setting of a recipe can be given as --KEY VALUE, such as --es.sigma 5e-4." if takes_settings else None
    command = subparsers.add_parser(name, help=text, description=text, epilog=epilog, allow_abbrev=False)
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


if __name__ == "__main__":
    run()
