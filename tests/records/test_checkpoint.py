"""A checkpoint is there whole or not at all, and damage is named before anything is loaded."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from eggroll_llm.errors import CheckpointError
from eggroll_llm.records import checkpoint
from eggroll_llm.records.checkpoint import (
    MANIFEST,
    TRAINING_STATE,
    clean,
    list_checkpoints,
    load_training_state,
    newest_valid,
    prune,
    remove_after,
    save_checkpoint,
    verify_checkpoint,
)
from eggroll_llm.system import files

STATE = {"w": torch.arange(6, dtype=torch.float32).reshape(2, 3).T, "n": torch.tensor(3)}
METADATA = {"journal_step": 7, "config": {"a": [1, 2.5, None]}}


def write_model(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"weights" * 100)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.json").write_text("{}")
    (folder / "empty").touch()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


def save(root: Path, *steps: int) -> Path:
    for step in steps:
        path = save_checkpoint(root, step, write_model, STATE, METADATA)
    return path


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_checkpoint_reads_back_as_written(root: Path) -> None:
    path = save(root, 100)
    assert path == root / "step-000100"
    assert names(root) == ["step-000100"]
    assert names(path) == [
        "empty",
        "manifest.json",
        "model.safetensors",
        "tokenizer",
        "training_state.st",
    ]
    found = verify_checkpoint(path)
    assert (found.path, found.step, found.metadata) == (path, 100, METADATA)
    state = load_training_state(found)
    assert set(state) == set(STATE)
    for name, tensor in STATE.items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name], tensor)


def test_name_holds_steps_beyond_six_digits(root: Path) -> None:
    save(root, 9, 1_000_000)
    assert [step for step, _ in list_checkpoints(root)] == [9, 1_000_000]


Damage = Callable[[Path], None]


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def empty(file: Path) -> None:
    os.truncate(file, 0)


@pytest.mark.parametrize("damage", [truncate, flip, empty, Path.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer/vocab.json", TRAINING_STATE, MANIFEST])
def test_damage_names_the_file_and_resuming_falls_back(root: Path, name: str, damage: Damage) -> None:
    good, bad = save(root, 10), save(root, 20)
    damage(bad / name)
    if name == MANIFEST and damage is truncate:
        # The last byte is the newline at the end: nothing is lost.
        assert verify_checkpoint(bad).step == 20
        return
    with pytest.raises(CheckpointError) as info:
        verify_checkpoint(bad)
    assert str(info.value).startswith(f"{bad / name}: ")
    newest = newest_valid(root)
    assert newest.checkpoint == verify_checkpoint(good)
    assert newest.refused == (str(info.value),)


def test_messages_about_damage(root: Path) -> None:
    path = save(root, 1)
    model = path / "model.safetensors"
    truncate(model)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: 699 bytes, but 700 were written\. Use another"):
        verify_checkpoint(path)
    model.write_bytes(b"weightz" * 100)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: content changed .*\(SHA-256 differs\)"):
        verify_checkpoint(path)
    model.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: missing from the checkpoint"):
        verify_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"none/manifest\.json: cannot be read \(No such file or directory\)"):
        verify_checkpoint(root / "none")
    (path / MANIFEST).write_text("[]")
    with pytest.raises(CheckpointError, match=r"manifest\.json: not a manifest"):
        verify_checkpoint(path)


def test_a_file_that_cannot_be_read_is_damage(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = save(root, 1), save(root, 2)
    real = checkpoint.sha256_of

    def fail(file: Path) -> str:
        if file == bad / "empty":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(file)

    monkeypatch.setattr(checkpoint, "sha256_of", fail)
    newest = newest_valid(root)
    assert newest.refused == (f"{bad}/empty: cannot be read (Input/output error). Use another checkpoint.",)
    assert newest.checkpoint == verify_checkpoint(good)


def test_metadata_cannot_change_unnoticed(root: Path) -> None:
    path = save(root, 1)
    content = json.loads((path / MANIFEST).read_text())
    content["metadata"]["journal_step"] = 8
    (path / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"manifest\.json: content changed"):
        verify_checkpoint(path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": None}, "checkpoint format None, but this version reads"),
        ({"step": "1"}, "not a manifest"),
        ({"metadata": None}, "not a manifest"),
        ({"files": [1]}, "not a manifest"),
        ({"files": {"empty": 3}}, "not a manifest"),
        ({"files": {"empty": {"size": 0}}}, "not a manifest"),
        ({"files": {"../outside": {"size": 0, "sha256": ""}}}, "not a manifest"),
        ({"files": {"/outside": {"size": 0, "sha256": ""}}}, "not a manifest"),
        ({"files": {"x" * 300: {"size": 0, "sha256": ""}}}, "cannot be read .File name too long"),
    ],
)
def test_a_manifest_with_the_right_hash_says_what_a_manifest_says(
    root: Path, changes: dict[str, Any], said: str
) -> None:
    path = save(root, 1)
    content = json.loads((path / MANIFEST).read_text()) | changes
    del content["sha256"]
    content["sha256"] = checkpoint._content_hash(content)
    (path / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=said):
        verify_checkpoint(path)


def test_checkpoint_under_another_steps_name_is_refused(root: Path) -> None:
    path = save(root, 10)
    path.rename(root / "step-000020")
    with pytest.raises(CheckpointError, match="is of step 10, but its directory is named step-000020"):
        verify_checkpoint(root / "step-000020")


def test_newest_valid_looks_no_further_than_asked(root: Path) -> None:
    save(root, 10, 20, 30)
    assert newest_valid(root).checkpoint == verify_checkpoint(root / "step-000030")
    assert newest_valid(root, at_most=29).checkpoint == verify_checkpoint(root / "step-000020")
    nothing = newest_valid(root, at_most=9)
    assert (nothing.checkpoint, nothing.refused) == (None, ())
    assert newest_valid(root / "none").checkpoint is None


def test_saving_a_step_again_replaces_it(root: Path) -> None:
    save(root, 10)
    path = save_checkpoint(root, 10, lambda folder: None, {"w": torch.ones(1)}, {"new": True})
    assert names(root) == ["step-000010"]
    assert verify_checkpoint(path).metadata == {"new": True}
    assert names(path) == [MANIFEST, TRAINING_STATE]


@pytest.mark.parametrize("culprit", ["write_model", "state", "fsync", "rename"])
@pytest.mark.parametrize("again", [False, True])
def test_full_disk_leaves_nothing_and_keeps_what_was_there(
    root: Path, monkeypatch: pytest.MonkeyPatch, culprit: str, again: bool
) -> None:
    save(root, 10, 20)
    step = 20 if again else 30
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(*_: object) -> None:
        raise full

    def partly(folder: Path) -> None:
        write_model(folder)
        if culprit == "write_model":
            raise full

    if culprit == "state":
        monkeypatch.setattr("safetensors.torch.save_file", fail)
    elif culprit == "fsync":
        monkeypatch.setattr(checkpoint, "fsync_tree", fail)
    elif culprit == "rename":
        real = Path.rename
        monkeypatch.setattr(Path, "rename", lambda a, b: fail() if a.name.startswith(".tmp-") else real(a, b))
    with pytest.raises(CheckpointError) as info:
        save_checkpoint(root, step, partly, STATE, METADATA)
    assert str(info.value).startswith(
        f"{root}/step-0000{step}: cannot write the checkpoint, whose training state alone takes 32 bytes "
        "(No space left on device after "
    )
    assert str(info.value).endswith("Earlier checkpoints are untouched.")
    if culprit == "write_model":
        assert " after 702 bytes, which were removed again; " in str(info.value)
    monkeypatch.undo()
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before
    assert names(root) == ["step-000010", "step-000020"]


def test_full_disk_within_safetensors_is_the_same_error(root: Path) -> None:
    """The library reports the operating system's errors as its own kind: here a directory is in the way."""
    with pytest.raises(CheckpointError, match=r"step-000001: cannot write .* \(Is a directory after 0 bytes, "):
        save_checkpoint(root, 1, lambda folder: (folder / TRAINING_STATE).mkdir(), STATE, {})
    assert names(root) == []


