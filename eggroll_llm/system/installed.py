"""Which packages are here, and what to run where one is missing.

eggroll-llm is not published, so that no `pip install "eggroll-llm[...]"` can be the remedy: its own dependencies come
with `make install` in a clone, which finds the build of torch that vLLM's CPU build requires and that pip alone does
not find. The others are on the ordinary package index.
"""

import importlib.metadata
import importlib.util
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from eggroll_llm.errors import InstallError
from eggroll_llm.system.invocation import NAME, ROOT, command, python_command

ENGINE = ("torch", "vllm")
"""What everything that samples needs."""
_BY_PIP = (
    *("accelerate", "datasets", "gguf", "huggingface_hub", "jinja2", "math_verify", "matplotlib"),
    *("numpy", "peft", "pyarrow", "ray"),
    *("rich", "safetensors", "tensorboard", "tokenizers", "transformers", "trl", "verifiers", "wandb"),
)
PACKAGES = frozenset((*ENGINE, *_BY_PIP))
"""Modules that are imported somewhere and may be missing."""


def missing(*names: str) -> list[str]:
    """Return which of these modules are not installed. Nothing is imported."""
    return [name for name in names if not _is_installed(name)]


def check(what: str, *names: str) -> None:
    """Raise InstallError, with the command that installs them, when modules that `what` needs are missing."""
    if absent := missing(*names):
        raise InstallError(f"{what} needs {' and '.join(absent)}, not installed here. {remedy(*absent)}")


def import_failure(error: ImportError) -> str:
    """Return one line for an import that failed, empty when it is of none of our packages."""
    name = (error.name or "").partition(".")[0]
    if name not in PACKAGES:
        return ""
    if missing(name):
        return f"{name} is not installed here. {remedy(name)}"
    text = " ".join(str(error).split())
    return f"{name} is installed here but cannot be imported: {text}. Look for the cause with: {command('doctor')}"


def remedy(*names: str) -> str:
    """Return a sentence with the command that installs these modules into the environment that runs this."""
    if set(names) & set(ENGINE):
        return f"{_in_clone()}: {install_command(*(['grpo'] if 'trl' in names else []))}"
    return f"Run: {python_command('-m', 'pip', 'install', *map(_requirement, names))}"


def install_command(*extras: str, cuda: bool | None = None) -> str:
    """Return the `make install` that puts eggroll-llm, vLLM and the extras into the environment that runs this."""
    on_cuda = Path("/proc/driver/nvidia/version").exists() if cuda is None else cuda
    words = ["make", *(["-C", str(ROOT)] if _has_makefile() else []), "install"]
    if on_cuda or extras:
        words.append(f"EXTRAS={','.join(('cuda' if on_cuda else 'cpu', *extras))}")
    if sys.prefix != sys.base_prefix and Path(sys.prefix) != ROOT / ".venv":
        words.append(f"VENV={sys.prefix}")
    return shlex.join(words)


def _in_clone() -> str:
    return "Run" if _has_makefile() else "Run in a clone of eggroll-llm"


def _has_makefile() -> bool:
    return (ROOT / "scripts" / "install.sh").is_file()


def _is_installed(name: str) -> bool:
    spec = importlib.util.find_spec(name)
    # A folder of that name on the path, such as the one that W&B writes to, is a package without origin.
    return spec is not None and spec.origin is not None


def _requirement(name: str) -> str:
    """Return the package with the versions that our own metadata asks for, where it is known."""
    try:
        requires: Sequence[str] = importlib.metadata.requires(NAME) or ()
    except importlib.metadata.PackageNotFoundError:
        requires = ()
    wanted = (line.partition(";")[0].strip() for line in requires)
    package = name.replace("_", "-")
    return next((line for line in wanted if re.split(r"[^\w.-]", line)[0] == package), package)
