"""How this program was started: commands for the user to paste, Python for child processes, where modules are found.

`python -m` and `python -c` put the working directory first on `sys.path`, where a user's own `rewards.py` or
`datasets.py` hides the package of that name. The installed program does not, and with the functions here nothing does.
"""

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

NAME = "eggroll-llm"
ROOT = Path(__file__).resolve().parents[2]
"""Folder of our packages: site-packages, or a clone."""
_OWN = ("eggroll_llm", "rewards", "eval")


def command(*words: object) -> str:
    """Return a command of ours as a line for the shell: this program as the user called it, each word quoted."""
    return shlex.join([*_program(), *(_argument(word) for word in words)])


def python_command(*words: object) -> str:
    """Return a command of the Python that runs this, as a line for the shell."""
    return shlex.join([_python(), *map(str, words)])


def child_python() -> list[str]:
    """Return the words that start this Python for `-m` or `-c` without the working directory on its path.

    With it only where that directory holds our packages: a clone that is used without being installed.
    """
    return [sys.executable, *([] if _in_clone() else ["-P"])]


def leave_working_directory() -> None:
    """Take from `sys.path` what `python -m` has put there."""
    if not sys.flags.safe_path and not _in_clone():
        del sys.path[0]


def find_own_packages_first() -> None:
    """Let `rewards` and `eval` be ours, whatever stands before them on `sys.path` (PYTHONPATH=. and a rewards.py)."""
    if _OwnPackages not in sys.meta_path:
        sys.meta_path.insert(0, _OwnPackages)


class _OwnPackages:
    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [str(ROOT)]) if name in _OWN else None


def _in_clone() -> bool:
    return os.path.realpath(os.curdir) == str(ROOT)


def _argument(word: object) -> str:
    # A path such as "-x" would be taken for a flag.
    return f"./{word}" if isinstance(word, Path) and str(word).startswith("-") else str(word)


def _program() -> list[str]:
    spec = sys.modules["__main__"].__spec__
    if spec is not None and spec.name.partition(".")[0] == "eggroll_llm":
        return [_python(), "-m", "eggroll_llm"]
    called = sys.argv[0]
    script = called if os.path.basename(called) == NAME else os.path.join(os.path.dirname(sys.executable), NAME)
    if not os.path.isfile(script):
        return [_python(), "-m", "eggroll_llm"]
    on_path = shutil.which(NAME)
    return [NAME] if on_path and os.path.samefile(on_path, script) else [script]


def _python() -> str:
    """Return the interpreter as it was called; its whole path where the name leads elsewhere, as in a child process."""
    called = sys.orig_argv[0]
    found, executable = shutil.which(called), os.path.abspath(sys.executable)
    return called if found and os.path.abspath(found) == executable else executable
