"""Every shipped recipe loads, its task options exist, its numbers fit together and are the published ones."""

import math
import re
from pathlib import Path

import pytest

from eggroll_llm.cli.sweep import read_sweep
from eggroll_llm.config.compare import differences
from eggroll_llm.config.parse import parse_table
from eggroll_llm.config.recipe import load_recipe, to_toml
from eggroll_llm.config.schema import RunConfig
from eggroll_llm.config.toml import Origin
from eggroll_llm.system.hardware import resolve_sequences
from eggroll_llm.tasks.countdown import CountdownOptions
from eggroll_llm.tasks.gsm8k import Gsm8kOptions
from eval.runs import OF_THE_METHOD

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(FOLDER.glob("*.toml"))
GRPO = [path for path in RECIPES if path.stem.endswith("_grpo")]
QWEN = [path for path in RECIPES if "qwen" in path.stem and "coder" not in path.stem]
MEASURED = ("gsm8k_qwen2.5_coder_0.5b", "gsm8k_qwen2.5_coder_0.5b_grpo")
NOT_MEASURED = [
    *(path.stem for path in RECIPES if "qwen" in path.stem and path.stem not in MEASURED),
    "addition_smollm2_rewards",
]
MOST_SLOTS = 64  # what engine.slots = 0 resolves to at most

# (task, family) -> learning rate in our unit, by the conversions of recipes/README.md.
PUBLISHED = {
    ("countdown", "qwen2.5"): 5e-4 / math.sqrt(30),
    ("countdown", "qwen3"): 1e-3 / math.sqrt(256),
    ("gsm8k", "qwen2.5"): 1e-3 / math.sqrt(256),
    ("gsm8k", "qwen3"): 1e-3 / math.sqrt(256),
}


def name(path: Path) -> str:
    return path.stem


def test_every_promised_recipe_is_there() -> None:
    models = ["qwen2.5_0.5b", "qwen2.5_1.5b", "qwen2.5_3b", "qwen3_4b", "smollm2"]
    names = [f"{task}_{model}" for task in ("countdown", "gsm8k") for model in [*models, "smollm2_grpo"]]
    sums = [f"addition_smollm2{ending}" for ending in ("", "_grpo", "_rewards")]
    coder = [f"gsm8k_qwen2.5_coder_0.5b{ending}" for ending in ("", "_grpo", "_gpu", "_gpu_grpo")]
    assert sorted(path.stem for path in RECIPES) == sorted([*sums, *names, *coder])


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_it_is_valid_and_its_resolved_form_reads_back_the_same(path: Path, tmp_path: Path) -> None:
    config = load_recipe(path)
    resolved = tmp_path / "config.toml"
    resolved.write_text(to_toml(config), encoding="utf-8")
    assert load_recipe(resolved) == config


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_its_name_says_what_it_trains(path: Path) -> None:
    config = load_recipe(path)
    task, _, model = path.stem.removesuffix("_grpo").removesuffix("_rewards").removesuffix("_gpu").partition("_")
    assert config.task.split(".")[0] == task
    assert config.method == ("grpo" if path in GRPO else "es")
    assert model.replace("_", "-") in config.model.lower()


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_its_task_options_exist_and_hold_out_enough_problems(path: Path) -> None:
    config = load_recipe(path)
    if config.task == "countdown":
        options = parse_table(CountdownOptions, config.task_options, Origin(name=path.name), where="task_options")
        assert options.test_size >= config.eval.problems
        assert bool(options.hub) == (path in QWEN)
    else:
        parse_table(Gsm8kOptions, config.task_options, Origin(name=path.name), where="task_options")
        assert config.eval.problems <= 1319  # the test set


@pytest.mark.parametrize("path", GRPO, ids=name)
def test_it_differs_from_the_recipe_of_es_in_the_method_alone(path: Path) -> None:
    """Model, task, problems, lengths and evaluation are the same; a step, and how many make a run, is the method's."""
    grpo, es = load_recipe(path), load_recipe(path.with_stem(path.stem.removesuffix("_grpo")))
    assert not unlike(es, grpo) - {"steps"}


COMPARISONS = sorted((FOLDER / "sweeps").glob("compare_*.toml"))


