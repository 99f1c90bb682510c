# ruff: noqa: E501  (messages are compared whole, one a line)
"""Recipes, flags, types, ranges: what is accepted, and what each refusal says."""

import ast
import dataclasses
import math
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from small_recipe import RECIPE, TOO_LARGE, refusal

from eggroll_llm.config.compare import check_resume, differences, frozen_hash, may_change
from eggroll_llm.config.help import field_help
from eggroll_llm.config.recipe import load_recipe, to_toml
from eggroll_llm.config.rules import validate
from eggroll_llm.config.schema import GrpoConfig, RunConfig, SamplingConfig
from eggroll_llm.config.toml import write_toml
from eggroll_llm.errors import ConfigError
from eggroll_llm.es.settings import EsSettings


def config(**es: Any) -> RunConfig:
    return RunConfig(task="countdown", steps=10, es=EsSettings(**({"sigma": 0.01, "learning_rate": 0.001} | es)))


def test_recipe_fills_in_defaults(recipe: Path) -> None:
    loaded = load_recipe(recipe)
    assert loaded == RunConfig(
        task="countdown",
        steps=30,
        task_options={"numbers": 2},
        es=EsSettings(sigma=0.012, learning_rate=0.0015),
    )
    assert (loaded.model, loaded.method, loaded.seed, loaded.es.population) == (
        "smollm2-135m-instruct",
        "es",
        0,
        32,
    )


def test_byte_order_mark_and_crlf_are_read(recipe: Path) -> None:
    plain = load_recipe(recipe)
    recipe.write_bytes(b"\xef\xbb\xbf" + RECIPE.replace("\n", "\r\n").encode())
    assert load_recipe(recipe) == plain


@pytest.mark.parametrize(
    ("line", "replacement", "message"),
    [
        ("sigma = 1.2e-2", 'sigma = "1.2e-2"', 'recipe.toml:9: es.sigma = "1.2e-2" is a string, but a number is expected. '
         "Remove the quotes: 1.2e-2."),
        ("sigma = 1.2e-2", "sigma = true", "recipe.toml:9: es.sigma = true is a boolean, but a number is expected. "
         "Write sigma = <a number>."),
        ("sigma = 1.2e-2", "sigma = {a = 1}", "recipe.toml:9: es.sigma = {a = 1} is a table, but a number is expected. "
         "Write sigma = <a number> in place of the table."),
        ("sigma = 1.2e-2", "sigma = inf", "recipe.toml:9: es.sigma = inf is not finite. Write an ordinary number."),
        ("sigma = 1.2e-2", f"sigma = {10**400}", f"recipe.toml:9: es.sigma: {TOO_LARGE}"),
        ("sigma = 1.2e-2", "sigmma = 1", "recipe.toml:9: unknown key es.sigmma. Did you mean es.sigma?"),
        ("sigma = 1.2e-2", "", "recipe.toml:8: es.sigma = 0.0: must be above 0 with method \"es\". "
         "Set es.sigma to a positive number."),
        ("sigma = 1.2e-2", 'optimizer = "lion"', 'recipe.toml:9: es.optimizer = "lion" is not a valid choice. '
         'Valid: "sgd", "momentum", "adam".'),
        ("steps = 30", "steps = 30.0", "recipe.toml:3: steps = 30.0 is a number, but an integer is expected. Write steps = 30."),
        ("steps = 30", "steps = 1979-05-27", "recipe.toml:3: steps = 1979-05-27 is a date, but an integer is expected. "
         "Write steps = <an integer>."),
        ("steps = 30", "sampling = 30", "recipe.toml:3: sampling = 30 is an integer, but sampling is a table. Write a table "
         "[sampling] with keys from: prompts_per_step, samples_per_prompt, max_tokens, temperature, top_p, top_k, min_p, repetition_penalty, stop, "
         "thinking_token_budget."),
        ("steps = 30", "sigma = 30", "recipe.toml:3: unknown key sigma. Did you mean es.sigma?"),
        ("steps = 30", "qqq = 30", "recipe.toml:3: unknown key qqq. Valid keys: model, task, method, seed, steps, minutes, "
         "task_options, chat, sampling, reward, es, grpo, engine, eval, checkpoint, log."),
        ("steps = 30", "engine.max_sequences = [1]", "recipe.toml:3: engine.max_sequences = [1] is an array, but an integer is "
         "expected. Write max_sequences = <an integer>."),
        ('task = "countdown"', "", "recipe.toml: task is missing. Add task = <a string in quotes>."),
        ('task = "countdown"', "task = 5", "recipe.toml:2: task = 5 is an integer, but a string in quotes is expected. "
         'Put it in quotes: task = "5".'),
        ("[task_options]\nnumbers = 2", "task_options = 2", "recipe.toml:5: task_options = 2 is an integer, but a table is "
         "expected. Write a table [task_options]."),
        ("[es]", "[ess]", "recipe.toml:8: unknown key ess. Did you mean es?"),
    ],
)  # fmt: skip
def test_unknown_keys_and_wrong_types_are_named_with_line_and_remedy(
    recipe: Path, line: str, replacement: str, message: str
) -> None:
    assert line in RECIPE
    assert refusal(recipe, text=RECIPE.replace(line, replacement)) == message


