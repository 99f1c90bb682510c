"""TensorBoard and W&B get every row, and nothing that they do reaches the run. The packages are stand-ins."""

import dataclasses
import importlib.util
import json
import sys
import textwrap
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from fake_engine import CONFIG, Bench, Near, rows, same_run

from eggroll_llm.config.schema import LogConfig
from eggroll_llm.tasks.task import Score
from eggroll_llm.training.trackers import Trackers

WANDB = """
    import json, pathlib
    def say(*values):
        with pathlib.Path({log!r}).open("a") as file:
            file.write(json.dumps(values) + "\\n")
    class Run:
        def log(self, row, step):
            say("log", row, step)
            {in_log}
        def finish(self):
            {in_finish}
            say("finish")
    def Settings(**settings):
        return settings
    def init(**options):
        {in_init}
        say("init", options)
        return Run()
    {on_import}
"""
WRITER = """
    import json, pathlib
    class SummaryWriter:
        def __init__(self, directory, purge_step):
            self.say("open", directory, purge_step)
        def say(self, *values):
            with pathlib.Path({log!r}).open("a") as file:
                file.write(json.dumps(values) + "\\n")
        def add_scalar(self, key, value, step):
            self.say(key, value, step)
        def flush(self):
            pass
        def close(self):
            self.say("close")
"""
BOTH = LogConfig(tensorboard=True, wandb="mine")
ONLY_WANDB = LogConfig(wandb="mine")
ROW = {"step": 3, "reward/mean": 0.5, "eval/accuracy": float("nan"), "completions": 24}


@pytest.fixture
def said(tmp_path: Path) -> Callable[[str], list[Any]]:
    """What the stand-in for a package was told."""

    def lines(name: str) -> list[Any]:
        path = tmp_path / f"{name}.log"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    return lines


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put stand-ins where they are imported from; code goes into a place of wandb's."""
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.setitem(sys.modules, "wandb", None)
    del sys.modules["wandb"]  # and again after the test

    def write(**code: str) -> None:
        places = dict.fromkeys(("in_init", "in_log", "in_finish", "on_import"), "pass") | code
        package = tmp_path / "packages" / "wandb.py"
        package.parent.mkdir()
        package.write_text(textwrap.dedent(WANDB).format(log=str(tmp_path / "wandb.log"), **places))
        writer = types.ModuleType("torch.utils.tensorboard")
        exec(textwrap.dedent(WRITER).format(log=str(tmp_path / "tensorboard.log")), writer.__dict__)
        monkeypatch.setitem(sys.modules, writer.__name__, writer)

    return write


def run(path: Path, config: LogConfig, *rows: dict[str, Any]) -> list[str]:
    """Log the rows and close; return the warnings."""
    warnings: list[str] = []
    (path / "run").mkdir(exist_ok=True)
    logged = Trackers(config, path / "run", {"es.sigma": 0.01, "seed": 3}, warnings.append)
    for row in rows:
        logged.log(row)
    logged.close()
    logged.close()
    return warnings


def test_none_by_default(tmp_path: Path) -> None:
    warnings = run(tmp_path, LogConfig(), ROW)
    assert warnings == []


def test_both_get_every_number_of_every_row(
    tmp_path: Path, install: Callable[..., None], said: Callable[[str], list[Any]]
) -> None:
    install()
    warnings = run(tmp_path, BOTH, ROW, {"step": 4, "reward/mean": 0.75})
    assert warnings == []
    assert said("wandb") == [
        [
            "init",
            {
                "project": "mine",
                "id": (tmp_path / "run" / "wandb-id").read_text().strip(),
                "resume": "allow",
                "name": "run",
                "dir": str(tmp_path / "run"),
                "config": {"es.sigma": 0.01, "seed": 3},
                "settings": {"console": "off"},
            },
        ],
        ["log", {"reward/mean": 0.5, "completions": 24}, 3],
        ["log", {"reward/mean": 0.75}, 4],
        ["finish"],
    ]
    # A resumed run replaces what was logged after its first step.
    assert said("tensorboard") == [
        ["open", str(tmp_path / "run" / "tensorboard"), 3],
        ["reward/mean", 0.5, 3],
        ["completions", 24, 3],
        ["reward/mean", 0.75, 4],
        ["close"],
    ]


