"""TensorBoard and W&B get every row, and nothing that they do reaches the run. The packages are stand-ins."""

import dataclasses
import importlib.util
import json
import os
import textwrap
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from fake_engine import CONFIG, Bench, Near, rows, same_run

from eggroll_llm.config.schema import LogConfig
from eggroll_llm.tasks.task import Score
from eggroll_llm.training import trackers
from eggroll_llm.training.trackers import Trackers

ROOT = Path(__file__).parents[2]
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
    """Put stand-ins where the trackers' processes find them first; code goes into a place of wandb's."""
    packages = tmp_path / "packages"
    monkeypatch.setenv("PYTHONPATH", f"{packages}{os.pathsep}{ROOT}")

    def write(**code: str) -> None:
        places = dict.fromkeys(("in_init", "in_log", "in_finish", "on_import"), "pass") | code
        folder = packages / "torch" / "utils"
        folder.mkdir(parents=True)
        for file, text, log in (
            (packages / "wandb.py", WANDB, "wandb"),
            (packages / "torch" / "__init__.py", "", ""),
            (folder / "__init__.py", "", ""),
            (folder / "tensorboard.py", WRITER, "tensorboard"),
        ):
            values = {"log": str(tmp_path / f"{log}.log"), **places}
            file.write_text(textwrap.dedent(text).format(**values) if text else "")

    return write


def run(path: Path, config: LogConfig, *rows: dict[str, Any], settle: float = 0.0) -> tuple[list[str], list[float]]:
    """Log the rows and close; the warnings, and how long each call took."""
    warnings: list[str] = []
    seconds = []
    (path / "run").mkdir(exist_ok=True)
    logged = Trackers(config, path / "run", {"es.sigma": 0.01, "seed": 3}, warnings.append)
    for row in rows:
        start = time.perf_counter()
        logged.log(row)
        seconds.append(time.perf_counter() - start)
        time.sleep(settle)
    start = time.perf_counter()
    logged.close()
    logged.close()
    return warnings, [*seconds, time.perf_counter() - start]


def test_none_by_default(tmp_path: Path) -> None:
    warnings, _ = run(tmp_path, LogConfig(), ROW)
    assert warnings == []


def test_both_get_every_number_of_every_row(
    tmp_path: Path, install: Callable[..., None], said: Callable[[str], list[Any]]
) -> None:
    install()
    warnings, _ = run(tmp_path, BOTH, ROW, {"step": 4, "reward/mean": 0.75})
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


def test_files_in_the_current_directory_do_it_no_harm(
    tmp_path: Path, install: Callable[..., None], said: Callable[[str], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    install()
    for name in ("json", "queue", "random", "rewards", "secrets"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} of the current directory')")
    monkeypatch.chdir(tmp_path)
    warnings, _ = run(tmp_path, BOTH, ROW)
    assert warnings == []
    assert said("wandb")[-1] == ["finish"]


@pytest.mark.parametrize(
    ("place", "code", "reason"),
    [
        ("on_import", "raise ImportError('no such thing')", "ImportError: no such thing"),
        ("on_import", "1 / 0", "ZeroDivisionError: division by zero"),
        ("in_init", "raise ConnectionError('no\\nroute')", "ConnectionError: no route"),
        ("in_init", "raise SystemExit(1)", "SystemExit: 1"),
        ("in_log", "raise KeyboardInterrupt", "KeyboardInterrupt: no message"),
        ("in_log", "print('chatter'); raise ValueError('bad row')", "ValueError: bad row"),
        ("in_finish", "raise TimeoutError('late')", "TimeoutError: late"),
        ("in_log", "import os; os._exit(9)", "status 9"),
        ("in_init", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "status -9"),
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
    warnings, _ = run(tmp_path, BOTH, *({"step": step, "x": 1} for step in range(1, 6)), settle=0.1)
    assert warnings == [f"wandb is off from here on, metrics.jsonl goes on: {reason}"]
    assert [line for line in said("tensorboard") if line[0] == "x"] == [["x", 1, step] for step in range(1, 6)]


@pytest.mark.parametrize(
    ("place", "code", "reason"),
    [
        ("in_log", "if step == 2: raise ConnectionError('unreachable')", "ConnectionError: unreachable"),
        ("in_init", "raise SystemExit('no network')", "SystemExit: no network"),
        ("in_log", "import time; step == 2 and time.sleep(600)", "it did not finish within 2 s"),
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
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 2.0)
    install(**{place: code})
    bench = Bench(tmp_path, monkeypatch)
    bench.train("run", log=dataclasses.replace(CONFIG.log, wandb="mine", tensorboard=True))
    warnings = [text for text in bench.display.messages if "wandb" in text or "tensorboard" in text]
    assert warnings == [f"wandb is off from here on, metrics.jsonl goes on: {reason}"]
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


def test_a_package_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    if importlib.util.find_spec("wandb"):
        pytest.skip("it is installed here")
    warnings, _ = run(tmp_path, ONLY_WANDB, ROW)
    assert len(warnings) == 1
    assert warnings[0].startswith(
        "wandb is off from here on, metrics.jsonl goes on: wandb is not installed here. Run: "
    )
    assert warnings[0].endswith(" -m pip install wandb")


@pytest.mark.parametrize("place", ["in_init", "in_log", "in_finish"])
def test_one_that_hangs_delays_nothing_and_is_ended(
    tmp_path: Path,
    install: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    """Killed with its own children, and with what it would do at exit."""
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 1.0)
    pids = tmp_path / "pids"
    hang = (
        "import subprocess, os, time, atexit; atexit.register(time.sleep, 600); "
        "child = subprocess.Popen(['sleep', '600']); "
        f"open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}'); time.sleep(600)"
    )
    install(**{place: hang})
    warnings, seconds = run(tmp_path, ONLY_WANDB, *({"step": step} for step in range(300)))
    assert warnings == ["wandb is off from here on, metrics.jsonl goes on: it did not finish within 1 s"]
    assert max(seconds[:-1]) < 0.5
    assert seconds[-1] < 3
    for pid in map(int, pids.read_text().split()):
        assert gone(pid)


def gone(pid: int) -> bool:
    """Whether the process has ended; one that init has yet to collect has."""
    for _ in range(50):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


def test_one_that_falls_behind_is_switched_off(
    tmp_path: Path, install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "QUEUED_ROWS", 20)
    install(in_init="import time; time.sleep(600)")
    # The pipe to the process holds some rows as well: 64 KiB.
    warnings, seconds = run(tmp_path, ONLY_WANDB, *({"step": n, "x" * 10_000: 1} for n in range(60)))
    assert warnings == ["wandb is off from here on, metrics.jsonl goes on: it is 20 rows behind"]
    assert max(seconds) < 1


def test_a_failure_to_start_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers.sys, "executable", "/no/such/python")
    warnings, _ = run(tmp_path, ONLY_WANDB, ROW)
    (warning,) = warnings
    assert warning.startswith("wandb is off from here on, metrics.jsonl goes on: FileNotFoundError: ")