def test_files_that_are_no_recipe(recipe: Path) -> None:
    assert refusal(recipe, text="task = \n") == "recipe.toml:1: TOML syntax error: Invalid value, in: task ="
    assert refusal(recipe, text="a = 1\nb = 2\na = 3\n") == (
        "recipe.toml:3: TOML syntax error: Cannot overwrite a value, in: a = 3"
    )
    assert refusal(recipe, text='a = 1\nb = "x\\') == (
        "recipe.toml:2: TOML syntax error: Unescaped '\\' in a string, in: b = \"x\\"
    )
    assert refusal(recipe, text="a = 1\nb = [\n  2,\n\n") == "recipe.toml:3: TOML syntax error: Invalid value, in: 2,"
    recipe.write_bytes(b'task = "\xff"')
    assert refusal(recipe) == "recipe.toml: byte 8 is not UTF-8. Save the file as UTF-8."
    missing = recipe.parent / "none.toml"
    assert refusal(missing) == "none.toml: no such file. Check the path (recipes end in .toml)."
    assert refusal(recipe.parent / ".").endswith(": is a directory. Name the .toml file in it.")
    with pytest.raises(ConfigError, match="not a usable file name"):
        load_recipe("a\0b")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"es.population": "31"}, "es.population = 31, es.antithetic = true: pairs need an even population. "
         "Set es.population to 32, or es.antithetic to false."),
        ({"es.population": "0"}, "es.population = 0: must be at least 2. Set es.population to 2 or more."),
        ({"es.layers": "[5, 3]"}, "es.layers = [5, 3]: is not a range of decoder blocks. Set es.layers to [first, last]."),
        ({"es.layers": "[5]"}, "es.layers = [5]: is not a range of decoder blocks. Set es.layers to [first, last]."),
        ({"es.layers": "[-4, -1]"}, "es.layers = [-4, -1]: is not a range of decoder blocks. Set es.layers to [first, last]."),
        ({"es.population": "1", "es.antithetic": "false"}, "es.population = 1: must be at least 2. "
         "Set es.population to 2 or more."),
        ({"es.sigma": "0"}, 'es.sigma = 0.0: must be above 0 with method "es". Set es.sigma to a positive number.'),
        ({"es.sigma": "-1"}, 'es.sigma = -1.0: must be above 0 with method "es". Set es.sigma to a positive number.'),
        ({"es.learning_rate": "0"}, 'es.learning_rate = 0.0: must be above 0 with method "es". '
         'Set es.learning_rate to a positive number.'),
        ({"es.rank": "0"}, "es.rank = 0: must be at least 1. Set es.rank to 1 or more."),
        ({"es.noise_reuse": "0"}, "es.noise_reuse = 0: must be at least 1. Set es.noise_reuse to 1 or more."),
        ({"es.adam_beta2": "1"}, "es.adam_beta2 = 1.0: must be below 1. Set es.adam_beta2 to less than 1."),
        ({"es.schedule_end": "1.5"}, "es.schedule_end = 1.5: must be at most 1. Set es.schedule_end to 1 or less."),
        ({"es.problems": "per_pair", "es.antithetic": "false"}, 'es.problems = "per_pair", es.antithetic = false: there are no '
         'pairs. Set es.antithetic to true, or es.problems to "shared".'),
        ({"es.problems": "per_pair", "es.fitness": "rank"}, 'es.problems = "per_pair", es.fitness = "rank": members with other '
         'problems have no common ranks. Set es.fitness to "centered" or "sign", or es.problems to "shared".'),
        ({"es.problems": "per_pair", "es.fitness_from": "probabilities"}, 'es.problems = "per_pair", es.fitness_from = '
         '"probabilities": members that only score answers share them all. Set es.problems to "shared", or es.fitness_from to '
         '"rewards".'),
        ({"es.answer_reuse": "2"}, 'es.answer_reuse = 2, es.fitness_from = "rewards": the rewards of members\' own answers say '
         'nothing of others. Set es.answer_reuse to 1, or es.fitness_from to "probabilities".'),
        ({"es.weighting": "token"}, 'es.weighting = "token", es.fitness_from = "rewards": rewards need no weighting. Leave '
         'es.weighting out, or set es.fitness_from to "probabilities".'),
        ({"es.max_drift": "0.1"}, "es.max_drift = 0.1, es.answer_reuse = 1: answers are drawn anew at every step anyway. "
         "Set es.answer_reuse above 1, or es.max_drift to 0."),
        ({"es.fitness_from": "probabilities"}, "sampling.samples_per_prompt = 1: fitness from probabilities compares the "
         "completions of a problem with each other. Set sampling.samples_per_prompt to 2 or more, such as 8."),
        ({"es.fitness": "sign", "es.antithetic": "false"}, 'es.fitness = "sign", es.antithetic = false: the sign compares the '
         'two members of a pair. Set es.antithetic to true, or es.fitness to "rank".'),
        ({"es.optimizer": "momentum", "es.momentum": "0"}, 'es.optimizer = "momentum", es.momentum = 0.0: momentum 0 is plain '
         'SGD. Set es.momentum to 0.9, or es.optimizer to "sgd".'),
        ({"es.sigma_schedule": "linear", "steps": "0", "minutes": "5"}, 'es.sigma_schedule = "linear", steps = 0: a schedule '
         'needs to know the last step. Set steps above 0, or es.sigma_schedule to "constant".'),
        ({"es.sigma_schedule": "linear", "es.schedule_end": "0"}, 'es.sigma_schedule = "linear", es.schedule_end = 0.0: sigma '
         'must stay above 0. Set es.schedule_end above 0, or es.sigma_schedule to "constant".'),
        ({"sampling.samples_per_prompt": "2"}, "sampling.samples_per_prompt = 2, sampling.temperature = 0.0: greedy decoding "
         "gives the same completion every time. Set sampling.temperature above 0, or sampling.samples_per_prompt to 1."),
        ({"sampling.top_p": "0"}, "sampling.top_p = 0.0: must be above 0. Set sampling.top_p to a positive number."),
        ({"sampling.top_k": "20"}, "sampling.top_k = 20, sampling.temperature = 0.0: greedy decoding takes the most probable "
         "token in any case. Set sampling.temperature above 0, or sampling.top_k to 0."),
        ({"sampling.min_p": "1.5"}, "sampling.min_p = 1.5: must be at most 1. Set sampling.min_p to 1 or less."),
        ({"sampling.repetition_penalty": "0"}, "sampling.repetition_penalty = 0.0: must be above 0. "
         "Set sampling.repetition_penalty to a positive number."),
        ({"sampling.thinking_token_budget": "256"}, "sampling.thinking_token_budget = 256, sampling.max_tokens = 256: leaves no room "
         "for an answer. Set sampling.max_tokens to more than sampling.thinking_token_budget."),
        ({"eval.max_tokens": "9", "sampling.thinking_token_budget": "9"}, "sampling.thinking_token_budget = 9, eval.max_tokens = 9: "
         "leaves no room for an answer. Set eval.max_tokens to more than sampling.thinking_token_budget."),
        ({"sampling.stop": '["###", ""]'}, 'sampling.stop = ["###", ""]: every completion would end at an empty text. Remove it.'),
        ({"es.fitness_from": "probabilities", "sampling.samples_per_prompt": "2", "sampling.temperature": "1",
          "sampling.min_p": "0.1"}, "sampling.min_p = 0.1: fitness from probabilities needs answers drawn from the model's own "
         "probabilities. Set sampling.min_p to 0."),
        ({"sampling.temperature": "-0.1"}, "sampling.temperature = -0.1: must be at least 0. "
         "Set sampling.temperature to 0 or more."),
        ({"steps": "0"}, "steps = 0, minutes = 0.0: the run would never end. Set steps or minutes (or both) above 0."),
        ({"minutes": "-1"}, "minutes = -1.0: must be at least 0. Set minutes to 0 or more."),
        ({"seed": "-1"}, "seed = -1: must be at least 0. Set seed to 0 or more."),
        ({"engine.slots": "-1"}, "engine.slots = -1: must be at least 0. Set engine.slots to 0 or more."),
        ({"engine.max_sequences": "-1"}, "engine.max_sequences = -1: must be at least 0. Set engine.max_sequences to 0 or more."),
        ({"engine.max_model_len": "256"}, "engine.max_model_len = 256, sampling.max_tokens = 256: leaves no room for a prompt. "
         "Set engine.max_model_len to more than sampling.max_tokens, or to 0 (from the task)."),
        ({"checkpoint.keep": "0"}, "checkpoint.keep = 0: must be at least 1. Set checkpoint.keep to 1 or more."),
        ({"model": ""}, 'model = "": is not a name. Name a model.'),
        ({"engine.compile": "true", "engine.tensor_parallel": "2"}, "engine.compile = true, engine.tensor_parallel = 2: "
         "torch.compile does not reach the ranks. Set engine.compile to false."),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense(recipe: Path, flags: dict[str, str], message: str) -> None:
    found = refusal(recipe, *flags.items())
    where, _, rest = found.partition(": ")
    assert where in {f"--{key}" for key in flags}
    assert rest == message


