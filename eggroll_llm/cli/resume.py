"""`resume`: continue a run, or train on after its end."""

import argparse
from pathlib import Path

from eggroll_llm.cli.arguments import Settings
from eggroll_llm.cli.train import train_and_report
from eggroll_llm.config.compare import check_resume
from eggroll_llm.config.recipe import load_recipe
from eggroll_llm.records.run_dir import RunDir


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Continue a run by its own configuration, with changes to those settings that may change."""
    run = RunDir.open(options.run)
    config = load_recipe(run.config, settings)
    check_resume(load_recipe(run.config), config, saved_in=str(run.config))
    return train_and_report(options, config, run.path.resolve(), run.path, "resume")
