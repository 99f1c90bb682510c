"""A run on a disk that is too small for it, of every size: refused with a message, nothing half-written, and resumed
to the same end once there is room.

    unshare -rm python small_disk.py FOLDER

The disks are file systems in memory, which this mounts: it needs a mount namespace of its own. Prints the files that
could not be written, as JSON.
"""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fake_engine import Bench, same_run, steps_left
from safetensors.torch import load_file

from eggroll_llm.config.schema import CheckpointConfig
from eggroll_llm.errors import UserError
from eggroll_llm.records.checkpoint import verify_checkpoint

PAGE = 4096


def train(folder: Path, name: str) -> None:
    """Two updates and then two more, so that a second final/ takes the place of the first."""
    for steps in steps_left(folder / name):
        bench = Bench(folder, pytest.MonkeyPatch())
        bench.train(name, "resume", steps=steps, checkpoint=CheckpointConfig(every=1, keep=4))


def mount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(disk)], check=True)


def check_nothing_is_half_written(run: Path) -> None:
    assert not [path for path in run.rglob("*") if path.name.startswith((".tmp-", ".old-"))]
    for path in run.glob("checkpoints/*"):
        verify_checkpoint(path)
    for path in run.rglob("*.jsonl"):
        assert not path.read_bytes() or path.read_bytes().endswith(b"\n"), path
    if (run / "final").exists():
        assert load_file(run / "final" / "model.safetensors")
        assert json.loads((run / "final" / "eggroll.json").read_text())["step"] in (2, 4)
        assert (run / "final" / "README.md").read_text().endswith("\n")


def main(folder: Path) -> None:
    train(folder, "whole")
    files: list[str] = []
    for pages in itertools.count(1):
        disk = folder / f"disk-{pages}"
        disk.mkdir()
        mount(disk, f"size={pages * PAGE}")
        refused = ""
        try:
            train(disk, "run")
        except UserError as error:
            refused = str(error)
        if refused:
            where, reason = rf"{disk}/run/?(.*?)", r"\(No space left on device.*; \d+ bytes are free\)"
            said = re.fullmatch(rf"{where}: cannot write .*{reason}\..*", refused)
            assert said, refused
            files.append(said[1])
            check_nothing_is_half_written(disk / "run")
            mount(disk, f"remount,size={2**20}")
            train(disk, "run")
        same_run(folder / "whole", disk / "run")
        subprocess.run(["umount", str(disk)], check=True)
        if not refused:
            break
    print(json.dumps(files))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
