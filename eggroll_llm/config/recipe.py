"""The configuration of a run: recipe and flags, typed and checked.

`load_recipe` reads TOML, applies flags, parses and validates; nothing heavy is imported, so that every
mistake is found before a model is loaded. `to_toml` writes the resolved configuration into the run directory, from
which `load_recipe` reads it back unchanged.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eggroll_llm.config.compare import applies, of_its_method
from eggroll_llm.config.flags import apply_overrides, flags_by_key
from eggroll_llm.config.parse import parse_table
from eggroll_llm.config.rules import validate
from eggroll_llm.config.schema import RunConfig
from eggroll_llm.config.toml import Origin, Sourced, read_toml, write_toml


def load_recipe(path: Path | str, overrides: Sequence[tuple[str, str]] = ()) -> RunConfig:
    """Return the validated configuration of a recipe with flags, e.g. `("es.sigma", "0.003")`; the last one wins.

    Raises:
        ConfigError: anything wrong with the file, its keys and values, or the flags.
    """
    table, origin = read_toml(Path(path))
    table = apply_overrides(RunConfig, table, overrides)
    origin = dataclasses.replace(origin, flags=flags_by_key(overrides))
    config = parse_table(RunConfig, table, origin)
    validate(config, origin)
    config = dataclasses.replace(config, task_options=sourced(config.task_options, origin, overrides))
    return of_its_method(config)


def sourced(options: Mapping[str, Any], origin: Origin, overrides: Sequence[tuple[str, str]]) -> Sourced:
    """Return task options that know which were set in a file and which by a flag, such as --task_options.seed."""
    result = Sourced(options)
    parts = [flag.removeprefix("--").split(".") for flag, _ in overrides]
    result.origin = origin
    result.flags = frozenset(part[1] for part in parts if part[0].replace("-", "_") == "task_options")
    return result


def to_toml(config: RunConfig) -> str:
    """Return the resolved configuration as TOML, without other methods' tables; `load_recipe` reads back an equal one.

    One that was built in Python is read back `of_its_method`.
    """
    table = dataclasses.asdict(config)
    return write_toml({key: value for key, value in table.items() if applies(key, config)})
