"""The command line: commands, messages and exit status. What a command takes and does is in the module it names."""

import argparse
import importlib
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn, TextIO

from eggroll_llm.cli.arguments import SETTINGS, check_no_rest, split
from eggroll_llm.config.compare import MAY_CHANGE
from eggroll_llm.errors import ConfigError, UserError
from eggroll_llm.system import installed, signals
from eggroll_llm.system.invocation import NAME, command, find_own_packages_first, leave_working_directory
from eggroll_llm.system.terminal import inert
from eggroll_llm.system.versions import package_versions

ENGINE = installed.ENGINE
PLOTS = ("jinja2", "matplotlib", "numpy")
EXIT_MISTAKE = 2
ERROR_CHARACTERS = 4000  # of a line


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status. A user's mistake is one line on standard error and status 2."""
    find_own_packages_first()
    _let_threads_sleep()
    _set_up_messages()
    options = argparse.Namespace(again="")
    try:
        with signals.handled():
            given = sys.argv[1:] if arguments is None else arguments
            parser, by_name = _parser(given)
            words, settings = split(given, parser, by_name)
            _, rest = parser.parse_known_args(words, options)
            check_no_rest(rest, options.setting_keys is not None)
            installed.check(options.name, *options.needs)
            status = int(options.command(options, settings))
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


def _complain(text: str) -> None:
    """Print to standard error; text of models, which a grader's traceback may hold, is inert."""
    try:
        print(*(inert(line, ERROR_CHARACTERS) for line in text.split("\n")), sep="\n", file=sys.stderr, flush=True)
    except BrokenPipeError:  # nobody reads it, and the status says it too
        from eggroll_llm.cli.display import give_up

        give_up(sys.stderr)


def _let_threads_sleep() -> None:
    """Let OpenMP's threads wait for each other awake for some 30 µs instead of 1 ms, at each of thousands of times.

    Where other work takes a core, the one that waits keeps the other from moving to its core. To be set before torch
    is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """One command; its module in this folder has `add_arguments(parser)` and `run(options, settings) -> status`."""

    module: str
    help: str
    needs: Sequence[str] = ()
    """Packages that must be installed."""
    keys: Callable[[], list[str]] | None = None
    """Lists the settings that can be given as flags."""
    epilog: str = "Any setting of a recipe can be given as --KEY VALUE, such as --es.sigma 0.003."


def _setting_keys() -> list[str]:
    from eggroll_llm.config.parse import all_keys
    from eggroll_llm.config.schema import RunConfig

    return list(all_keys(RunConfig))


def _eval_keys() -> list[str]:
    return [key for key in _setting_keys() if key.partition(".")[0] in ("task_options", "chat", "engine", "reward")]


def _bench_keys() -> list[str]:
    engine = {f"engine.{key}" for key in ("slots", "dtype", "threads", "offload_masters", "timeout_seconds")}
    wanted = {"model", "task", "es.sigma", "engine.allow_untested_architecture", *engine}
    return [key for key in _setting_keys() if key in wanted or key.partition(".")[0] in ("task_options", "chat")]


_BENCH_EPILOG = (
    "Settings that matter here are --KEY VALUE: --engine.dtype float32. Ranks and sizes are --ranks, --members."
)
_EVAL_EPILOG = "Settings of [task_options], [chat], [engine] and [reward] are --KEY VALUE: --engine.dtype float32."
COMMANDS: Mapping[str, Command] = {
    "init": Command(module="init", help="write a task or a recipe to start from"),
    "train": Command(module="train", help="train a model from a recipe", needs=ENGINE, keys=_setting_keys),
    "resume": Command(
        module="resume",
        help="continue a run, or train on after its end",
        needs=ENGINE,
        keys=_setting_keys,
        epilog=f"Settings that may change, as --KEY VALUE: {MAY_CHANGE}. --steps or --minutes extends a run beyond "
        "the limit at which it ended.",
    ),
    "eval": Command(
        module="evaluate",
        help="measure accuracy on a task's test split",
        needs=ENGINE,
        keys=_eval_keys,
        epilog=_EVAL_EPILOG,
    ),
    "replay": Command(module="replay", help="rebuild the weights of a step from a run's journal", needs=["torch"]),
    "tune": Command(
        module="tune", help="find sigma and learning rate of a recipe in minutes", needs=ENGINE, keys=_setting_keys
    ),
    "sweep": Command(
        module="sweep", help="train several runs from one file, and compare them", needs=ENGINE, keys=_setting_keys
    ),
    "compare": Command(module="compare", help="compare runs: accuracy, paired tests and plots", needs=PLOTS),
    "export": Command(
        module="export", help="write a model as a LoRA adapter or a GGUF file", needs=["torch", "safetensors"]
    ),
    "watch": Command(module="watch", help="show a run in the browser while it goes on", needs=PLOTS),
    "push": Command(module="push", help="upload a model to the Hugging Face hub"),
    "bench": Command(
        module="bench", help="speed next to plain vLLM", needs=ENGINE, keys=_bench_keys, epilog=_BENCH_EPILOG
    ),
    "doctor": Command(module="doctor", help="report what is installed, what will run here and what is wrong"),
}


def _parser(words: Sequence[str]) -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """Return the parser of all and that of each command; only the command that `words` begin with is imported."""
    parser = _Parser(
        prog=NAME,
        description="Fine-tune language models for math reasoning\nwith evolution strategies, by inference alone.",
        formatter_class=argparse.RawDescriptionHelpFormatter,  # does not wrap the command below
        epilog=f"Start with: {command('train', 'recipes/addition_smollm2.toml')}",
        allow_abbrev=False,
    )
    version = package_versions(NAME).get(NAME, "(not installed, used from a clone)")
    parser.add_argument("--version", action="version", version=f"{NAME} {version}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, one in COMMANDS.items():
        epilog = one.epilog if one.keys else None
        added = subparsers.add_parser(name, help=one.help, description=one.help, epilog=epilog, allow_abbrev=False)
        added.set_defaults(name=name, needs=one.needs, **{SETTINGS: one.keys})
        if words and words[0] == name:
            module = importlib.import_module(f"eggroll_llm.cli.{one.module}")
            module.add_arguments(added)
            added.set_defaults(command=module.run)
    return parser, subparsers.choices


class _Parser(argparse.ArgumentParser):
    """Complains in one line, as all our errors are."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see: {command(*self.prog.split()[1:], '--help')}")


if __name__ == "__main__":
    leave_working_directory()
    run()
