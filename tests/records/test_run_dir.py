"""Who may use a directory, what is deleted and what never is, and logs that stay valid."""

import contextlib
import ctypes
import errno
import json
import os
import re
import socket
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from eggroll_llm.errors import RunDirError
from eggroll_llm.records.run_dir import LOCK, OnExisting, RunDir, default_run_dir, is_run_dir
from eggroll_llm.system.invocation import command

CONFIG = "steps = 1\n"
MODES: list[OnExisting] = ["fail", "resume", "overwrite"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run"


def finished_run(path: Path) -> Path:
    """A directory that holds everything a run leaves."""
    with RunDir.create(path, CONFIG) as run:
        run.journal.write_text("header\n")
        (run.checkpoints / "step-000001").mkdir()
        run.final.mkdir()
        (run.final / "model.safetensors").write_text("x")
        run.append_metrics({"step": 1, "reward/mean": 0.5})
    return path


def names(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()}


def refusal(path: Path | str, on_existing: OnExisting = "fail", *, foreseen: bool = True) -> str:
    """Of `create`, which `check` foresees in the same words."""
    with pytest.raises(RunDirError) if foreseen else contextlib.nullcontext() as first:
        RunDir.check(path, on_existing)
    with pytest.raises(RunDirError) as info:
        RunDir.create(path, CONFIG, on_existing)
    assert not first or str(first.value) == str(info.value)
    return str(info.value)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("mode", MODES)
def test_new_directory(path: Path, mode: OnExisting) -> None:
    with RunDir.create(path, CONFIG, mode) as run:
        assert (run.resumed, run.stale_lock) == (False, "")
        assert run.config.read_text() == CONFIG
        assert names(path) == {LOCK, "config.toml", "environment.json", "checkpoints"}
    assert is_run_dir(path)


def test_environment_holds_versions_and_every_start(path: Path) -> None:
    finished_run(path)
    RunDir.create(path, CONFIG, "resume").close()
    starts = json.loads((path / "environment.json").read_text())["starts"]
    assert len(starts) == 2
    assert starts[1]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert starts[1]["cpu_count"] == os.cpu_count()
    assert starts[1]["packages"]["torch"]


def test_existing_run_is_refused_unless_told_otherwise(path: Path) -> None:
    finished_run(path)
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    assert refusal(path) == (
        f"{path}: already holds a run. Choose another --run-dir, delete it with --on-existing overwrite, or continue "
        f"it with: {command('resume', path)}"
    )
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before


def test_resume_keeps_everything(path: Path) -> None:
    finished_run(path)
    with RunDir.create(path, "steps = 2\n", "resume") as run:
        assert run.resumed
        assert run.config.read_text() == CONFIG
        assert run.journal.read_text() == "header\n"
        assert run.last_logged_step() == 1
        run.write_config("steps = 2\n")
    assert run.config.read_text() == "steps = 2\n"


@pytest.mark.parametrize("name", ["config.toml", "journal.jsonl"])
def test_resume_without_an_essential_file_is_refused(path: Path, name: str) -> None:
    (finished_run(path) / name).unlink()
    message = f"{path / name}: missing, no way to resume. Restore it, or use --on-existing overwrite."
    assert refusal(path, "resume") == message
    assert (path / "final" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("fail", "{path}: already holds a run. Choose another --run-dir, "),
        ("resume", "{path}/journal.jsonl: missing, no way to resume. Restore it, or use --on-existing overwrite."),
    ],
)
def test_a_lost_journal_costs_no_logs(path: Path, mode: OnExisting, said: str) -> None:
    """Without a checkpoint or a model, the metrics show that there was a run."""
    with RunDir.create(path, CONFIG) as run:
        run.append_metrics({"step": 0})
        run.append_completions([{"step": 1}])
        run.write_evaluation(0, {}, [])
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    assert refusal(path, mode).startswith(said.format(path=path))
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before
    RunDir.create(path, CONFIG, "overwrite").close()
    assert names(path) == {LOCK, "config.toml", "environment.json", "checkpoints"}


def test_overwrite_keeps_nothing_and_follows_no_links(path: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "data").write_text("precious")
    finished_run(path)
    (path / "link").symlink_to(outside)
    (path / "tensorboard").mkdir()
    (path / "tensorboard" / "events").touch()
    with RunDir.create(path, "steps = 3\n", "overwrite") as run:
        assert not run.resumed
        assert names(path) == {LOCK, "config.toml", "environment.json", "checkpoints"}
        assert run.config.read_text() == "steps = 3\n"
        assert len(json.loads(run.environment.read_text())["starts"]) == 1
    assert (outside / "data").read_text() == "precious"