GRPO = """\
task = "countdown"
method = "grpo"
steps = 5

[sampling]
samples_per_prompt = 8
temperature = 1.0

[grpo]
learning_rate = 1e-6
"""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"grpo.learning_rate": "0"}, 'grpo.learning_rate = 0.0: must be above 0 with method "grpo". '
         'Set grpo.learning_rate to a positive number.'),
        ({"sampling.top_p": "0.9"}, "sampling.top_p = 0.9: GRPO needs answers drawn from the model's own probabilities. "
         "Set sampling.top_p to 1."),
        ({"sampling.top_k": "20"}, "sampling.top_k = 20: GRPO needs answers drawn from the model's own probabilities. "
         "Set sampling.top_k to 0."),
        ({"sampling.min_p": "0.1"}, "sampling.min_p = 0.1: GRPO needs answers drawn from the model's own probabilities. "
         "Set sampling.min_p to 0."),
        ({"sampling.repetition_penalty": "1.1"}, "sampling.repetition_penalty = 1.1: GRPO needs answers drawn from the model's "
         "own probabilities. Set sampling.repetition_penalty to 1."),
        ({"sampling.thinking_token_budget": "9"}, "sampling.thinking_token_budget = 9: GRPO needs answers drawn from the model's "
         "own probabilities. Set sampling.thinking_token_budget to 0."),
        ({"sampling.samples_per_prompt": "1"}, "sampling.samples_per_prompt = 1: GRPO compares the completions of a problem "
         "with each other. Set sampling.samples_per_prompt to 2 or more, such as 8."),
        ({"sampling.temperature": "0"}, "sampling.temperature = 0.0: greedy completions of a problem are all the same. "
         "Set sampling.temperature above 0, such as 1.0."),
        ({"grpo.micro_batch": "24"}, "grpo.micro_batch = 24, sampling.prompts_per_step = 8, sampling.samples_per_prompt = 8: does "
         "not divide the 64 completions of a step. Set grpo.micro_batch to 16, or to another divisor."),
        ({"engine.tensor_parallel": "2"}, "engine.tensor_parallel = 2: a trainer's weights can only be served by one device. "
         "Set engine.tensor_parallel to 1."),
        ({"grpo.epsilon": "0"}, "grpo.epsilon = 0.0: must be above 0. Set grpo.epsilon to a positive number."),
        ({"grpo.learning_rate_schedule": "cosine", "steps": "0", "minutes": "1"}, 'grpo.learning_rate_schedule = "cosine", '
         'steps = 0: a schedule needs to know the last step. Set steps above 0, or grpo.learning_rate_schedule to "constant".'),
        ({"method": "es"}, 'es.sigma = 0.0: must be above 0 with method "es". Set es.sigma to a positive number.'),
    ],
)  # fmt: skip
def test_settings_of_grpo_that_make_no_sense(recipe: Path, flags: dict[str, str], message: str) -> None:
    recipe.write_text(GRPO)
    assert load_recipe(recipe).grpo.learning_rate == 1e-6  # and nothing is asked of [es]
    assert refusal(recipe, *flags.items()).partition(": ")[2] == message


