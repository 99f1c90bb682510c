"""`tune`: find sigma and learning rate for a recipe before it is trained."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from eggroll_llm.cli.arguments import Settings
from eggroll_llm.config.recipe import load_recipe
from eggroll_llm.config.toml import read_toml
from eggroll_llm.tasks.paths import absolute_settings

if TYPE_CHECKING:
    from eggroll_llm.tuning.tune import Tuned

STAND_INS = {"sigma": "1e-3", "learning_rate": "1e-4"}
"""What a recipe may leave out here, with values that make it valid and that nothing depends on."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument("recipe", type=Path, metavar="RECIPE.toml", help="a recipe; it may lack the two settings")


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Measure what random members do, and print the settings that follow."""
    from eggroll_llm.cli.display import ConsoleDisplay

    table = read_toml(options.recipe)[0].get("es")
    given = table if isinstance(table, dict) else {}
    missing = [(f"--es.{key}", text) for key, text in STAND_INS.items() if key not in given]
    config = load_recipe(options.recipe, [*missing, *absolute_settings(settings)])
    with ConsoleDisplay() as display:
        display.working("loading task and model")
        from eggroll_llm.es.sizes import PATH
        from eggroll_llm.tuning.tune import tune

        tuned = tune(config, options.recipe.resolve().parent, display.working)
    display.table(_table(tuned, PATH[config.es.fitness_from]))
    sigma, rate = f"{tuned.sigma:.2g}", f"{tuned.learning_rate:.2g}"
    print(f"[es]\nsigma = {sigma}\nlearning_rate = {rate}       # of {config.steps} steps\n")
    print(f"--es.sigma {sigma} --es.learning_rate {rate}")
    return 0


def _table(tuned: "Tuned", path: float) -> Table:
    table = Table(title=f"divergence from the weights on {tuned.answers} answers of theirs, {tuned.tokens} tokens")
    for column in ("random changes", "size (RMS)", "nats a token", "by floor + a s²"):
        table.add_column(column, justify="left" if column == "random changes" else "right", no_wrap=True)

    def predicted(size: float) -> str:
        return f"{tuned.law.divergence(size):.2g}"

    for one in tuned.measured:
        table.add_row("members", f"{one.sigma:.2g}", f"{one.divergence:.2g}", predicted(one.sigma))
    table.add_row("members, chosen", f"{tuned.sigma:.2g}", "", predicted(tuned.sigma))
    noise = path * tuned.sigma
    table.add_row("noise of all updates, chosen", f"{noise:.2g}", "", predicted(noise))
    return table
