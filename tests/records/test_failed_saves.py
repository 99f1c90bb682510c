"""A save of which any single call fails, each open, write, sync and rename in turn, leaves a state to go on from."""

import errno
import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from eggroll_llm.errors import CheckpointError
from eggroll_llm.records.checkpoint import clean, newest_valid, save_checkpoint

CALLS = ("fsync", "mkdir", "open", "rename", "replace", "rmdir", "unlink", "write")


def write_model(folder: Path) -> None:
    for name in ("model.safetensors", "config.json"):
        with (folder / name).open("wb", buffering=0) as file:
            os.write(file.fileno(), name.encode())


def save(root: Path, step: int) -> None:
    save_checkpoint(root, step, write_model, {"w": torch.full((3,), float(step))}, {})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class FailingOnce:
    """Counts calls of the system, and lets one of them fail."""

    def __init__(self, patch: pytest.MonkeyPatch, number: int) -> None:
        self.number, self.calls = number, itertools.count(1)
        self.failed = ""
        for name in CALLS:
            patch.setattr(os, name, self.counted(name, getattr(os, name)))
        patch.setattr(Path, "open", self.counted("Path.open", Path.open))

    def counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if next(self.calls) == self.number:
                self.failed = name
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*arguments, **options)

        return call


@pytest.mark.parametrize("step", [2, 3], ids=["in the place of another", "a new one"])
def test_a_save_of_which_any_call_fails_leaves_a_valid_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    failed = set()
    for number in itertools.count(1):
        root = tmp_path / f"{number}"
        root.mkdir()
        save(root, 1)
        save(root, 2)
        before = {of: contents(root / f"step-00000{of}") for of in (1, 2)}
        told = False
        with monkeypatch.context() as patch:
            failing = FailingOnce(patch, number)
            try:
                save(root, step)
            except CheckpointError as error:
                told = "No space left on device" in str(error)
        if not failing.failed:
            break
        failed.add(failing.failed)
        clean(root)
        assert not [path for path in root.iterdir() if not path.name.startswith("step-")]
        assert contents(root / "step-000001") == before[1]
        newest = newest_valid(root)
        assert newest.refused == ()
        assert newest.checkpoint is not None
        assert newest.checkpoint.step in (2, step)
        # What fails after it is in its place, as when what it replaced is deleted, is no reason to give it up.
        assert told or newest.checkpoint.step == step
        assert contents(root / "step-000002") == before[2]  # also when it is the one that was written again
        shutil.rmtree(root)
    assert failed >= {"fsync", "mkdir", "open", "rename", "write", "Path.open"}
    assert number > 20
