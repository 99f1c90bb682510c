"""What holds of recipes, flags and sweeps whatever is written in them. A check takes bytes and a folder of its own."""

import json
import shutil
import tomllib
from pathlib import Path
from typing import Any

from fuzz_common import DEEP, SECONDS, refused
from fuzz_graders import as_text, in_time

from eggroll_llm.cli.sweep import read_sweep
from eggroll_llm.config.compare import differences, frozen_hash
from eggroll_llm.config.recipe import load_recipe, to_toml
from eggroll_llm.config.schema import RunConfig
from eggroll_llm.config.toml import key_line, read_toml, write_toml
from eggroll_llm.errors import ConfigError
from eggroll_llm.system.terminal import inert

RECIPES = Path(__file__).parents[2] / "recipes"


def check_recipe(data: bytes, folder: Path) -> None:
    """A recipe: read, written and read again it is the same."""
    path = folder / "recipe.toml"
    path.write_bytes(data)
    read = refused(lambda: read_toml(path), ConfigError)
    config = refused(lambda: in_time(lambda: load_recipe(path), SECONDS), ConfigError)
    if read is not None:
        table, origin = read
        lines = origin.text.count("\n") + 1
        assert all(0 <= key_line(origin.text, key) <= lines for key in (*table, "es.sigma"))
        assert canonical(tomllib.loads(write_toml(table))) == canonical(table)
    if config is not None:
        assert read is not None
        _check_config(config, folder)


def canonical(value: Any) -> str:
    """Tells 1 from 1.0 and true, and NaN from nothing; the order of keys does not matter."""
    return json.dumps(value, sort_keys=True, default=repr)


def _check_config(config: RunConfig, folder: Path) -> None:
    path = folder / "written.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert all(line.isprintable() for line in to_toml(config).split("\n"))
    again = load_recipe(path)
    assert differences(config, again) == []
    assert frozen_hash(again) == frozen_hash(config)


def check_flags(data: bytes, folder: Path) -> None:
    """Flags over the recipe of the demo, `key=value` in each line."""
    flags = [(key, text) for key, _, text in (line.partition("=") for line in as_text(data).split("\n"))]
    recipe = RECIPES / "countdown_smollm2.toml"
    config = refused(lambda: in_time(lambda: load_recipe(recipe, flags), SECONDS), ConfigError)
    if config is not None:
        _check_config(config, folder)


def check_sweep(data: bytes, folder: Path) -> None:
    """A sweep of recipes that are there; every run that it plans can be loaded and has a name of its own."""
    (folder / "recipes").mkdir(exist_ok=True)
    for recipe in ("countdown_smollm2", "countdown_smollm2_grpo"):
        if not (folder / f"{recipe}.toml").exists():
            shutil.copy(RECIPES / f"{recipe}.toml", folder)
    path = folder / "recipes" / "sweep.toml"
    path.write_bytes(data)
    planned = refused(lambda: in_time(lambda: read_sweep(path), SECONDS), ConfigError)
    if planned is not None:
        assert len({run.name for run in planned}) == len(planned) > 0
        for run in planned:
            assert run.name not in ("", ".", "..")
            assert not {*run.name} & {*"/\\\0\n"}
            load_recipe(run.recipe, run.flags)
            assert inert(run.shown, 4000).isprintable()


def recipe_seeds() -> list[bytes]:
    """The shipped recipes, and what the tables of TOML can hold besides."""
    odd = (
        'task = "countdown"\nsteps = 1\nes = { sigma = 1e-3, learning_rate = 1 }\n[task_options]\n'
        'a = [[1, 2.5], ["x", true], [{ b = 1979-05-27T07:32:00Z }]]\n"c d".e = 07:32:00.999\nf = """g\n"""\n'
        "[[task_options.h]]\ni = -inf\n[[task_options.h]]\nj = 0xff\n"
    )
    whole = (RECIPES / "countdown_smollm2.toml").read_bytes()
    return [*(path.read_bytes() for path in sorted(RECIPES.glob("*.toml"))), odd.encode(), *_hard_toml(whole + b"\n")]


def _hard_toml(before: bytes) -> list[bytes]:
    """Values that are deeper than Python's stack, and longer than it writes integers, each under a key that is free."""
    dotted = [b"a." * depth + b"b = 1" for depth in (90, 600, DEEP)]
    nested = [b"x = " + b"[" * depth + b"]" * depth for depth in (60, 180, 290, DEEP)]
    values = [*dotted, b"x = " + b"{ a = " * 150 + b"1" + b" }" * 150, b"x = 0x" + b"f" * 4000, *nested]
    tables = [b"[deep." + b"a." * DEEP + b"b]", *(b"[deep]\n" + value for value in values)]
    return [before + table.replace(b"[deep", b"[" + key) for key in (b"task_options.y", b"es.y") for table in tables]


def flag_seeds() -> list[bytes]:
    """Flags of every kind."""
    return [
        b"es.sigma=5e-4\n--seed=7\nes.antithetic=false\ntask=gsm8k",
        b"es.population=16\nes-fitness=x\nengine.kv-cache-gib=2",
        b'task_options.count=[3, 4]\ntask_options.a.b={c = "d"}\ntask_options.e=text',
        b"task_options." + b"a." * DEEP + b"b=1",
        *(b"task_options.a=" + b"[" * depth + b"]" * depth for depth in (60, 180, 290, DEEP)),
        b"task_options.a=0x" + b"f" * 4000 + b"\nseed=" + b"9" * 4300,
        b"seed=" + b"9" * 4400,
        b"method=grpo\ngrpo.learning_rate=1e-5\nsampling.samples_per_prompt=4\nsampling.top_p=0.5",
    ]


def sweep_seeds() -> list[bytes]:
    """The shipped sweeps; of their recipes two are copied beside them."""
    shipped = [path.read_bytes() for path in sorted((RECIPES / "sweeps").glob("*.toml"))]
    trial = b'recipe = "../countdown_smollm2.toml"\ntrials = [{ name = "a" }]\n'
    return [*shipped, *(hard.replace(b"[es.", b"[settings.") for hard in _hard_toml(trial))]