def test_the_table_of_another_method_means_nothing(recipe: Path) -> None:
    """One recipe may hold both tables; a run is not another one for what only the other method reads."""
    recipe.write_text(GRPO)
    saved = load_recipe(recipe)
    now = dataclasses.replace(saved, es=EsSettings(population=31, sigma=0.5))
    validate(now)
    check_resume(saved, now, saved_in="config.toml")
    assert frozen_hash(saved) == frozen_hash(now)
    other = dataclasses.replace(saved, grpo=GrpoConfig(learning_rate=2e-6))
    assert frozen_hash(saved) != frozen_hash(other)
    with pytest.raises(ConfigError, match=r"grpo\.learning_rate was 1e-06 and is now 2e-06"):
        check_resume(saved, other, saved_in="config.toml")
    es = config()
    assert frozen_hash(es) == frozen_hash(dataclasses.replace(es, grpo=GrpoConfig(beta=0.5)))


@pytest.mark.parametrize(("method", "other"), [("es", "grpo"), ("grpo", "es")])
def test_the_table_of_another_method_is_not_written(recipe: Path, tmp_path: Path, method: str, other: str) -> None:
    """Whatever it holds; a file of an older version, which has both, is read as an equal configuration."""
    recipe.write_text(f"{GRPO}\n[es]\nsigma = 0.25\nlearning_rate = 0.5\n")
    config = load_recipe(recipe, [("method", method)])
    written = tmp_path / "config.toml"
    written.write_text(to_toml(config))
    assert other not in tomllib.loads(written.read_text())
    assert load_recipe(written) == config
    both = dataclasses.replace(
        load_recipe(recipe, [("method", other)]), method=method, **{method: getattr(config, method)}
    )
    written.write_text(write_toml(dataclasses.asdict(both)))
    assert written.read_text().count("\nlearning_rate = ") == 2
    assert load_recipe(written) == config
    assert frozen_hash(both) == frozen_hash(config)


