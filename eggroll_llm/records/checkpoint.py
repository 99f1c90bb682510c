"""Checkpoints: `step-000100/` is a Hugging Face model directory with the training state and a manifest next to the
weights.

A checkpoint appears under its name only when it is complete and on disk. `manifest.json` holds size and
SHA-256 of every file, and of itself, so that damage is found and named before anything is loaded.

Raises `CheckpointError` for a checkpoint that is damaged or cannot be written.
"""

import hashlib
import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eggroll_llm.errors import CheckpointError
from eggroll_llm.system.files import (
    describe_failure,
    fsync_tree,
    recover,
    remove_directory,
    replace_directory,
    sha256_of,
)
from eggroll_llm.system.jsonl import parse_json

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
MANIFEST = "manifest.json"
# In safetensors format, but not of that name: vLLM loads every *.safetensors of a directory as weights.
TRAINING_STATE = "training_state.st"
_NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A checkpoint whose files match its manifest."""

    path: Path
    """Its directory, loadable as a Hugging Face model."""
    step: int
    """Number of updates applied to its weights."""
    metadata: Mapping[str, Any]
    """What was passed to `save_checkpoint`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Newest:
    """The checkpoint to resume from."""

    checkpoint: Checkpoint | None
    """None when there is no valid one."""
    refused: tuple[str, ...]
    """Why each newer one was passed over; messages naming the bad file."""


def save_checkpoint(
    root: Path,
    step: int,
    write_model: Callable[[Path], None],
    training_state: Mapping[str, "Tensor"],
    metadata: Mapping[str, Any],
) -> Path:
    """Write `root/step-NNNNNN`, replacing one of that step; the directory, complete and on disk.

    Args:
        root: the run's checkpoint directory; created when missing.
        step: updates applied so far.
        write_model: writes the model's files into the directory it is given.
        training_state: tensors needed to continue, by name.
        metadata: JSON values to keep with it.

    Raises:
        CheckpointError: it could not be written; nothing half-written is left, what was there still is.
    """
    from safetensors.torch import save_file

    target = checkpoint_path(root, step)

    def write(folder: Path) -> None:
        write_model(folder)
        save_file({name: tensor.contiguous() for name, tensor in training_state.items()}, folder / TRAINING_STATE)
        fsync_tree(folder)
        (folder / MANIFEST).write_text(_manifest(folder, step, metadata), encoding="utf-8")

    try:
        root.mkdir(exist_ok=True)
        replace_directory(target, write)
    except OSError as error:
        state = sum(tensor.numel() * tensor.element_size() for tensor in training_state.values())
        what = f"the checkpoint, whose training state alone takes {state} bytes" if state else "the checkpoint"
        raise CheckpointError(f"{describe_failure(target, error, what)} Earlier checkpoints are untouched.") from error
    return target


def checkpoint_path(root: Path, step: int) -> Path:
    """Return the directory of a step's checkpoint, whether or not there is one."""
    return root / f"step-{step:06d}"


def verify_checkpoint(path: Path) -> Checkpoint:
    """Return the checkpoint in a directory. Raises CheckpointError naming the file that is missing or changed."""
    manifest = _read_manifest(path)
    for name, expected in manifest["files"].items():
        file = path / name
        try:
            if not file.is_file():
                raise CheckpointError(f"{file}: missing from the checkpoint. Use another checkpoint.")
            size = file.stat().st_size
            if size != expected["size"]:
                raise CheckpointError(
                    f"{file}: {size} bytes, but {expected['size']} were written. Use another checkpoint."
                )
            found = sha256_of(file)
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read ({error.strerror}). Use another checkpoint.") from error
        if found != expected["sha256"]:
            raise CheckpointError(
                f"{file}: content changed since it was written (SHA-256 differs). Use another checkpoint."
            )
    if (match := _NAME.fullmatch(path.name)) and int(match[1]) != manifest["step"]:
        raise CheckpointError(
            f"{path}: is of step {manifest['step']}, but its directory is named {path.name}. Rename it back."
        )
    return Checkpoint(path=path, step=manifest["step"], metadata=manifest["metadata"])


