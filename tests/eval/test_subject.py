"""Which model an evaluation is of."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from eggroll_llm.config.recipe import to_toml
from eggroll_llm.config.schema import RunConfig
from eggroll_llm.errors import CheckpointError, ConfigError, ModelError
from eggroll_llm.es.settings import EsSettings
from eggroll_llm.models.resolve import resolve_model, settled_name
from eggroll_llm.records.checkpoint import save_checkpoint
from eggroll_llm.records.run_dir import RunDir
from eggroll_llm.records.weights import final_step, weights_at, write_provenance
from eggroll_llm.system.invocation import command
from eval.subject import Subject, find_subject


@pytest.fixture
def model(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture
def run(tmp_path: Path, model: Path) -> tuple[Path, RunConfig]:
    """A run of 20 steps, best at 10, with a checkpoint of 10 and no final/."""
    config = RunConfig(
        model=str(model), task="gsm8k", steps=20, es=EsSettings(population=4, sigma=0.1, learning_rate=0.1)
    )
    with RunDir.create(tmp_path / "run", to_toml(config)) as run:
        run.journal.write_text("")
        for step, accuracy in ((0, 0.3), (10, 0.5), (20, 0.5)):
            run.append_metrics({"step": step, "wall_time": float(step), "eval/accuracy": accuracy})
        save_checkpoint(run.checkpoints, 10, copy_of(model), {}, {})
    return run.path, config


def copy_of(model: Path) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        shutil.copytree(model, folder, dirs_exist_ok=True)

    return write


def test_a_model_is_its_own_subject(model: Path) -> None:
    assert find_subject(str(model)) == Subject(name=str(model), model_dir=model.resolve(), config=None)
    with pytest.raises(ModelError, match="neither an existing directory"):
        find_subject("nothing")
    with pytest.raises(ConfigError, match=r"--at best: .* is not a run directory"):
        find_subject(str(model), "best")


def test_a_run_is_evaluated_at_its_end(run: tuple[Path, RunConfig], model: Path) -> None:
    path, config = run
    with pytest.raises(ModelError, match=f"has no final/ yet: .*, or finish it with: {command('resume', path)}$"):
        find_subject(str(path))
    copy_of(model)(path / "final")
    write_provenance(path / "final", step=20, base_model="ab")
    wanted = Subject(name=str(path), model_dir=path / "final", config=config)
    assert find_subject(str(path)) == wanted
    assert find_subject(str(path), "20") == dataclasses.replace(wanted, name=f"{path} (step 20)")


def test_a_final_model_of_an_earlier_end_is_not_taken_for_a_later_step(
    run: tuple[Path, RunConfig], model: Path
) -> None:
    """The run ended at 20, was resumed, evaluated best at 30, and was killed: final/ is still that of 20."""
    path, _ = run
    copy_of(model)(path / "final")
    write_provenance(path / "final", step=20, base_model="ab")
    with (path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 30, "eval/accuracy": 0.9}) + "\n")
    assert weights_at(RunDir.open(path), "final") == (path / "final", 20)
    for at in ("best", "30"):
        with pytest.raises(ModelError, match="step 30 has no checkpoint"):
            find_subject(str(path), at)
    (path / "final" / "eggroll.json").write_text("{}")
    assert final_step(RunDir.open(path)) is None


@pytest.mark.parametrize("at", ["best", "10"])
def test_or_at_its_best_step_or_at_a_checkpoint(run: tuple[Path, RunConfig], at: str) -> None:
    path, config = run
    found = find_subject(str(path), at)
    directory = path / "checkpoints" / "step-000010"
    # Chosen on the test problems that are then reported on.
    selected_on = config.eval.problems if at == "best" else 0
    wanted = Subject(name=f"{path} (step 10)", model_dir=directory, config=config, selected_on=selected_on)
    assert found == wanted
    (directory / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="0 bytes, but"):
        find_subject(str(path), at)


def test_a_run_is_a_model_by_its_name_and_step(run: tuple[Path, RunConfig], model: Path) -> None:
    """To `eval` it is the run, with its task and prompts; to `train`, a model."""
    path, _ = run
    assert find_subject(f"{path}@best") == find_subject(str(path), "best")
    with pytest.raises(ConfigError, match="both choose a step"):
        find_subject(f"{path}@best", "10")
    directory = path / "checkpoints" / "step-000010"
    for at in ("best", "10"):
        assert resolve_model(f"{path}@{at}") == directory
        assert settled_name(f"{path}@{at}") == f"{path}@10"
    for resolve in (resolve_model, settled_name):
        with pytest.raises(ModelError, match=f"has no final/ yet: choose a checkpoint, {path}@STEP"):
            resolve(str(path))
    copy_of(model)(path / "final")
    write_provenance(path / "final", step=20, base_model="ab")
    assert resolve_model(str(path)) == resolve_model(f"{path}@20") == path / "final"
    assert settled_name(str(path)) == f"{path}@20"


def test_what_a_run_does_not_have(run: tuple[Path, RunConfig]) -> None:
    path, _ = run
    with pytest.raises(ModelError, match=f"{command('replay', path, '--step', 7, '--out', f'{path}-step-7')}$"):
        find_subject(str(path), "7")
    for at in ("last", "-1", "1.5"):
        with pytest.raises(ConfigError, match=f"--at {at}: write"):
            find_subject(str(path), at)


@pytest.mark.parametrize(("accuracies", "said"), [((0.5, 0.4), "no step was better"), ((), "has no evaluation yet")])
def test_a_run_without_a_best_step(
    tmp_path: Path, run: tuple[Path, RunConfig], accuracies: tuple[float, ...], said: str
) -> None:
    path, _ = run
    rows = [{"step": i, "eval/accuracy": accuracy} for i, accuracy in enumerate(accuracies)] or [{"step": 0}]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ModelError, match=said):
        find_subject(str(path), "best")
