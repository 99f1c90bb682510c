"""A real virtual environment with some of the packages that are installed here, and nothing else of them."""

import importlib.metadata
import os
import subprocess
import venv
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


def with_dependencies(names: Iterable[str], extras: Iterable[str] = ()) -> set[str]:
    """Canonical names of distributions and of all that these require; of the first ones with extras."""
    found: set[str] = set()
    waiting = [(name, tuple(extras)) for name in names]
    while waiting:
        name, wanted = waiting.pop()
        name = canonicalize_name(name)
        if name in found:
            continue
        found.add(name)
        for line in importlib.metadata.requires(name) or ():
            requirement = Requirement(line)
            contexts = [{"extra": extra} for extra in (*wanted, "")]
            if requirement.marker is None or any(map(requirement.marker.evaluate, contexts)):
                waiting.append((requirement.name, tuple(requirement.extras)))
    return found


class Bare:
    """The environment: its `python`, and how to run eggroll-llm of this clone in it."""

    def __init__(self, folder: Path, packages: Iterable[str]) -> None:
        venv.create(folder, symlinks=True)
        self.folder, self.python = folder, folder / "bin" / "python"
        (self.site,) = folder.glob("lib/python*/site-packages")
        for name in packages:
            self.add(name)

    def add(self, name: str) -> None:
        """Link what a distribution has installed; of our own only its metadata."""
        for file in importlib.metadata.files(name) or ():
            top = file.parts[0]
            if top.endswith((".pth", "__pycache__")) or top.startswith(("..", "__editable__")):
                continue
            link, source = self.site / top, Path(str(file.locate())).parents[len(file.parts) - 1] / top
            if not link.exists():
                link.symlink_to(source)

    def remove(self, module: str) -> None:
        """Take a module away."""
        (self.site / module).unlink()

    def run(self, *arguments: object, cwd: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
        """Run `python -m eggroll_llm` with the arguments."""
        return self._run("-m", "eggroll_llm", *map(str, arguments), cwd=cwd, **environment)

    def python_code(self, code: str, *, cwd: Path) -> "subprocess.CompletedProcess[str]":
        """Run `python -c` with the code."""
        return self._run("-c", code, cwd=cwd)

    def _run(self, *arguments: str, cwd: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [self.python, *arguments],
            cwd=cwd, capture_output=True, text=True, check=False,
            env={key: value for key, value in os.environ.items() if key != "VIRTUAL_ENV"}
            | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"} | environment,
        )  # fmt: skip
