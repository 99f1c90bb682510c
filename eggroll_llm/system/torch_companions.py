"""Finds companions of torch that do not work with the torch that is installed, and removes them.

PyPI's torchvision, torchaudio and torchcodec are built for CUDA. Beside the CPU build of torch their import
fails, and a torchvision that is installed but cannot be imported makes transformers unable to import any
Llama config. Text models need none of the three, and a missing one harms nothing, so a broken one is best
uninstalled.

Standard library only; `scripts/install.sh` runs `python -m eggroll_llm.system.torch_companions --remove-broken`.
"""

import importlib.metadata
import subprocess
import sys
from dataclasses import dataclass

from eggroll_llm.system.invocation import child_python

COMPANIONS = ("torchvision", "torchaudio", "torchcodec")


@dataclass(frozen=True, kw_only=True, slots=True)
class Broken:
    """A package that is installed but cannot be imported."""

    name: str
    version: str
    error: str
    """Last line of what the import printed."""


def find_broken(names: tuple[str, ...] = COMPANIONS) -> list[Broken]:
    """Return those of `names` that are installed but fail to import, each tried in a separate process."""
    broken = []
    for name in names:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        # A process of its own, because a failed import of a C++ extension cannot be undone.
        attempt = subprocess.run([*child_python(), "-c", f"import {name}"], capture_output=True, text=True, check=False)
        if attempt.returncode != 0:
            last_line = attempt.stderr.strip().rpartition("\n")[2] or f"exit status {attempt.returncode}"
            broken.append(Broken(name=name, version=version, error=last_line))
    return broken


def remove(broken: Broken) -> None:
    """Uninstall it from the environment that this Python runs in.

    Raises `subprocess.CalledProcessError` if pip cannot.
    """
    subprocess.run([*child_python(), "-m", "pip", "uninstall", "--quiet", "--yes", broken.name], check=True)


def main(arguments: list[str]) -> int:
    """List broken companions, one a line; with `--remove-broken` remove them. 1 if one is left."""
    removing = arguments == ["--remove-broken"]
    found = find_broken()
    for broken in found:
        if removing:
            remove(broken)
            print(f"removed {broken.name} {broken.version}: built for another torch, and not needed for text models")
        else:
            print(f"{broken.name} {broken.version} cannot be imported with this torch: {broken.error}")
    return 1 if found and not removing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
