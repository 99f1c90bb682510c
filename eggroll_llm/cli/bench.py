"""`bench`: speed next to plain vLLM."""

import argparse
from pathlib import Path

from eggroll_llm.cli.arguments import Settings
from eggroll_llm.cli.shared import positive
from eggroll_llm.config.recipe import load_recipe
from eggroll_llm.errors import ConfigError
from eggroll_llm.system.files import check_output_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument("recipe", type=Path, metavar="RECIPE.toml")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--repeats", type=positive, default=3, metavar="N", help="measurements of each variant")
    parser.add_argument("--sequences", type=positive, default=128, metavar="N", help="decoded at once")
    parser.add_argument("--new-tokens", type=positive, default=64, metavar="N", help="tokens per sequence, at most")
    parser.add_argument("--variants", default="", metavar="TEXT", help="only variants with this in their name")


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Measure sampling and update speed."""
    from eggroll_llm.bench.run import Size, bench

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
