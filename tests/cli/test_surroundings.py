"""Wherever the output of a run goes, and when nobody reads it any more: the run goes on."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from fake_engine import CONFIG, rows
from process_tree import ROOT, ProcessTree

from eggroll_llm.config.recipe import to_toml

CLI_RUN = ROOT / "tests" / "support" / "cli_run.py"


def start(tree: ProcessTree, folder: Path, **options: Any) -> "subprocess.Popen[str]":
    recipe = folder / "recipe.toml"
    recipe.write_text(to_toml(dataclasses.replace(CONFIG, steps=3)))
    command = ["train", recipe, "--run-dir", folder / "run", "--on-existing", "fail"]
    return tree.start([sys.executable, CLI_RUN, *command], **{"stdin": subprocess.DEVNULL, **options})


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
