"""`bench`: speed next to plain vLLM."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from eggroll_llm.cli.arguments import Settings, positive, positives
from eggroll_llm.config.flags import apply_overrides, flags_by_key, key_of
from eggroll_llm.config.parse import parse_table
from eggroll_llm.config.recipe import load_recipe
from eggroll_llm.config.rules import validate
from eggroll_llm.config.schema import RunConfig
from eggroll_llm.config.toml import Origin
from eggroll_llm.errors import ConfigError
from eggroll_llm.system.files import check_output_file
from eggroll_llm.tasks.paths import absolute_settings

if TYPE_CHECKING:
    from eggroll_llm.bench.subject import Subject

DEFAULTS = {"cpu": (128, 64), "cuda": (512, 128)}
"""Prompts, and new tokens of each."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument("recipe", type=Path, nargs="?", metavar="RECIPE.toml", help="whose model and prompts")
    parser.add_argument(
        "--random-weights",
        metavar="SHAPE",
        help="instead of a recipe: random weights and prompts of the shape of smollm2-135m, qwen2.5-0.5b, "
        "qwen2.5-1.5b, qwen2.5-7b, or of a model's directory or config.json",
    )
    parser.add_argument("--num-prompts", type=positive, metavar="N", help="decoded at once; default: 128, on a GPU 512")
    parser.add_argument("--input-len", type=positive, metavar="N", help="tokens of a random prompt; default: 128")
    parser.add_argument("--output-len", type=positive, metavar="N", help="new tokens, at most; default: 64, GPU: 128")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default) is greedy")
    parser.add_argument("--ranks", type=positives, default=[], metavar="R,R", help="measure populations of these ranks")
    parser.add_argument("--members", type=positives, default=[], metavar="M,M", help="... and of these sizes (64)")
    parser.add_argument("--variants", default="", metavar="TEXT", help="only variants with this in their name")
    parser.add_argument("--repeats", type=positive, default=3, metavar="N", help="measurements of each variant")
    parser.add_argument("--out", type=Path, metavar="FILE.json")


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Measure sampling and update speed."""
    from eggroll_llm.bench.plan import Size, check_shares, chosen_groups
    from eggroll_llm.bench.run import bench, device

    if not options.temperature >= 0:
        raise ConfigError(f"--temperature {options.temperature:g}: must be at least 0")
    prompts, new_tokens = DEFAULTS[device()]
    size = Size(
        num_prompts=options.num_prompts or prompts,
        output_len=options.output_len or new_tokens,
        temperature=options.temperature,
    )
    sizes_given = options.ranks or options.members
    if not sizes_given and any(key_of(flag) == "engine.slots" for flag, _ in settings):
        raise ConfigError(
            "--engine.slots is of --ranks and --members: the other variants have as many as their names say"
        )
    config = _config(options, absolute_settings(settings))
    groups = chosen_groups(device(), options.variants, options.ranks, options.members, config.engine.slots)
    for group in groups:
        check_shares(size, group)
    if options.out:
        check_output_file(options.out, "bench.json")
    with _subject(options, config, size.num_prompts) as subject:
        whole = bench(subject, size, groups, options.repeats, options.out)
    return 0 if whole else 1


def _config(options: argparse.Namespace, settings: Settings) -> RunConfig:
    """Return the recipe, or what flags alone say."""
    if (options.recipe is None) == (options.random_weights is None):
        raise ConfigError("name a recipe to measure, or give --random-weights SHAPE, but not both")
    if options.recipe is None:
        # Of no consequence for speed: what a recipe must have.
        if any(flag == "--model" for flag, _ in settings):
            raise ConfigError("--model is of a recipe: --random-weights takes the directory of a model, for its shape")
        if options.input_len == 1:
            raise ConfigError("--input-len 1: must be at least 2, as members score the second half of a prompt")
        needed = {"task": "countdown", "steps": 1, "es": {"sigma": 1e-3, "learning_rate": 1e-3}}
        origin = Origin(name="the flags", flags=flags_by_key(settings))
        config = parse_table(RunConfig, apply_overrides(RunConfig, needed, settings), origin)
        validate(config, origin)
        return config
    if options.input_len:
        raise ConfigError("--input-len is of --random-weights: a recipe has prompts of its own")
    config = load_recipe(options.recipe, settings)
    if config.method != "es":
        raise ConfigError(
            f'{options.recipe}: method = "{config.method}": only the populations of "es" are measured here'
        )
    if config.engine.quantization != "none" or config.engine.tensor_parallel != 1:
        raise ConfigError(
            f"{options.recipe}: engine.quantization and engine.tensor_parallel are not measured here, as plain vLLM "
            "beside it would run without: leave them out of a copy of the recipe"
        )
    return config


@contextmanager
def _subject(options: argparse.Namespace, config: RunConfig, num_prompts: int) -> Iterator["Subject"]:
    from eggroll_llm.bench.subject import of_recipe, of_shape

    if options.recipe:
        yield of_recipe(config, options.recipe.resolve().parent)
        return
    shape, length = options.random_weights, options.input_len or 128
    with of_shape(shape, config.engine, config.es.sigma, num_prompts, length) as subject:
        yield subject
