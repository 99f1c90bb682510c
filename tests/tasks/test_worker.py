"""Standard output and error of a user's code: real text streams, whose text does nothing to what shows it."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from eggroll_llm.config.schema import RewardConfig
from eggroll_llm.tasks.load import load_task
from eggroll_llm.tasks.sandbox.process import UserProcess
from eggroll_llm.tasks.sandbox.worker import _Inert
from eggroll_llm.tasks.task import Answer

TASK = """
import contextlib, io, logging, sys
sys.stdout.reconfigure(line_buffering=True)

class Mine:
    def problems(self, split):
        return [{"n": 1}]
    def prompt(self, problem):
        return "?"
    def score(self, completion, problem):
        assert isinstance(sys.stdout, io.TextIOWrapper) and isinstance(sys.stderr, io.TextIOWrapper)
        assert sys.stdout.encoding == "utf-8" and not sys.stdout.isatty() and sys.stdout.writable()
        assert sys.stdout.buffer.write(b"bytes \\xff \\x1b[2J\\n") == 13
        sys.stdout.buffer.flush()
        for piece in ("h\\u00e9".encode()[:2], "h\\u00e9".encode()[2:], b"!\\n"):
            sys.stderr.buffer.write(piece)
        print("half \\ud800", end=" ", flush=True)
        with contextlib.redirect_stdout(io.StringIO()) as kept:
            print("unseen")
        assert kept.getvalue() == "unseen\\n"
        sys.stdout.writelines(["one\\n", "two\\n"])
        logging.warning("three")
        return 1.0
"""


def test_user_code_can_do_with_them_what_it_does_elsewhere(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text(TASK)
    main = sys.stdout
    sys.stdout = sys.__stdout__  # pytest's own, here, has no `reconfigure` to be called on import
    try:
        task: Any = load_task("mine.py:Mine", {}, base_dir=tmp_path)
    finally:
        sys.stdout = main
    capfd.readouterr()
    with UserProcess(task, RewardConfig()) as process:
        (verdict,) = process.judge([Answer(text="a", problem=task.problems("train")[0])], voted=False)
    assert verdict.failure == ""
    assert capfd.readouterr().err == "bytes \\xff \\x1b[2J\nhé!\nhalf \\ud800 one\ntwo\nWARNING:root:three\n"


def test_what_is_written_in_part_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """As to a pipe, when a signal comes."""
    write = os.write
    reading, writing = os.pipe()
    output = _Inert(writing)
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, bytes(data)[:3]))
    print("a whole line", file=output.text)
    monkeypatch.undo()
    os.close(writing)
    with open(reading) as shown:
        assert shown.read() == "a whole line\n"