def test_overwrite_killed_halfway_leaves_no_run_to_resume(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished_run(path)
    with monkeypatch.context() as patch:
        patch.setattr("eggroll_llm.records.run_dir.shutil.rmtree", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            RunDir.create(path, CONFIG, "overwrite")
    assert "config.toml" in refusal(path, "resume")
    assert "already holds a run" in refusal(path)
    RunDir.create(path, CONFIG, "overwrite").close()
    assert names(path) == {LOCK, "config.toml", "environment.json", "checkpoints"}


@pytest.mark.parametrize("mode", MODES)
def test_what_is_no_run_is_never_touched(path: Path, mode: OnExisting) -> None:
    path.mkdir()
    (path / "config.toml").write_text("mine")
    assert refusal(path, mode) == (f"{path}: is neither empty nor a run directory. Choose another --run-dir.")
    assert names(path) == {"config.toml"}
    assert (path / "config.toml").read_text() == "mine"


@pytest.mark.parametrize("mode", MODES)
def test_empty_directory_and_run_that_never_began_are_used(path: Path, mode: OnExisting) -> None:
    path.mkdir()
    RunDir.create(path, "steps = 5\n").close()
    with RunDir.create(path, CONFIG, mode) as run:
        assert not run.resumed
        assert run.config.read_text() == CONFIG


def test_run_directory_copied_without_its_lock_file_is_one(path: Path) -> None:
    (finished_run(path) / LOCK).unlink()
    assert RunDir.open(path).metrics == path / "metrics.jsonl"
    RunDir.create(path, CONFIG, "resume").close()


def test_left_over_temporary_entries_are_removed(path: Path) -> None:
    finished_run(path)
    (path / ".tmp-final-123").mkdir()
    (path / ".tmp-config.toml-123").touch()
    RunDir.create(path, CONFIG, "resume").close()
    assert not [name for name in names(path) if name.startswith(".tmp-")]


def test_a_second_process_is_refused_and_a_stale_lock_is_told(path: Path) -> None:
    code = (
        "import sys; from eggroll_llm.records.run_dir import RunDir; run = RunDir.create(sys.argv[1], 'x = 1'); "
        "print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        for mode in MODES:
            assert refusal(path, mode, foreseen=False) == (
                f"{path}: in use by process {holder.pid} on {socket.gethostname()}. Wait for it, stop it, "
                "or choose another --run-dir."
            )
        holder.kill()
    with RunDir.create(path, CONFIG, "resume") as run:
        assert run.stale_lock == f"process {holder.pid} on {socket.gethostname()}"
    with RunDir.create(path, CONFIG, "resume") as run:
        assert run.stale_lock == ""


def test_lock_held_by_a_child_that_outlived_its_parent_is_named(path: Path) -> None:
    code = (
        "import os, sys; from eggroll_llm.records.run_dir import RunDir; run = RunDir.create(sys.argv[1], 'x = 1')\n"
        "if os.fork() == 0: print(os.getppid(), flush=True); sys.stdin.read(); os._exit(0)\n"
        "os._exit(0)"
    )
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        holder.wait()
        message = refusal(path, foreseen=False)
        assert f"in use by a child of process {holder.pid} on {socket.gethostname()} (which has ended)" in message


def test_lock_is_released_on_close_though_a_child_lives_on(path: Path) -> None:
    """As a worker of a data loader does."""
    code = (
        "import os, sys; from eggroll_llm.records.run_dir import RunDir; run = RunDir.create(sys.argv[1], 'x = 1')\n"
        "if os.fork() == 0: sys.stdin.read(); os._exit(0)\n"
        "run.close(); print('closed', flush=True); os.wait()"
    )
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "closed\n"
        RunDir.create(path, CONFIG, "overwrite").close()


def test_lock_is_released_on_close_and_after_a_refusal(path: Path) -> None:
    first = RunDir.create(path, CONFIG)
    assert f"in use by process {os.getpid()} on" in refusal(path, foreseen=False)
    first.close()
    first.close()
    finished_run(path)
    refusal(path)
    RunDir.create(path, CONFIG, "resume").close()


def test_paths_that_cannot_be_run_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.touch()
    assert refusal(file) == f"{file}: is a file. Choose another --run-dir."
    assert refusal(file / "run") == f"{file}/run: {file} is not a folder. Choose another --run-dir."
    assert refusal(tmp_path / "no" / "run") == (
        f"{tmp_path}/no/run: the folder {tmp_path}/no does not exist. Create it, or choose another --run-dir."
    )
    assert not (tmp_path / "no").exists()
    assert refusal(tmp_path / "a" / ".." / "run") == (
        f'{tmp_path}/a/../run: contains "..". Write the directory out: {tmp_path}/run.'
    )
    assert refusal("a\0b") == "run directory 'a\\x00b': not a path. Name a directory."
    assert refusal("") == "run directory '': not a path. Name a directory."
    here = f"run directory '.': has no name. Write its path out: {Path.cwd()}."
    assert refusal(".") == refusal(Path()) == here
    assert refusal("\ud800") == "run directory '\\ud800': not a path. Name a directory."
    assert refusal(tmp_path / ("x" * 300)).endswith("Use a shorter name.")
    assert refusal("d/" * 3000).endswith("Use a shorter name.")
    monkeypatch.setattr(os, "access", lambda *_: False)
    (tmp_path / "readonly").mkdir()
    assert refusal(tmp_path / "readonly") == (
        f"{tmp_path}/readonly: is not writable. Change its permissions, or choose another --run-dir."
    )
    assert refusal(tmp_path / "new") == (
        f"{tmp_path}/new: the folder {tmp_path} is not writable. Change its permissions, or choose another --run-dir."
    )
    assert not (tmp_path / "new").exists()


def test_a_read_only_directory_is_refused(tmp_path: Path) -> None:
    """A real one, by a process that may do no more than the directory's owner, although tests may run as root."""
    folder = tmp_path / "folder"
    (folder / "run").mkdir(parents=True)
    for path in (folder / "run", folder):
        path.chmod(0o555)
    code = (
        "import sys; from eggroll_llm.records.run_dir import RunDir, RunDirError\n"
        "for path in sys.argv[1:]:\n"
        "    try: RunDir.create(path, 'steps = 1')\n"
        "    except RunDirError as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(folder / "run"), str(folder / "new")]
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, preexec_fn=without_override).stdout
    assert said.splitlines() == [
        f"{folder}/run: is not writable. Change its permissions, or choose another --run-dir.",
        f"{folder}/new: the folder {folder} is not writable. Change its permissions, or choose another --run-dir.",
    ]
    assert names(folder) == {"run"}
    assert not names(folder / "run")


def without_override() -> None:
    """Give up what lets root write where it may not (CAP_DAC_OVERRIDE, by PR_CAPBSET_DROP)."""
    if os.geteuid() == 0:
        assert ctypes.CDLL(None).prctl(24, 1, 0, 0, 0) == 0


def test_read_only_parent_names_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", fail)
    message = refusal(tmp_path / "run", foreseen=False)
    assert message.startswith(f"{tmp_path}/run: cannot write the run directory (Read-only file system; ")


def test_default_directory_is_made_with_its_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = default_run_dir("recipes/countdown_smollm2.toml", datetime(2026, 1, 2, 3, 4, 5))
    assert path == Path("runs/countdown_smollm2-20260102-030405")
    monkeypatch.chdir(tmp_path)
    RunDir.check(path, "fail")
    assert not list(tmp_path.iterdir())
    RunDir.create(path, CONFIG).close()
    assert is_run_dir(tmp_path / path)


def test_opening_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match=r"not a run directory \(no config\.toml and journal\.jsonl\)"):
        RunDir.open(tmp_path)
    with pytest.raises(RunDirError, match="not a path"):
        RunDir.open("a\0b")


def test_logs_are_strict_json_whatever_the_values(path: Path) -> None:
    class Scalar:
        def item(self) -> float:
            return float("inf")

    with RunDir.create(path, CONFIG) as run:
        run.append_metrics({"step": 1, "a": float("nan"), "b": Scalar(), "c": [1.5, {"d": float("-inf")}]})
        run.append_completions(
            [{"step": 1, "text": "\ud83d\ude00 \ud800 \x1b[31m\u2028\x00</script>\n\u202e"}, {"step": 1}]
        )
    assert lines(run.metrics) == [{"step": 1, "a": None, "b": None, "c": [1.5, {"d": None}]}]
    raw = run.completions.read_bytes()
    assert raw.isascii()
    assert raw.count(b"\n") == 2
    assert b"\x1b" not in raw
    assert lines(run.completions)[0]["text"] == "\U0001f600 \ufffd \x1b[31m\u2028\x00</script>\n\u202e"


def test_truncated_logs_hold_every_step_once(path: Path) -> None:
    with RunDir.create(path, CONFIG) as run:
        assert run.last_logged_step() is None
        run.truncate_logs(0)
        for step in range(5):
            run.append_metrics({"step": step, "x": step / 3})
            run.append_completions([{"step": step, "text": "a"}, {"step": step, "text": "b"}])
        whole = run.metrics.read_bytes()
        with run.metrics.open("ab") as file:
            file.write(b'{"step": 5, "x"')
        assert run.last_logged_step() == 4
        run.truncate_logs(4)
        assert run.metrics.read_bytes() == whole
        run.truncate_logs(2)
        assert [row["step"] for row in lines(run.metrics)] == [0, 1, 2]
        assert [row["step"] for row in lines(run.completions)] == [0, 0, 1, 1, 2, 2]
        run.append_metrics({"step": 3, "x": 1.0})
        run.append_metrics({"step": 4, "x": 4 / 3})
        assert run.metrics.read_bytes() == whole


@pytest.mark.parametrize("file", ["metrics.jsonl", "completions.jsonl"])
def test_damage_in_the_middle_of_a_log_is_not_repaired_silently(path: Path, file: str) -> None:
    with RunDir.create(path, CONFIG) as run:
        for step in range(4):
            run.append_metrics({"step": step})
            run.append_completions([{"step": step, "text": "a"}])
        damaged = (path / file).read_bytes().replace(b'"step": 2', b'"st\x00p": 2')
        (path / file).write_bytes(damaged)
        with pytest.raises(RunDirError, match=rf"{file}:3: is damaged\. Delete the line, or restore the file\."):
            run.truncate_logs(3)
        assert (path / file).read_bytes() == damaged
        run.truncate_logs(1)  # with what is dropped anyway
        assert [row["step"] for row in lines(path / file)] == [0, 1]


def test_a_line_nested_too_deeply_is_of_no_step(path: Path) -> None:
    with RunDir.create(path, CONFIG) as run:
        run.append_metrics({"step": 0})
        whole = run.metrics.read_bytes()
        with run.metrics.open("ab") as file:
            file.write(b'{"step": 1, "x": ' + b"[" * 2000 + b"]" * 2000 + b"}\n")
        assert run.last_logged_step() == 0
        with pytest.raises(RunDirError, match=r"metrics\.jsonl:2: is damaged"):
            run.read_metrics()
        run.truncate_logs(1)
        assert run.metrics.read_bytes() == whole


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_names_path_and_bytes(path: Path) -> None:
    with RunDir.create(path, CONFIG) as run:
        run.metrics.symlink_to("/dev/full")
        with pytest.raises(RunDirError, match=r"metrics\.jsonl: cannot write 12 bytes \(No space left on device"):
            run.append_metrics({"step": 1})


def test_full_disk_leaves_no_half_evaluation_and_the_old_model(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(*_: object) -> None:
        raise full

    def write(folder: Path) -> None:
        (folder / "model").write_text("newer")
        raise full

    with RunDir.create(path, CONFIG) as run:
        run.write_final(lambda folder: (folder / "model").write_text("old"))
        with pytest.raises(RunDirError) as info:
            run.write_final(write)
        said = re.escape(f"{path}/final: cannot write the final model (No space left on device after 5 bytes, which ")
        assert re.match(rf"{said}were removed again; \d+ bytes are free\)\. .* resume the run", str(info.value))
        assert (run.final / "model").read_text() == "old"
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            with pytest.raises(RunDirError, match=r"evaluations/step-000003\.jsonl: cannot write 30 bytes \(No space "):
                run.write_evaluation(3, {}, [])
        assert not list(run.evaluations.iterdir())
    assert not [name for name in names(path) if name.startswith((".tmp-", ".old-"))]


def test_a_file_that_could_not_be_read_for_it_is_named(path: Path, tmp_path: Path) -> None:
    """Such as one of the base model, which has been deleted meanwhile."""
    missing = tmp_path / "base" / "config.json"
    with RunDir.create(path, CONFIG) as run, pytest.raises(RunDirError) as info:
        run.write_final(lambda folder: (folder / "config.json").write_bytes(missing.read_bytes()))
    assert str(info.value).startswith(
        f"{path}/final: cannot write the final model (No such file or directory after 0 bytes, which were removed "
        f"again: {missing}; "
    )


def test_line_cut_short_by_a_full_disk_is_taken_back(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunDir.create(path, CONFIG) as run:
        run.append_metrics({"step": 1})
        before = run.metrics.read_bytes()
        real_open = Path.open

        class Disk:
            """A file on a disk with four bytes left."""

            def __init__(self, file: Any) -> None:
                self.file, self.left = file, 4

            def __enter__(self) -> "Disk":
                return self

            def __exit__(self, *_: object) -> None:
                self.file.close()

            def __getattr__(self, name: str) -> Any:
                return getattr(self.file, name)

            def write(self, data: bytes) -> int:
                if not self.left:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self.left, written = 0, self.file.write(data[: self.left])
                return written

        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", lambda *args, **kwargs: Disk(real_open(*args, **kwargs)))
            with pytest.raises(RunDirError, match="No space left on device"):
                run.append_metrics({"step": 2})
        assert run.metrics.read_bytes() == before
        run.append_metrics({"step": 2})
    assert [row["step"] for row in lines(run.metrics)] == [1, 2]
