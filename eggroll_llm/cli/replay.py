"""`replay`: rebuild the weights of a step from a run's journal."""

import argparse
from pathlib import Path

from eggroll_llm.cli.arguments import Settings, not_negative
from eggroll_llm.config.recipe import load_recipe
from eggroll_llm.errors import ConfigError
from eggroll_llm.models.card import describe
from eggroll_llm.models.files import model_identity
from eggroll_llm.models.resolve import resolve_model
from eggroll_llm.records.journal import read_journal
from eggroll_llm.records.run_dir import RunDir
from eggroll_llm.system.files import describe_failure, replace_directory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("--step", type=not_negative, metavar="N", help="step to rebuild; default: the last")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new directory for the model")


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Rebuild the weights of a step."""
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
        describe(directory, run, config, base_model=identity, step=step, metrics=metrics)

    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        replace_directory(options.out, write)
    except OSError as error:
        raise ConfigError(f"--out {describe_failure(options.out, error, 'the model')}") from error
    print(f"step {step}: {options.out}, weights {checksum}")
    return 0