@pytest.mark.parametrize(
    "flag", ["top_k 5", "min_p 0.1", "repetition_penalty 1.2", 'stop ["###"]', "thinking_token_budget 9"]
)
def test_what_draws_completions_may_not_change(recipe: Path, flag: str) -> None:
    saved = load_recipe(recipe, [("sampling.temperature", "1")])
    key, value = flag.split()
    now = load_recipe(recipe, [("sampling.temperature", "1"), (f"sampling.{key}", value)])
    assert frozen_hash(saved) != frozen_hash(now)
    with pytest.raises(ConfigError, match=rf"cannot resume with changed settings: sampling\.{key} was"):
        check_resume(saved, now, saved_in="config.toml")


def test_steps_may_not_change_under_a_schedule_of_grpo(recipe: Path) -> None:
    recipe.write_text(GRPO)
    saved = load_recipe(recipe, [("grpo.learning_rate_schedule", "linear")])
    with pytest.raises(ConfigError, match="steps was 5 and is now 6"):
        check_resume(saved, dataclasses.replace(saved, steps=6), saved_in="config.toml")


def test_every_number_has_a_lower_bound() -> None:
    """Each numeric setting at -1 is refused with its own name, so that no new one goes unchecked."""
    for row in field_help(RunConfig):
        if row.kind not in ("integer", "number"):
            continue
        table, _, name = row.key.rpartition(".")
        base = config()
        part = dataclasses.replace(getattr(base, table) if table else base, **{name: -1})
        changed = dataclasses.replace(base, **{table: part}) if table else part
        with pytest.raises(ConfigError, match=f"configuration: {row.key} = -1: must be"):
            validate(changed)


def test_validation_also_covers_configurations_built_in_python() -> None:
    with pytest.raises(ConfigError, match=r'es\.optimizer = "lion" is not a valid choice'):
        validate(config(optimizer="lion"))
    with pytest.raises(ConfigError, match=r"es\.sigma = nan is not finite"):
        validate(config(sigma=math.nan))
    validate(config(population=31, antithetic=False))


def test_resolved_configuration_reads_back_equal(recipe: Path, tmp_path: Path) -> None:
    text = 'quote " slash \\ tab \t newline \n bell \x07 del \x7f é 中 \U0001f600'
    options = {
        "text": text,
        "a b": [1, 2.5, "x"],
        "on": True,
        "empty": {},
        "deep": {"x.y": {"z": [{"k": [1]}]}},
    }
    original = dataclasses.replace(load_recipe(recipe), task_options=options)
    path = tmp_path / "config.toml"
    path.write_text(to_toml(original))
    assert load_recipe(path) == original
    assert to_toml(load_recipe(path)) == to_toml(original)


