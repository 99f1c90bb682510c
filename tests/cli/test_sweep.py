"""Sweeps: which runs a file plans, and that they are made once each, whatever comes between."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import fake_engine
import pytest
from fake_engine import CONFIG, Bench, same_run
from process_tree import ROOT, ProcessTree, wait_for

from eggroll_llm.cli import sweep
from eggroll_llm.cli.arguments import GO_ON
from eggroll_llm.cli.main import main
from eggroll_llm.cli.sweep import Planned, read_sweep, run_sweep
from eggroll_llm.config.recipe import load_recipe, to_toml
from eggroll_llm.config.schema import RunConfig
from eggroll_llm.errors import ConfigError, RunDirError
from eggroll_llm.system.invocation import command
from eggroll_llm.tasks.paths import absolute_setting
from eggroll_llm.training import session
from eggroll_llm.training.prepare import settle

FOLDER = Path(__file__).parents[2] / "recipes"
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
        ('"large"', '"../large"', r"a trial is named '../large'"),
        ('"large"', "7", r"a trial is named 7"),
        ('name = "large"', "", r"a trial is named ''"),
        ('"large"', r'"\u001b[2J"', r"a trial is named '\\x1b\[2J'"),
        ("sigma = 0.5", "sigmma = 0.5", r'trial "large": unknown flag --es.sigmma. Did you mean --es.sigma'),
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


def test_no_run_takes_the_folder_of_the_report(file: Path) -> None:
    for seeds, name in (("", "comparison"), ("", "large"), ("seeds = [3, 4]", "comparison")):
        file.write_text(SWEEP.replace("seeds = [3, 4]", seeds).replace("large", name))
        with (
            nullcontext()
            if seeds or name == "large"
            else pytest.raises(ConfigError, match='"comparison" is the folder')
        ):
            read_sweep(file)


def test_no_trials(file: Path) -> None:
    file.write_text("trials = []")
    with pytest.raises(ConfigError, match="trials is empty"):
        read_sweep(file)


def settled(run: Planned) -> RunConfig:
    """What `train` makes of the recipe and the flags of a run."""
    flags = [(key, absolute_setting(f"--{key}", text)) for key, text in run.flags]
    return settle(load_recipe(run.recipe, flags), run.recipe.resolve().parent)


def finish(directory: Path, run: Planned, step: int = 3) -> None:
    """What a finished run leaves behind, as far as a sweep looks; its settings are settled."""
    config = settled(run)
    engine = dataclasses.replace(config.engine, max_model_len=300)
    (directory / "final").mkdir(parents=True, exist_ok=True)
    (directory / "journal.jsonl").touch()
    (directory / "config.toml").write_text(to_toml(dataclasses.replace(config, engine=engine)))
    (directory / "metrics.jsonl").write_text(json.dumps({"step": 3}) + "\n")
    (directory / "final" / "eggroll.json").write_text(json.dumps({"step": step, "base_model": "x"}))


def test_finished_runs_are_left_alone_and_failures_stop_nothing(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, made, said = tmp_path / "a" / "out", [], []
    planned = read_sweep(file)
    finish(out / "plain-seed3", planned[0])
    finish(out / "large-seed3", planned[1], step=2)  # it was resumed to more steps, and not finished

    def train(run: sweep.Planned, directory: Path) -> int:
        made.append(directory.name)
        finish(directory, run)
        return {"other-seed3": 2, "large-seed4": -9}.get(run.name, 0)

    monkeypatch.setattr(sweep, "_train", train)
    finished = run_sweep(planned, out, said.append)
    assert made == ["large-seed3", "other-seed3", "plain-seed4", "large-seed4", "other-seed4"]
    assert [path.name for path in finished] == ["plain-seed3", "large-seed3", "plain-seed4", "other-seed4"]
    assert said[0] == "run 1 of 6, plain-seed3: already finished"
    assert "run 3 of 6, other-seed3: failed with exit status 2, see above" in said
    assert "run 5 of 6, large-seed4: was killed by signal 9, see above" in said


@pytest.mark.parametrize(
    ("old", "new", "again"),
    [
        ("minutes = 1.5", "minutes = 2.0", True),
        ("sigma = 0.02", "sigma = 0.03", True),
        ('operators = "+-*"', 'operators = "+-"', True),
        (", count = [2, 2]", "", True),
        ("minutes = 1.5", "minutes = 1.5\nengine = { slots = 2 }", False),
        ("minutes = 1.5", 'minutes = 1.5\nmodel = "models/one"', False),
        ("minutes = 1.5", 'minutes = 1.5\nmodel = "others/one"', True),
    ],
)
def test_a_run_with_other_settings_is_not_taken_for_the_one_that_is_asked_for(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, again: bool
) -> None:
    """Training then goes on, or refuses and says what differs. A path is absolute in the run."""
    made: list[str] = []

    def train(run: Planned, directory: Path) -> int:
        made.append(run.name)
        return 0

    monkeypatch.setattr(sweep, "_train", train)
    run, at = read_sweep(file)[0], tmp_path / "out" / "plain-seed3"
    finish(at, run)
    if "model" in new:
        monkeypatch.chdir(tmp_path)
        for folder in ("models", "others"):
            (tmp_path / folder / "one").mkdir(parents=True)
        config = load_recipe(at / "config.toml")
        (at / "config.toml").write_text(to_toml(dataclasses.replace(config, model=str(tmp_path / "models" / "one"))))
    file.write_text(SWEEP.replace(old, new))
    run_sweep(read_sweep(file)[:1], tmp_path / "out", lambda text: None)
    assert made == ["plain-seed3"] * again


PATHS = """
recipe = "folder/other.toml"
[settings]
task_options = { file = "data.jsonl" }
[[trials]]
name = "theirs"
chat = { template_file = "chat.jinja" }
[[trials]]
name = "mine"
task = "mine.py:T"
"""


def test_paths_are_relative_to_the_file_and_in_flags_to_where_the_user_stands(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither is the recipe's folder. A run that was trained with them is known to be finished."""
    here, out, said = tmp_path / "here", tmp_path / "out", []
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(sweep, "_train", lambda run, directory: 1)
    file.write_text(PATHS)
    planned = read_sweep(file, [("--task_options.test_file", "test.jsonl")])
    theirs, mine = map(settled, planned)
    assert theirs.task_options == {"file": f"{tmp_path}/data.jsonl", "test_file": f"{here}/test.jsonl"}
    assert theirs.chat.template_file == f"{tmp_path}/chat.jinja"
    assert (mine.task, mine.task_options) == (f"{tmp_path}/mine.py:T", theirs.task_options)
    assert settled(read_sweep(file, [("--task", "your.py:T")])[1]).task == f"{here}/your.py:T"
    for run in planned:
        finish(out / run.name, run)
    run_sweep(planned, out, said.append)
    assert said == ["run 1 of 2, theirs: already finished", "run 2 of 2, mine: already finished"]


