"""Sweeps: which runs a file plans, and that they are made once each, whatever comes between."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from eggroll_llm import sweep
from eggroll_llm.cli import main
from eggroll_llm.config import load_recipe
from eggroll_llm.errors import ConfigError, RunDirError
from eggroll_llm.sweep import read_sweep, run_sweep

FOLDER = Path(__file__).parents[1] / "recipes"
RECIPE = """
task = "countdown"
steps = 3
[es]
sigma = 0.01
learning_rate = 0.001
"""
SWEEP = """
recipe = "base.toml"
seeds = [3, 4]
[settings]
minutes = 1.5
es = { sigma = 0.02 }
task_options = { operators = "+-*", count = [2, 2] }
[[trials]]
name = "plain"
[[trials]]
name = "large"
es = { population = 64, sigma = 0.5 }
[[trials]]
name = "other"
recipe = "folder/other.toml"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    (tmp_path / "base.toml").write_text(RECIPE)
    (tmp_path / "folder" / "other.toml").write_text(RECIPE.replace("steps = 3", "steps = 4"))
    path = tmp_path / "sweep.toml"
    path.write_text(SWEEP)
    return path


def test_the_runs_of_a_file(file: Path) -> None:
    """Seed by seed; a trial's settings come over those of all, flags over both."""
    runs = read_sweep(file, [("--es.rank", "2"), ("--minutes", "9")])
    assert [run.name for run in runs] == [
        f"{name}-seed{seed}" for seed in (3, 4) for name in ("plain", "large", "other")
    ]
    configs = [load_recipe(run.recipe, run.flags) for run in runs]
    assert [config.seed for config in configs] == [3, 3, 3, 4, 4, 4]
    assert [config.steps for config in configs] == [3, 3, 4] * 2
    assert [config.es.sigma for config in configs] == [0.02, 0.5, 0.02] * 2
    assert [config.es.population for config in configs] == [32, 64, 32] * 2
    assert all((config.es.rank, config.minutes) == (2, 9) for config in configs)
    assert all(config.task_options == {"operators": "+-*", "count": [2, 2]} for config in configs)


def test_without_seeds_each_trial_is_one_run(file: Path) -> None:
    file.write_text(SWEEP.replace("seeds = [3, 4]", ""))
    assert [run.name for run in read_sweep(file)] == ["plain", "large", "other"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"large"', '"plain"', r'two runs would be named "plain-seed3"'),
        ("[3, 4]", "[3, 3]", r'two runs would be named "plain-seed3"'),
        ('"large"', '"../large"', r"the name of a trial is '../large'"),
        ('"large"', "7", r"the name of a trial is 7"),
        ('name = "large"', "", r"the name of a trial is ''"),
        ("sigma = 0.5", "sigmma = 0.5", r'trial "large": --es.sigmma: unknown key.*Did you mean --es.sigma'),
        ("sigma = 0.5", "sigma = -0.5", r'trial "large": .*sigma'),
        ('"folder/other.toml"', '"none.toml"', r'trial "other": .*none.toml'),
        ('recipe = "base.toml"', "", r'trial "plain" has no recipe'),
        ("[settings]", "[setting]", r"unknown key setting.*Did you mean settings"),
    ],
)
def test_what_is_wrong_is_told_before_anything_runs(file: Path, old: str, new: str, message: str) -> None:
    file.write_text(SWEEP.replace(old, new))
    with pytest.raises(ConfigError, match=message) as error:
        read_sweep(file)
    assert str(error.value).startswith(str(file))


def test_no_trials(file: Path) -> None:
    file.write_text("trials = []")
    with pytest.raises(ConfigError, match="trials is empty"):
        read_sweep(file)


def finish(directory: Path, step: int = 3) -> None:
    """What a finished run leaves behind, as far as a sweep looks."""
    (directory / "final").mkdir(parents=True, exist_ok=True)
    for name in ("config.toml", "journal.jsonl"):
        (directory / name).touch()
    (directory / "metrics.jsonl").write_text(json.dumps({"step": 3}) + "\n")
    (directory / "final" / "eggroll.json").write_text(json.dumps({"step": step, "base_model": "x"}))


def test_finished_runs_are_left_alone_and_failures_stop_nothing(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, made, said = tmp_path / "a" / "out", [], []
    finish(out / "plain-seed3")
    finish(out / "large-seed3", step=2)  # it was resumed to more steps, and not finished

    def train(run: sweep.Planned, directory: Path) -> int:
        made.append(directory.name)
        finish(directory)
        return 2 if run.name == "other-seed3" else 0

    monkeypatch.setattr(sweep, "_train", train)
    finished = run_sweep(read_sweep(file), out, said.append)
    assert made == ["large-seed3", "other-seed3", "plain-seed4", "large-seed4", "other-seed4"]
    assert [path.name for path in finished] == [
        "plain-seed3",
        "large-seed3",
        "plain-seed4",
        "large-seed4",
        "other-seed4",
    ]
    assert said[0] == "run 1 of 6, plain-seed3: is there"
    assert "run 3 of 6, other-seed3: failed with exit status 2, see above" in said


def test_a_folder_that_cannot_be_made(file: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(RunDirError, match="taken"):
        run_sweep(read_sweep(file), tmp_path / "taken", print)


def test_each_run_is_a_command_that_a_user_could_type(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = tmp_path / "asked"
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {asked}\nexit 5\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    (run, *_) = read_sweep(file)
    said: list[str] = []
    assert run_sweep([run], tmp_path / "out", said.append) == []
    words = asked.read_text().splitlines()
    assert words[:4] == ["-m", "eggroll_llm.cli", "train", str(run.recipe)]
    assert words[4:8] == ["--run-dir", str(tmp_path / "out" / "plain-seed3"), "--on-existing", "resume"]
    assert words[8:] == [
        "--minutes", "1.5", "--es.sigma", "0.02", "--task_options.operators", "+-*", "--task_options.count", "[2, 2]",
        "--seed", "3",
    ]  # fmt: skip
    assert said[-1].endswith("failed with exit status 5, see above")


def test_a_sweep_that_is_ended_ends_its_run(file: Path, tmp_path: Path) -> None:
    """By the signal of a job scheduler, which reaches the sweep alone."""
    pid, python = tmp_path / "pid", tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho $$ > {pid}.new; mv {pid}.new {pid}\nexec sleep 60\n")
    python.chmod(0o755)
    code = f"import sys; from eggroll_llm.cli import main; sys.executable = {str(python)!r}; sys.exit(main())"
    arguments = ["sweep", str(file), "--out", str(tmp_path / "out")]
    with subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.DEVNULL) as process:
        wait_for(pid.is_file)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 143
    wait_for(lambda: not alive(int(pid.read_text())))


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(400):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("waited for 20 seconds")


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_dry_run_lists_them(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", str(file), "--dry-run", "--es.rank", "2", "--out", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert lines[1].startswith("large-seed3: ")
    assert lines[1].endswith("--es.population 64 --es.sigma 0.5 --seed 3 --es.rank 2")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", sorted((FOLDER / "sweeps").glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_sweeps_are_valid(path: Path) -> None:
    assert len(read_sweep(path)) > 1
