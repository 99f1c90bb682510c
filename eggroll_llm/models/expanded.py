"""The cache of models that were made from others, GGUF files expanded to ordinary directories among them: each once,
whole or not at all.

A directory's name is that of the file, the SHA-256 of its content, and the version of the converter.
"""

import fcntl
import logging
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from eggroll_llm.errors import ModelError
from eggroll_llm.models.gguf_file import check_header, read_header
from eggroll_llm.system import installed
from eggroll_llm.system.files import cache_root, fsync_directory, fsync_tree, of_the_system, sha256_of
from eggroll_llm.system.invocation import child_python, command

log = logging.getLogger(__name__)

CONVERSION = 1  # counts changes in what `gguf_expand.expand` writes, so that an old conversion is not used


def models_cache() -> Path:
    """Return the folder in which converted models lie."""
    return cache_root() / "models"


def place_in_cache(name: str, digest: str, version: str) -> Path:
    """Return the directory of what is made from a source of that name, whose content has that SHA-256, by a version."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:100]
    return models_cache() / f"{stem}-{digest[:16]}-{version}"


def expanded_gguf(path: Path) -> Path:
    """Return the directory of the model of a GGUF file, converted now if it never was. Raises ModelError."""
    check_header(read_header(path))
    return expanded(path, place_in_cache(path.stem, sha256_of(path), str(CONVERSION)))


def expanded(path: Path, destination: Path) -> Path:
    """Return `destination`, into which the GGUF file at `path` is converted if it is not there. Raises ModelError."""
    if os.path.isdir(destination):
        return destination
    installed.check(f"converting {path}", "torch", "transformers", "gguf")
    return made_once(destination, f"{path}: its conversion", lambda scratch: _convert(path, scratch))


def made_once(destination: Path, what: str, make: Callable[[Path], None]) -> Path:
    """Return `destination`, which `make` writes if it is not there; `what` names it in errors. Raises ModelError.

    It is made beside its place and renamed: what was being made when the process was killed is never taken for a model.
    """
    if os.path.isdir(destination):
        return destination
    prefix = f".{destination.name}.tmp-"
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with (destination.parent / f".{destination.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if os.path.isdir(destination):
                return destination
            for abandoned in destination.parent.glob(f"{prefix}*"):
                shutil.rmtree(abandoned)
            with TemporaryDirectory(prefix=prefix, dir=destination.parent, ignore_cleanup_errors=True) as parent:
                scratch = Path(parent) / "model"
                make(scratch)
                fsync_tree(scratch)
                scratch.rename(destination)
            fsync_directory(destination.parent)
    except Exception as error:
        if not (cause := of_the_system(error)):
            raise
        raise ModelError(
            f"{what} cannot be written to {destination.parent} ({cause}): make room there or name another place in the "
            "environment variable EGGROLL_CACHE"
        ) from error
    return destination


def _convert(path: Path, scratch: Path) -> None:
    log.info("converting %s, once", path)
    words = [*child_python(), "-m", "eggroll_llm.models.gguf_expand", str(path), str(scratch)]
    outcome = subprocess.run(words, capture_output=True, text=True, check=False)
    if outcome.returncode != 0:
        reason = outcome.stderr.strip().rpartition("\n")[2]
        if outcome.returncode == 1 and reason.startswith(str(path)):
            raise ModelError(reason)
        raise ModelError(
            f"converting {path} failed ({reason or f'exit status {outcome.returncode}'}): check that "
            f"{models_cache()} has room for it, and the installation with: {command('doctor')}"
        )