@pytest.mark.parametrize("path", COMPARISONS, ids=name)
def test_a_comparison_is_of_methods_alone(path: Path) -> None:
    """Three seeds of each; nothing else differs, the limits included: time, or completions, ends them."""
    runs = [load_recipe(run.recipe, run.flags) for run in read_sweep(path)]
    assert [(run.seed, run.method) for run in runs] == [(seed, m) for seed in (0, 1, 2) for m in ("es", "grpo")]
    for run in runs:
        assert not unlike(runs[0], run) - {"seed"}
        assert (run.eval.split, run.eval.problems) == ("test", 1319 if run.task == "gsm8k" else 512)
        assert (run.steps > 0) == (run.minutes == 0) == path.stem.endswith("_tokens")
    assert len({completions(run) for run in runs}) == 1


def test_what_make_compare_runs_is_there() -> None:
    """Countdown with two numbers, which the larger minus the smaller solves as often as any trained model, is not."""
    makefile = (FOLDER.parent / "Makefile").read_text(encoding="utf-8")
    compared = re.findall(r"eggroll-llm sweep recipes/sweeps/(\S+)\.toml", makefile)
    assert compared == ["compare_addition_tokens", "compare_addition_time", "compare_three_numbers"]
    assert {FOLDER / "sweeps" / f"{sweep}.toml" for sweep in compared} <= set(COMPARISONS)


def test_a_comparison_by_completions_asks_both_the_same_in_every_step() -> None:
    path = FOLDER / "sweeps" / "compare_two_numbers_tokens.toml"
    for run in (load_recipe(run.recipe, run.flags) for run in read_sweep(path)):
        assert (completions(run), run.steps, run.sampling.prompts_per_step) == (1280, 80, 2)


def completions(run: RunConfig) -> int:
    """Of all steps; 0 for a run that ends by the clock."""
    answers = run.steps * run.sampling.prompts_per_step * run.sampling.samples_per_prompt
    return answers * run.answering


def test_trials_for_fewer_tokens_have_as_many_completions() -> None:
    trials = [load_recipe(run.recipe, run.flags) for run in read_sweep(FOLDER / "sweeps" / "countdown_es_tokens.toml")]
    assert [completions(run) for run in trials] == [1280] * 7


def test_both_methods_are_tuned_alike() -> None:
    """As many trials, each as long, on the same problems, which are not those of the comparison."""
    sweeps = [read_sweep(FOLDER / "sweeps" / f"countdown_{method}.toml") for method in ("es", "grpo")]
    assert len(sweeps[0]) == len(sweeps[1])
    runs = [load_recipe(run.recipe, run.flags) for sweep in sweeps for run in sweep]
    for run in runs:
        assert not unlike(runs[0], run)
        assert (run.steps, run.eval.split, run.seed) == (0, "validation", 100)
        assert run.minutes > 0


def unlike(a: RunConfig, b: RunConfig) -> set[str]:
    """Settings that differ and are not the method's own; beside a GPU's share lie what gradients need."""
    own = ("method", "engine.gpu_memory_utilization", *OF_THE_METHOD)
    return {key for key in differences(a, b) if key not in own and not key.startswith(("es.", "grpo.", "checkpoint."))}


@pytest.mark.parametrize("path", [path for path in RECIPES if path not in GRPO], ids=name)
def test_its_population_fills_whole_pairs_slots_and_waves(path: Path) -> None:
    config = load_recipe(path)
    es, engine = config.es, config.engine
    slots = engine.slots or min(es.population, MOST_SLOTS)
    assert es.antithetic
    assert es.population % slots == 0  # the last wave is full
    assert slots % 2 == 0  # twins, who share their factors, are resident together
    assert slots <= resolve_sequences(engine.max_sequences)  # no slot waits for a sequence
    assert 16 <= es.population * config.sampling.prompts_per_step <= 8192  # answers in a step; published: 1536 to 8192


@pytest.mark.parametrize("path", QWEN, ids=name)
def test_its_learning_rate_is_the_published_one(path: Path) -> None:
    task, family, _ = path.stem.split("_")
    es = load_recipe(path).es
    assert es.learning_rate == pytest.approx(PUBLISHED[task, family], rel=0.01)
    assert (es.sigma, es.rank, es.optimizer, es.update_scale) == (1e-3, 1, "sgd", "rms")


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_the_table_of_recipes_lists_it(path: Path) -> None:
    lines = [
        line for line in (FOLDER / "README.md").read_text(encoding="utf-8").splitlines() if f"`{path.stem}`" in line
    ]
    assert len(lines) == 1
    assert lines[0].rstrip(" |").endswith("no" if path.stem in NOT_MEASURED else "yes")
