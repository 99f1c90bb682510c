"""TensorBoard and W&B get every row and a few answers, and nothing that they do reaches the run.

The packages are stand-ins. As the real one, that of W&B keeps the steps of an id and drops a step before its next one.
"""

import dataclasses
import html
import importlib.util
import json
import re
import sys
import textwrap
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from fake_engine import CONFIG, Bench, rows, same_run

from eggroll_llm.config.schema import LogConfig
from eggroll_llm.records.answers import TASK, Graded, Sample
from eggroll_llm.training.callbacks.base import Callbacks
from eggroll_llm.training.callbacks.trackers import trackers

WANDB = """
    import json, pathlib
    def say(*values):
        with pathlib.Path({log!r}).open("a") as file:
            file.write(json.dumps(values) + "\\n")
    class Table(dict):
        pass
    class Run:
        def __init__(self, id):
            self.kept = pathlib.Path({log!r} + id)
            self.step = int(self.kept.read_text()) + 1 if self.kept.exists() else 0
        def log(self, row, step):
            {in_log}
            assert step >= self.step, "dropped"
            self.step = step
            self.kept.write_text(str(step))
            say("log", row, step)
        def finish(self):
            {in_finish}
            say("finish")
    def Settings(**settings):
        return settings
    def init(**options):
        {in_init}
        say("init", options)
        return Run(options["id"])
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
        add_text = add_scalar
        def flush(self):
            pass
        def close(self):
            self.say("close")
"""
BOTH = LogConfig(tensorboard=True, wandb="mine", samples=1)
ONLY_WANDB = LogConfig(wandb="mine")
HOSTILE = "</script>\n|`*_[x](y)\x1b[2J\x00\u202e \ud800"
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


def run(
    path: Path, config: LogConfig, *rows: dict[str, Any], earlier: Sequence[Any] = (), answers: Sequence[Sample] = ()
) -> list[str]:
    """Log the rows, the last with an evaluation, and close; return the warnings."""
    warnings: list[str] = []
    (path / "run").mkdir(exist_ok=True)
    settings = {"es.sigma": 0.01, "note": HOSTILE}
    callbacks = Callbacks(trackers(config, path / "run", settings, earlier, warnings.append))
    for row in rows:
        callbacks.end_step(row, [{"completion": "not theirs"}], answers if row is rows[-1] else ())
    callbacks.close()
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
                "config": {"es.sigma": 0.01, "note": HOSTILE.replace("\ud800", "\ufffd")},
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
    metrics = [line[2] for line in said("wandb") if line[0] == "log" and "eval/samples" not in line[1]]
    assert metrics[:6] == [0, 1, 2, 3, 4, 5]
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


def test_wandb_has_each_step_once_whatever_was_lost_in_between(
    tmp_path: Path, install: Callable[..., None], said: Callable[[str], list[Any]]
) -> None:
    """A step that is done again keeps its values; those that a killed process had not uploaded are given later."""
    install()
    rows = [{"step": step, "x": step} for step in range(8)]
    assert run(tmp_path, ONLY_WANDB, *rows[:4], answers=[answer("1")]) == []
    assert run(tmp_path, ONLY_WANDB, *rows[3:5], earlier=rows[:3]) == []
    assert run(tmp_path, ONLY_WANDB, *rows[7:], earlier=rows[:7]) == []
    numbers = [line[1]["x"] for line in said("wandb") if line[0] == "log" and "x" in line[1]]
    assert numbers == list(range(8))


def answer(text: str) -> Sample:
    return Sample(
        problem=0,
        sample=0,
        id="p",
        doc={"question": text},
        prompt_hash="",
        completion=text,
        tokens=1,
        truncated=False,
        scores={TASK: Graded(correct=True, reward=0.5, detail="")},
    )


def test_a_few_answers_are_a_table_in_which_no_text_acts(
    tmp_path: Path, install: Callable[..., None], said: Callable[[str], list[Any]]
) -> None:
    install()
    assert run(tmp_path, BOTH, ROW, answers=[answer(HOSTILE), answer("the second is not shown")]) == []
    (table,) = (line[1]["eval/samples"] for line in said("wandb") if line[0] == "log" and "eval/samples" in line[1])
    assert table["columns"] == ["problem", "answer", "reward", "correct"]
    ((problem, text, reward, correct),) = table["data"]
    assert (reward, correct) == (0.5, True)
    assert text == "</script>\n" + r"|`*_[x](y)\x1b[2J\x00\u202e \ud800"
    assert problem.startswith('{"id": "p", "question": "</script>')
    assert (problem + text).replace("\n", "").isprintable()
    (markdown,) = (line[1] for line in said("tensorboard") if line[0] == "eval/samples")
    head, rule, row = markdown.splitlines()
    assert (head, rule) == ("| problem | answer | reward | correct |", "| --- | --- | --- | --- |")
    assert re.fullmatch(r"(\| ([\w ]|&#\d+;)+ ){4}\|", row)
    assert r"</script>\n|`*_[x](y)\x1b[2J\x00\u202e \ud800" in html.unescape(row)
    (tmp_path / "none").mkdir()
    run(tmp_path / "none", LogConfig(tensorboard=True, wandb="mine", samples=0), ROW, answers=[answer("x")])
    assert len([line for name in ("wandb", "tensorboard") for line in said(name) if "eval/samples" in str(line)]) == 2


def test_a_package_that_is_not_installed(tmp_path: Path) -> None:
    if importlib.util.find_spec("wandb"):
        pytest.skip("it is installed here")
    warnings = run(tmp_path, ONLY_WANDB, ROW)
    assert len(warnings) == 1
    assert warnings[0].startswith(
        "wandb is off for the rest of the run, metrics.jsonl is still written: wandb is not installed here. Run: "
    )
    assert warnings[0].endswith(" -m pip install wandb")