def full(file: Path) -> Path:
    """The file, on a disk that takes nothing. A link: who puts a new file in its place replaces no device."""
    file.symlink_to("/dev/full")
    return file


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("values", [1, 10**5], ids=["small", "large"])
def test_full_disk_within_torch_is_the_same_error(root: Path, values: int) -> None:
    """Which raises a RuntimeError that does not say why; this state of a trainer has no size that is known before."""
    with pytest.raises(CheckpointError) as info:
        save_checkpoint(root, 1, lambda folder: torch.save(torch.ones(values), full(folder / "optimizer.pt")), {}, {})
    assert str(info.value).startswith(f"{root}/step-000001: cannot write the checkpoint (torch.save failed: ")
    assert "bytes are free" in str(info.value)
    assert "\n" not in str(info.value)
    assert names(root) == []


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), RuntimeError("mat1 and mat2"), SafetensorError("Error while serializing: no dtype")]
)
def test_other_errors_pass_through_and_leave_nothing(root: Path, error: BaseException) -> None:
    def interrupt(folder: Path) -> None:
        write_model(folder)
        raise error

    with pytest.raises(type(error)) as info:
        save_checkpoint(root, 1, interrupt, STATE, {})
    assert info.value is error
    assert names(root) == []


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it runs."""


@pytest.mark.parametrize("renames_done", [0, 1])
def test_kill_while_replacing_is_undone_by_clean(
    root: Path, monkeypatch: pytest.MonkeyPatch, renames_done: int
) -> None:
    save(root, 10)
    before = (root / "step-000010" / MANIFEST).read_bytes()
    real, count = Path.rename, [0]

    def rename(source: Path, target: Path) -> Path:
        if count[0] == renames_done:
            raise Killed
        count[0] += 1
        return real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        # A killed process cleans nothing up.
        patch.setattr(files.shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(Killed):
            save_checkpoint(root, 10, write_model, {"w": torch.ones(1)}, {})
    assert [name for name in names(root) if name.startswith(".tmp-")]
    clean(root)
    assert names(root) == ["step-000010"]
    assert (root / "step-000010" / MANIFEST).read_bytes() == before


def test_what_a_file_system_keeps_of_a_deleted_checkpoint_ends_no_run(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (10, 20, 30):
        save(root, step)
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", busy)
        patch.setattr(os, "rmdir", busy)
        assert prune(root, 30, 1) == [root / "step-000020", root / "step-000010"]
    assert len(list_checkpoints(root)) == 1
    clean(root)
    assert names(root) == ["step-000030"]


def busy(*_: object, **__: object) -> None:
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))


def test_left_over_temporary_directories_are_ignored_and_removed(root: Path) -> None:
    path = save(root, 10)
    shutil.copytree(path, root / ".tmp-step-000020-123")
    shutil.copytree(path, root / ".old-step-000010")
    assert newest_valid(root).checkpoint == verify_checkpoint(path)
    assert clean(root) == [".old-step-000010", ".tmp-step-000020-123"]
    assert names(root) == ["step-000010"]
    assert clean(root / "none") == []


def test_prune_keeps_the_newest(root: Path) -> None:
    save(root, 1, 2, 3, 4)
    assert prune(root, 4, keep=2) == [root / "step-000002", root / "step-000001"]
    assert names(root) == ["step-000003", "step-000004"]
    assert prune(root, 4, keep=2) == []


def test_prune_counts_no_damaged_and_no_later_ones(root: Path) -> None:
    """Or those would be kept in place of ones that a run can go on from."""
    save(root, 1, 2, 3, 4, 5, 6, 9)
    flip(root / "step-000005" / "model.safetensors")
    flip(root / "step-000002" / "model.safetensors")
    assert prune(root, 6, keep=2, protect=[root / "step-000001"]) == [root / "step-000003", root / "step-000002"]
    assert names(root) == ["step-000001", "step-000004", "step-000005", "step-000006", "step-000009"]
    assert prune(root, 6, keep=1) == [root / "step-000005", root / "step-000004", root / "step-000001"]
    assert names(root) == ["step-000006", "step-000009"]


def test_what_comes_after_a_step_is_removed(root: Path) -> None:
    save(root, 1, 2, 3)
    assert remove_after(root, 3) == []
    assert remove_after(root, 1) == [root / "step-000002", root / "step-000003"]
    assert names(root) == ["step-000001"]
    assert remove_after(root / "none", 0) == []
