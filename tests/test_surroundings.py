"""Wherever the output of a run goes, and when nobody reads it any more: the run goes on."""

import dataclasses
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_engine import CONFIG, rows
from process_tree import ROOT, ProcessTree

from eggroll_llm.config import to_toml

CLI_RUN = ROOT / "tests" / "support" / "cli_run.py"


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[ProcessTree]:
    found = ProcessTree(tmp_path)
    yield found
    found.kill()


def start(tree: ProcessTree, folder: Path, **options: Any) -> "subprocess.Popen[str]":
    recipe = folder / "recipe.toml"
    recipe.write_text(to_toml(dataclasses.replace(CONFIG, steps=3)))
    command = ["train", recipe, "--run-dir", folder / "run", "--on-existing", "fail"]
    return tree.start([sys.executable, CLI_RUN, *command], stdin=subprocess.DEVNULL, **options)


def finished(process: "subprocess.Popen[str]", folder: Path) -> str:
    """Whether it has done everything; what it said on standard error."""
    _, messages = process.communicate(timeout=120)
    assert process.returncode == 0, messages
    assert [row["step"] for row in rows(folder / "run")] == [0, 1, 2, 3]
    assert (folder / "run" / "final" / "model.safetensors").is_file()
    assert (folder / "run" / "report.html").is_file()
    return messages or ""


def test_a_reader_that_went_away(tree: ProcessTree, tmp_path: Path) -> None:
    """As in `eggroll-llm train ... 2>&1 | head -1`."""
    reading, writing = os.pipe()
    os.close(reading)
    process = start(tree, tmp_path, stdout=writing, stderr=writing)
    os.close(writing)
    finished(process, tmp_path)


def test_a_file(tree: ProcessTree, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("w") as file:
        process = start(tree, tmp_path, stdout=file, stderr=subprocess.PIPE)
    assert "Traceback" not in finished(process, tmp_path)
    lines = log.read_text().splitlines()
    assert [line[:9] for line in lines if line.startswith("step")] == [f"step    {step}" for step in (1, 2, 3)]
    assert "\x1b" not in log.read_text()


@pytest.mark.parametrize("stays", [True, False])
def test_a_terminal_that_can_nothing_and_one_that_is_closed(tree: ProcessTree, tmp_path: Path, stays: bool) -> None:
    ours, theirs = pty.openpty()
    process = start(tree, tmp_path, stdout=theirs, stderr=subprocess.PIPE, env={"TERM": "dumb"})
    os.close(theirs)
    shown = b""
    while stays and (part := read(ours)):
        shown += part
    os.close(ours)
    assert "Traceback" not in finished(process, tmp_path)
    assert b"\x1b" not in shown
    assert (b"step    3" in shown) == stays


def read(terminal: int) -> bytes:
    """What was written to a terminal; nothing when nobody can write to it any more."""
    try:
        return os.read(terminal, 4096)
    except OSError:
        return b""
