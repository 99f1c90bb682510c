"""Wherever the output of a run goes, and when nobody reads it any more: the run goes on."""

import dataclasses
import os
import pty
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from fake_engine import CONFIG, rows
from process_tree import ROOT, ProcessTree

from eggroll_llm.config.recipe import to_toml

CLI_RUN = ROOT / "tests" / "support" / "cli_run.py"


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[ProcessTree]:
    found = ProcessTree(tmp_path)
    yield found
    found.kill()


def start(
    tree: ProcessTree, folder: Path, program: Sequence[object] = (sys.executable, CLI_RUN), **options: Any
) -> "subprocess.Popen[str]":
    recipe = folder / "recipe.toml"
    recipe.write_text(to_toml(dataclasses.replace(CONFIG, steps=3)))
    command = ["train", recipe, "--run-dir", folder / "run", "--on-existing", "fail"]
    return tree.start([*program, *command], **{"stdin": subprocess.DEVNULL, **options})


def finished(process: "subprocess.Popen[str]", folder: Path) -> str:
    """Whether it has done everything; what it said on standard error."""
    _, messages = process.communicate(timeout=120)
    assert process.returncode == 0, messages
    assert [row["step"] for row in rows(folder / "run")] == [0, 1, 2, 3]
    assert (folder / "run" / "final" / "model.safetensors").is_file()
    assert (folder / "run" / "report.html").is_file()
    return messages or ""


def test_a_run_goes_on_when_its_reader_has_gone(tree: ProcessTree, tmp_path: Path) -> None:
    """As in `eggroll-llm train ... 2>&1 | head -1`."""
    reading, writing = os.pipe()
    os.close(reading)
    process = start(tree, tmp_path, stdout=writing, stderr=writing)
    os.close(writing)
    finished(process, tmp_path)


def test_a_run_goes_on_without_a_terminal(tree: ProcessTree, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("w") as file:
        process = start(tree, tmp_path, stdout=file, stderr=subprocess.PIPE)
    assert "Traceback" not in finished(process, tmp_path)
    lines = log.read_text().splitlines()
    assert [line[:9] for line in lines if line.startswith("step")] == [f"step    {step}" for step in (1, 2, 3)]
    assert "\x1b" not in log.read_text()


@pytest.mark.parametrize(("kind", "stays"), [("dumb", True), ("dumb", False), ("xterm", True), ("xterm", False)])
def test_a_run_goes_on_on_a_dumb_terminal_and_when_that_is_closed(
    tree: ProcessTree, tmp_path: Path, kind: str, stays: bool
) -> None:
    ours, theirs = pty.openpty()
    process = start(tree, tmp_path, stdout=theirs, stderr=subprocess.PIPE, env={"TERM": kind})
    os.close(theirs)
    shown = b""
    while stays and (part := read(ours)):
        shown += part
    os.close(ours)
    assert "Traceback" not in finished(process, tmp_path)
    assert (b"\x1b" in shown) == (kind == "xterm" and stays)
    assert (b"step    3" in shown) == stays


CHATTY = """
import os, sys
import cli_run, fake_engine
real = fake_engine.FakeEngine.update
def update(self, spec):
    for descriptor in (0, 1, 2):
        assert os.fstat(descriptor).st_rdev == os.stat(os.devnull).st_rdev, descriptor
        os.write(descriptor, b"from a library")
    return real(self, spec)
fake_engine.FakeEngine.update = update
sys.exit(cli_run.train(sys.argv[1:]))
"""


def test_a_run_without_standard_input_and_output_writes_to_no_file_of_its_own(
    tree: ProcessTree, tmp_path: Path
) -> None:
    """As after `<&- >&- 2>&-`: the numbers of those three would go to what the run opens, such as its lock."""
    path = [CLI_RUN.parent]
    process = start(tree, tmp_path, [sys.executable, "-c", CHATTY], path=path, closed=True)
    finished(process, tmp_path)
    for file in (tmp_path / "run").rglob("*"):
        assert file.is_dir() or b"from a library" not in file.read_bytes(), file


def read(terminal: int) -> bytes:
    """What was written to a terminal; nothing when nobody can write to it any more."""
    try:
        return os.read(terminal, 4096)
    except OSError:
        return b""