def test_differences_name_every_changed_key() -> None:
    base = dataclasses.replace(config(), task_options={"a": 1, "b": True, "c": {"d": 0}})
    other = dataclasses.replace(
        base, steps=20, task_options={"a": 1.0, "b": 1, "c": {"e": 0}}, sampling=SamplingConfig(max_tokens=5)
    )
    assert differences(base, base) == []
    assert differences(base, other) == [
        "steps", "task_options.a", "task_options.b", "task_options.c.d", "sampling.max_tokens", "task_options.c.e",
    ]  # fmt: skip


def test_keys_that_may_change_on_resume() -> None:
    keys = {row.key for row in field_help(RunConfig)}
    assert {key for key in keys if may_change(key)} == {
        "steps", "minutes", "eval.every", "grpo.gradient_checkpointing", "checkpoint.every", "checkpoint.keep", "checkpoint.best", "log.samples", "log.completions",
        "log.tensorboard", "log.wandb", "engine.slots", "engine.max_sequences", "engine.max_model_len",
        "engine.kv_cache_gib", "engine.offload_masters", "engine.enforce_eager", "engine.compile", "engine.gpu_memory_utilization",
        "engine.timeout_seconds", "engine.threads", "engine.replicas", "engine.tensor_parallel", "engine.min_replicas", "engine.restart",
        "engine.ray_address", "engine.allow_untested_architecture", "reward.workers", "reward.batch_size",
        "reward.timeout_seconds", "reward.memory_gib",
    }  # fmt: skip
    assert not may_change("task_options.data_dir")


def test_resume_with_other_settings_shows_each_difference(tmp_path: Path) -> None:
    saved = config()
    longer = dataclasses.replace(saved, steps=99, minutes=1.0)
    check_resume(saved, longer, saved_in="config.toml")
    assert frozen_hash(saved) == frozen_hash(longer)
    other = dataclasses.replace(config(sigma=0.5), steps=99, task_options={"n": 3})
    assert frozen_hash(saved) != frozen_hash(other)
    with pytest.raises(ConfigError) as info:
        check_resume(saved, other, saved_in="runs/it's x/config.toml")
    assert str(info.value) == (
        "runs/it's x/config.toml: cannot resume with changed settings: es.sigma was 0.01 and is now 0.5; task_options.n was not set "
        "and is now 3. Restore them, or start a new run. Settings that may change: steps, minutes, eval.every, "
        "grpo.gradient_checkpointing, [log], [checkpoint], [reward], [engine] except dtype and quantization."
    )
    final = tmp_path / "it's x" / "final"
    final.mkdir(parents=True)
    with pytest.raises(ConfigError) as info:
        check_resume(saved, other, saved_in=str(final.parent / "config.toml"))
    assert f"start a new run from the weights of this one with --model {shlex.quote(str(final))}. " in str(info.value)


def test_settings_that_were_added_leave_the_hash_of_older_runs() -> None:
    """As version 0.2.0 computes it: journals of that version still resume."""
    run = RunConfig(task="countdown", seed=5, es=EsSettings(sigma=0.01, learning_rate=0.001))
    assert frozen_hash(run) == "1af71fbaef0196c5d2d0c56b4f8515fe8ea3f640ad93bfd3792c42f31b71fcba"
    assert frozen_hash(dataclasses.replace(run, es=dataclasses.replace(run.es, masters="split"))) != frozen_hash(run)


def test_every_setting_has_help() -> None:
    rows = {row.key: row for row in field_help(RunConfig)}
    assert all(row.doc.endswith(".") and "\n" not in row.doc for row in rows.values())
    assert (rows["es.fitness"].kind, rows["es.fitness"].default) == ("centered|rank|sign", '"centered"')
    assert (rows["es.sigma"].kind, rows["es.sigma"].default) == ("number", "0.0")
    assert rows["es.sigma"].doc == 'Standard deviation of the perturbation of a weight; method "es" needs it.'


def test_configuration_imports_nothing_heavy() -> None:
    code = "import sys, eggroll_llm.config.recipe; print({m.partition('.')[0] for m in sys.modules})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    loaded = ast.literal_eval(out)
    assert "eggroll_llm" in loaded
    assert not loaded & {"torch", "numpy", "vllm", "transformers", "safetensors"}