def load_training_state(checkpoint: Checkpoint) -> dict[str, "Tensor"]:
    """Return the tensors saved with a verified checkpoint, on the CPU."""
    from safetensors.torch import load_file

    return load_file(checkpoint.path / TRAINING_STATE)


def newest_valid(root: Path, *, at_most: int | None = None) -> Newest:
    """Return the valid checkpoint of the highest step, not above `at_most`, and why newer ones were refused."""
    refused: list[str] = []
    for step, path in reversed(list_checkpoints(root)):
        if at_most is not None and step > at_most:
            continue
        try:
            return Newest(checkpoint=verify_checkpoint(path), refused=tuple(refused))
        except CheckpointError as error:
            refused.append(str(error))
    return Newest(checkpoint=None, refused=tuple(refused))


def list_checkpoints(root: Path) -> list[tuple[int, Path]]:
    """(step, directory) of every checkpoint by ascending step, unverified; temporary directories left out."""
    if not root.is_dir():
        return []
    matches = ((_NAME.fullmatch(path.name), path) for path in root.iterdir() if path.is_dir())
    return sorted((int(match[1]), path) for match, path in matches if match)


def is_valid(path: Path) -> bool:
    """Return whether there is a checkpoint in a directory, and it is what its manifest says."""
    try:
        verify_checkpoint(path)
    except CheckpointError:
        return False
    return True


def prune(root: Path, step: int, keep: int, protect: Collection[Path] = ()) -> list[Path]:
    """Delete all but the `keep` newest checkpoints, that of `step` among them, and the protected ones.

    A damaged one does not count among those that are kept, nor does one of a later step, which is left alone.

    Returns:
        The directories deleted.
    """
    older = [path for of, path in reversed(list_checkpoints(root)) if of < step]
    if len(older) < keep:
        return []
    left, doomed = keep - 1, []
    protected = {path.resolve() for path in protect}
    for path in older:
        if left:
            left -= is_valid(path)
        elif path.resolve() not in protected:
            doomed.append(path)
    for path in doomed:
        remove_directory(path)
    return doomed


def remove_after(root: Path, step: int) -> list[Path]:
    """Delete the checkpoints of steps after `step`; the directories deleted."""
    later = [path for of, path in list_checkpoints(root) if of > step]
    for path in later:
        remove_directory(path)
    return later


def clean(root: Path) -> list[str]:
    """Remove or restore what a killed process left unfinished; the names concerned. Call before resuming."""
    return recover(root) if root.is_dir() else []


def _manifest(folder: Path, step: int, metadata: Mapping[str, Any]) -> str:
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    content = {"format": FORMAT, "step": step, "metadata": dict(metadata), "files": files}
    return json.dumps({**content, "sha256": _content_hash(content)}, indent=1) + "\n"


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        content = parse_json(file.read_bytes())
        stored = content.pop("sha256")
    except OSError as error:
        raise CheckpointError(
            f"{file}: cannot be read ({error.strerror}). Name a complete checkpoint directory."
        ) from None
    except (ValueError, AttributeError, KeyError, TypeError):
        raise CheckpointError(f"{file}: not a manifest. Use another checkpoint.") from None
    if stored != _content_hash(content):
        raise CheckpointError(
            f"{file}: content changed since it was written (SHA-256 differs). Use another checkpoint."
        )
    if content.get("format") != FORMAT:
        raise CheckpointError(
            f"{file}: checkpoint format {content.get('format')!r:.40}, but this version reads format {FORMAT}. "
            "Use the version that wrote it."
        )
    if not _is_manifest(content):
        raise CheckpointError(f"{file}: not a manifest. Use another checkpoint.")
    return dict(content)


def _is_manifest(content: Mapping[str, Any]) -> bool:
    """Return whether the content has the fields of a manifest; a correct hash does not prove that we wrote it."""
    files = content.get("files")
    return (
        type(content.get("step")) is int
        and isinstance(content.get("metadata"), dict)
        and isinstance(files, dict)
        and all(isinstance(entry, dict) and {"size", "sha256"} <= entry.keys() for entry in files.values())
        and not any(name.startswith("/") or ".." in name.split("/") for name in files)
    )


def _content_hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