STRINGS = """
recipe = "base.toml"
[[trials]]
name = "strings"
chat = { system = "-- Think.", template_args = { effort = "0.5" } }
[trials.task_options]
level = "3"
number = 3
switch = "True"
list = "[1]"
template = "---\\n{question}"
[trials.task_options.inner]
level = "4"
"""


def test_strings_reach_the_run_as_they_are(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A string that looks like a number, a switch, a list or a flag."""
    asked, python, seen = tmp_path / "asked", tmp_path / "python", []
    python.write_text(f'#!/bin/sh\nprintf "%s\\0" "$@" > {asked}\nexit 5\n')
    python.chmod(0o755)
    file.write_text(STRINGS)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(python))
        run_sweep(read_sweep(file), tmp_path / "out", lambda text: None)
    words = asked.read_text().split("\0")[:-1]

    def train(config: RunConfig, *_: Any) -> None:
        seen.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "train", train)
    assert main(words[words.index("train") :]) == 130
    (config,) = seen
    assert config.task_options == {
        "level": "3",
        "number": 3,
        "switch": "True",
        "list": "[1]",
        "template": "---\n{question}",
        "inner": {"level": "4"},
    }
    assert (config.chat.system, config.chat.template_args) == ("-- Think.", {"effort": "0.5"})


def test_a_seed_does_not_replace_those_of_the_file(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", str(file), "--dry-run", "--seed", "5"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"error: --seed 5: {file} sets seeds = [3, 4], ")
    file.write_text(SWEEP.replace("seeds = [3, 4]", ""))
    assert {load_recipe(run.recipe, run.flags).seed for run in read_sweep(file, [("--seed", "5")])} == {5}


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
    assert words[:4] == ["-m", "eggroll_llm", "train", str(run.recipe)]
    assert words[4:8] == ["--run-dir", str(tmp_path / "out" / "plain-seed3"), "--on-existing", "resume"]
    assert words[8:] == [
        "--minutes=1.5", "--es.sigma=0.02", "--task_options.operators=+-*", "--task_options.count=[2, 2]", "--seed=3",
    ]  # fmt: skip
    assert said[-1].endswith("failed with exit status 5, see above")


def start_sweep(tree: ProcessTree, file: Path, python: Path, **options: Any) -> "subprocess.Popen[str]":
    """`eggroll-llm sweep`, with another program in the place of Python for its runs."""
    code = f"import sys; from eggroll_llm.cli.main import main; sys.executable = {str(python)!r}; sys.exit(main())"
    return tree.start(
        [sys.executable, "-c", code, "sweep", file, "--out", file.parent / "out"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


@pytest.mark.parametrize(
    ("number", "terminal"),
    [(signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGINT, True), (signal.SIGHUP, True)],
)
def test_a_sweep_that_is_ended_ends_its_run_with_one_signal(
    tree: ProcessTree, file: Path, tmp_path: Path, number: signal.Signals, terminal: bool
) -> None:
    """That of a job scheduler reaches the sweep alone, Ctrl-C on a terminal and its end both."""
    log, python = tmp_path / "log", tmp_path / "python"
    python.write_text(
        f"#!/bin/sh\ntrap 'echo INT >> {log}' INT\ntrap 'echo HUP >> {log}' HUP\n"
        f"trap 'echo TERM >> {log}; exit 143' TERM\n"
        f"touch {log}\nwhile :; do sleep 0.05; done\n"
    )
    python.chmod(0o755)
    process = start_sweep(tree, file, python, start_new_session=True)
    assert wait_for(log.exists)
    if terminal:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, messages = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert messages == f"interrupted; {GO_ON}\n"
    assert log.read_text() == "TERM\n"
    assert tree.all_end()


@pytest.mark.slow
def test_a_sweep_goes_on_where_it_was_ended(tree: ProcessTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs with the stand-in engine: one that fails, and one that is ended in the middle."""
    file, out, python = tmp_path / "sweep.toml", tmp_path / "out", tmp_path / "python"
    config = settle(dataclasses.replace(CONFIG, seed=3), tmp_path)
    (tmp_path / "base.toml").write_text(to_toml(config))
    file.write_text('recipe = "base.toml"\n[[trials]]\nname = "fails"\n[[trials]]\nname = "run"\nseed = 7\n')
    out.mkdir()
    (out / "fails").touch()
    python.write_text(f'#!/bin/sh\nshift 2\nexec {sys.executable} {ROOT}/tests/support/cli_run.py "$@"\n')
    python.chmod(0o755)
    process = start_sweep(tree, file, python, env={"STUCK": "run:reward:raise"})
    assert wait_for(lambda: (out / "run.stuck").exists() or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    output, messages = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "run 1 of 2, fails: failed with exit status 2, see above" in output
    assert f"error: {out}/fails: is a file. Choose another --run-dir." in messages
    again = f"resume with: {command('resume', out / 'run')}"
    assert messages.endswith(f"interrupted; {again}\ninterrupted; {GO_ON}\n")  # of the run, and of the sweep
    assert tree.all_end()

    bench = Bench(out, monkeypatch)
    monkeypatch.setattr(fake_engine, "CONFIG", dataclasses.replace(config, seed=CONFIG.seed))
    bench.train("whole")
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    said: list[str] = []
    for _ in range(2):
        assert run_sweep(read_sweep(file), out, said.append) == [out / "run"]
    same_run(out / "whole", out / "run")
    assert said[-1] == "run 2 of 2, run: already finished"


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
