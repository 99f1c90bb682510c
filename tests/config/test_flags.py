"""Flags over a recipe."""

from pathlib import Path

import pytest
from small_recipe import RECIPE, TOO_DEEP, TOO_LARGE, refusal

from eggroll_llm.config.recipe import load_recipe


def test_flags_are_read_as_the_type_of_their_field(recipe: Path) -> None:
    loaded = load_recipe(
        recipe,
        [
            ("es.sigma", "5e-4"),
            ("--es.learning-rate", "1"),
            ("steps", "2"),
            ("steps", "3"),
            ("es.antithetic", "false"),
            ("es.fitness", "rank"),
            ("log.wandb", "123"),
            ("engine.kv_cache_gib", "2"),
        ],
    )
    assert (loaded.es.sigma, loaded.es.learning_rate, loaded.steps) == (5e-4, 1.0, 3)
    assert (loaded.es.antithetic, loaded.es.fitness, loaded.log.wandb) == (False, "rank", "123")
    assert type(loaded.engine.kv_cache_gib) is float


def test_a_text_is_an_array_of_one(recipe: Path) -> None:
    texts = {
        "Question:": ("Question:",),
        "\n": ("\n",),
        "1": ("1",),
        "true": ("true",),
        "1]#": ("1]#",),
        "a,b": ("a,b",),
    }
    texts |= {'"a, b"': ("a, b",), '"a", "b"': ("a", "b"), '["a", "b"]': ("a", "b"), "[]": (), "": ()}
    for text, stop in texts.items():
        assert load_recipe(recipe, [("sampling.stop", text)]).sampling.stop == stop


def test_what_evaluations_do_not_have_is_not_sought_in_training(recipe: Path) -> None:
    message = refusal(recipe, ("eval.temperature", "0.7"))
    assert "sampling" not in message
    assert "--eval.every" in message


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("0.5", 0.5),
        ("true", True),
        ("[1, 2]", [1, 2]),
        ('"3"', "3"),
        ("some/dir", "some/dir"),
        ("", ""),
        ("2024-01-01", "2024-01-01"),
        ("1\nother = 2", "1\nother = 2"),
        ("{a = 1}", {"a": 1}),
        ("[" * 3000, "[" * 3000),
    ],
)
def test_task_option_flags_are_toml_or_text(recipe: Path, text: str, value: object) -> None:
    assert load_recipe(recipe, [("task_options.data_dir", text)]).task_options == {
        "numbers": 2,
        "data_dir": value,
    }


def test_task_option_flag_makes_the_tables_it_needs(recipe: Path) -> None:
    recipe.write_text(RECIPE.replace("[task_options]\nnumbers = 2\n", ""))
    assert load_recipe(recipe, [("task_options.a.b", "1")]).task_options == {"a": {"b": 1}}


@pytest.mark.parametrize(
    ("flag", "text", "message"),
    [
        ("es.sigmaa", "1", "unknown flag --es.sigmaa. Did you mean --es.sigma?"),
        ("sigma", "1", "unknown flag --sigma. Did you mean --es.sigma?"),
        ("dataset", "x", "unknown flag --dataset. Did you mean --task_options.dataset or --task?"),
        ("reward_funcs", "x", "unknown flag --reward_funcs. Did you mean --task_options.rewards or --task?"),
        (
            "enable_thinking",
            "x",
            "unknown flag --enable_thinking. Did you mean --chat.template_args.enable_thinking?",
        ),
        (
            "sampling.stop",
            "[a]",
            "--sampling.stop [a]: an array is expected, each a string in quotes. Write --sampling.stop A,B.",
        ),
        ("es.layers", "8-15", "--es.layers 8-15: an array is expected, each an integer. Write --es.layers A,B."),
        ("es.sigma.x", "1", "unknown flag --es.sigma.x. Did you mean --es.sigma?"),
        ("es", "1", "--es: es is a table. Set one of its keys, e.g. --es.population VALUE."),
        (
            "task_options",
            "1",
            "--task_options: task_options is a table. Set one of its keys, e.g. --task_options.KEY VALUE.",
        ),
        (
            "task",
            "\udcff",
            r"'task' '\udcff': not valid Unicode text. Remove the undecodable bytes.",
        ),
        (
            "task_options.\udcff",
            "1",
            r"'task_options.\udcff' '1': not valid Unicode text. Remove the undecodable bytes.",
        ),
        ("es.sigma", "big", "--es.sigma big: a number is expected."),
        ("es.sigma", "nan", "--es.sigma: es.sigma = nan is not finite. Write an ordinary number."),
        ("es.rank", "1.5", "--es.rank 1.5: an integer is expected."),
        ("es.rank", "1e30", "--es.rank 1e30: an integer is expected."),
        ("es.rank", "0x" + "f" * 5000, f"--es.rank 0x{'f' * 58}: an integer is expected."),
        ("task_options.x", "0x" + "f" * 5000, f"--task_options.x: task_options.x: {TOO_LARGE}"),
        ("chat.template_args.x", f"[1, {2**63}]", f"--chat.template_args.x: chat.template_args.x: {TOO_LARGE}"),
        ("task_options.x", "[" * 400 + "]" * 400, f"--task_options.x: {TOO_DEEP}"),
        (f"task_options{'.x' * 32}", "1", f"--task_options{'.x' * 32}: {TOO_DEEP}"),
        ("es.rank", "inf", "--es.rank inf: an integer is expected."),
        ("es.antithetic", "2", "--es.antithetic 2: true or false is expected."),
        (
            "log.wandb",
            "No",
            "--log.wandb No: a name is expected, not yes or no. Write --log.wandb NAME, or leave it out.",
        ),
        (
            "es.fitness",
            "ranks",
            '--es.fitness: es.fitness = "ranks" is not a valid choice. Valid: "centered", "rank", "sign". '
            'Did you mean "rank"?',
        ),
        ("method", "ppo", '--method: method = "ppo" is not a valid choice. Valid: "es", "grpo".'),
        (
            "task_options.numbers.x",
            "1",
            "--task_options.numbers.x 1: numbers is not a table in the recipe. Make it one, or drop the flag.",
        ),
    ],
)
def test_bad_flags(recipe: Path, flag: str, text: str, message: str) -> None:
    assert refusal(recipe, (flag, text)) == message
