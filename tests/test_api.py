"""Training, evaluating and plotting from Python, on a stand-in for the engine with a tiny random model."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from grpo_stub import Recorder, StubEngine, write_recipe

import eggroll_llm
from eggroll_llm import StopTraining, evaluate, load_recipe, plot, train
from eggroll_llm.errors import ConfigError
from eggroll_llm.training import session


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe whose engine is the stand-in."""

    def start(model_dir: Path, *_: Any, **__: Any) -> StubEngine:
        return StubEngine(model_dir)

    monkeypatch.setattr(session, "start_engine", start)
    monkeypatch.setattr("eval.evaluation.start_engine", start)
    return write_recipe(tmp_path, tiny_model("llama"), "grpo", "reward")


def test_train_evaluate_and_plot(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_recipe(recipe, {"steps": 2, "eval.every": 1, "grpo.learning_rate": 1e-4})
    monkeypatch.chdir("/")  # paths are the recipe's, wherever Python stands
    rows: list[Any] = []
    run = train(config, tmp_path / "run", on_step=rows.append, display=Recorder())
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert rows == list(run.metrics)
    assert (run.steps, run.path, run.final) == (2, tmp_path / "run", tmp_path / "run" / "final")
    figures = evaluate(run.path, at=2, limit=3, display=Recorder())
    ((_, count),) = figures["n-samples"].items()
    assert (count["effective"], figures["completions"]) == (3, 3)
    asked = [evaluate(run.final, recipe=how, limit=3, display=Recorder()) for how in (recipe, config)]
    assert asked[0]["results"] == asked[1]["results"] == figures["results"]
    figure = plot(run.path)
    assert [ax.get_ylabel() for ax in figure.axes if ax.get_ylabel()]


def test_a_callback_that_raises_leaves_a_run_to_resume(recipe: Path, tmp_path: Path) -> None:
    config = load_recipe(recipe, {"steps": 3, "eval.every": 0, "checkpoint.every": 1})

    def stop(row: Any) -> None:
        if row["step"] == 2:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        train(config, tmp_path / "run", on_step=stop, display=Recorder())
    rows: list[Any] = []
    train(config, tmp_path / "run", on_existing="resume", on_step=rows.append, display=Recorder())
    assert [row["step"] for row in rows] == [2, 3]  # the checkpoint of step 2 was not written yet


def test_a_recipe_may_be_named_by_its_path(recipe: Path, tmp_path: Path) -> None:
    def stop(row: Any) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        train(str(recipe), tmp_path / "run", on_step=stop, display=Recorder())


def test_a_callback_ends_a_run_as_its_limit_would(recipe: Path, tmp_path: Path) -> None:
    """With GRPO, whose loop is TRL's; the model of that step is there, and the run trains on from it."""
    config = load_recipe(recipe, {"steps": 3, "eval.every": 0})

    def stop(row: Any) -> None:
        if row["step"] == 2:
            raise StopTraining

    run = train(config, tmp_path / "run", on_step=stop, display=Recorder())
    assert (run.steps, (run.final / "model.safetensors").is_file()) == (2, True)
    rows: list[Any] = []
    train(config, tmp_path / "run", on_existing="resume", on_step=rows.append, display=Recorder())
    assert [row["step"] for row in rows] == [3]


def test_mistakes_are_user_errors(recipe: Path) -> None:
    with pytest.raises(ConfigError, match=r"es\.sigm\b.*Did you mean --es\.sigma"):
        load_recipe(recipe, {"es.sigm": 1})
    with pytest.raises(ConfigError, match=r"es\.rank"):
        load_recipe(recipe, {"es.rank": 2.5})


def test_strings_among_the_settings_stay_strings(recipe: Path) -> None:
    """Where the table says no type; what looks like no TOML, and what is no string, is as it was."""
    options = {"level": "3", "switch": "True", "list": "[1]", "quoted": '"x"', "dir": "some/dir", "none": "", "n": 3}
    settings = {f"task_options.{key}": value for key, value in options.items()}
    loaded = load_recipe(recipe, {**settings, "chat.template_args.effort": "0.5", "steps": "2"})
    assert loaded.task_options == options
    assert (loaded.chat.template_args, loaded.steps) == ({"effort": "0.5"}, 2)


def test_settings_are_as_in_a_notebook(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"steps": np.int64(2), "grpo.learning_rate": np.float64(1e-5), "eval.problems": torch.tensor(3)}
    given |= {"sampling.stop": np.array(["a", "b"]), "task_options.weights": [np.float32(0.5), np.int64(1)]}
    for folder in ("data", "2024"):
        loaded = load_recipe(recipe, {**given, "task_options.data_dir": folder})
        assert (loaded.steps, loaded.grpo.learning_rate, loaded.eval.problems) == (2, 1e-5, 3)
        assert loaded.sampling.stop == ("a", "b")
        assert loaded.task_options == {"data_dir": str(tmp_path / folder), "weights": [0.5, 1]}


def test_the_package_lists_its_public_names_and_loads_nothing() -> None:
    assert dir(eggroll_llm) == ["Callback", "ES", "StopTraining", "evaluate", "load_recipe", "plot", "train"]
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = eggroll_llm.trian
    code = "import sys, eggroll_llm; print({'torch', 'vllm', 'rich', 'eggroll_llm.api'} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout == "set()\n"