def test_a_resumed_run_goes_on_in_the_same_run_of_both(
    tmp_path: Path, install: Callable[..., None], said: Callable[[str], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it was moved meanwhile; one that is overwritten, or another one, is a new run there."""
    install()
    bench = Bench(tmp_path, monkeypatch)
    log = dataclasses.replace(CONFIG.log, wandb="mine", tensorboard=True)
    bench.train("run", log=log, steps=2)
    bench.train("run", log=log, steps=4, on_existing="resume")
    (tmp_path / "run").rename(tmp_path / "moved")
    bench.train("moved", log=log, steps=5, on_existing="resume")
    bench.train("moved", log=log, steps=1, on_existing="overwrite")
    bench.train("other", log=log, steps=1)
    starts = [line[1] for line in said("wandb") if line[0] == "init"]
    first, second, third, fourth, fifth = (start["id"] for start in starts)
    assert first == second == third
    assert len({first, fourth, fifth}) == 3
    assert {start["resume"] for start in starts} == {"allow"}
    assert [line[2] for line in said("wandb") if line[0] == "log"][:6] == [0, 1, 2, 3, 4, 5]
    opened = [line[1:] for line in said("tensorboard") if line[0] == "open"]
    assert [purge_step for _, purge_step in opened] == [0, 3, 5, 0, 0]


@pytest.mark.parametrize(
    ("place", "code", "reason"),
    [
        ("on_import", "raise ImportError('no such thing')", "ImportError: no such thing"),
        ("on_import", "1 / 0", "ZeroDivisionError: division by zero"),
        ("in_init", "raise ConnectionError('no\\nroute')", "ConnectionError: no route"),
        ("in_init", "raise SystemExit(1)", "SystemExit: 1"),
        ("in_log", "raise ValueError", "ValueError: no message"),
        ("in_finish", "raise TimeoutError('late')", "TimeoutError: late"),
    ],
)
def test_whatever_it_raises_is_one_warning_and_the_other_goes_on(
    tmp_path: Path,
    install: Callable[..., None],
    said: Callable[[str], list[Any]],
    place: str,
    code: str,
    reason: str,
) -> None:
    install(**{place: code})
    warnings = run(tmp_path, BOTH, *({"step": step, "x": 1} for step in range(1, 6)))
    assert warnings == [f"wandb is off for the rest of the run, metrics.jsonl is still written: {reason}"]
    assert [line for line in said("tensorboard") if line[0] == "x"] == [["x", 1, step] for step in range(1, 6)]


@pytest.mark.parametrize(
    ("place", "code", "reason"),
    [
        ("in_log", "if step == 2: raise ConnectionError('unreachable')", "ConnectionError: unreachable"),
        ("in_init", "raise SystemExit('no network')", "SystemExit: no network"),
    ],
)
def test_a_run_comes_to_the_same_whatever_its_trackers_do(
    tmp_path: Path,
    install: Callable[..., None],
    said: Callable[[str], list[Any]],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    code: str,
    reason: str,
) -> None:
    install(**{place: code})
    bench = Bench(tmp_path, monkeypatch)
    bench.train("run", log=dataclasses.replace(CONFIG.log, wandb="mine", tensorboard=True))
    warnings = [text for text in bench.display.messages if "wandb" in text or "tensorboard" in text]
    assert warnings == [f"wandb is off for the rest of the run, metrics.jsonl is still written: {reason}"]
    assert [line[2] for line in said("tensorboard") if line[0] == "reward/mean"] == [1, 2, 3, 4]
    bench.train("alone")
    same_run(tmp_path / "run", tmp_path / "alone")
    assert [row["step"] for row in rows(tmp_path / "run")] == [0, 1, 2, 3, 4]


HOSTILE = "</script>\x1b[2J\x00\u202e \ud800"


def test_they_get_no_text_of_a_model_and_settings_as_valid_text(
    tmp_path: Path, install: Callable[..., None], said: Callable[[str], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    install()
    (tmp_path / "run").mkdir()
    logged = Trackers(BOTH, tmp_path / "run", {"task_options.note": HOSTILE}, pytest.fail)
    logged.log(ROW)
    logged.close()
    assert said("wandb")[0][1]["config"] == {"task_options.note": HOSTILE.replace("\ud800", "\ufffd")}

    class Shouting(Near):
        def score(self, completion: str, problem: Mapping[str, Any], *, truncated: bool = False) -> Score:
            score = super().score(completion, problem, truncated=truncated)
            return dataclasses.replace(score, detail=HOSTILE)

    bench = Bench(tmp_path, monkeypatch)
    bench.train("bench", task=Shouting(), log=dataclasses.replace(CONFIG.log, wandb="mine", tensorboard=True))
    values = [value for line in said("wandb") if line[0] == "log" for value in line[1].values()]
    assert {type(value) for value in values} == {int, float}
    assert HOSTILE[:9] in (tmp_path / "bench" / "completions.jsonl").read_text()  # where it belongs


def test_a_package_that_is_not_installed(tmp_path: Path) -> None:
    if importlib.util.find_spec("wandb"):
        pytest.skip("it is installed here")
    warnings = run(tmp_path, ONLY_WANDB, ROW)
    assert len(warnings) == 1
    assert warnings[0].startswith(
        "wandb is off for the rest of the run, metrics.jsonl is still written: wandb is not installed here. Run: "
    )
    assert warnings[0].endswith(" -m pip install wandb")
