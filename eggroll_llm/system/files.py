"""Write files and directories so that after a kill or a power failure they are there in full or not at all.

Everything is written under a temporary name next to its target, fsynced, and renamed; a rename within a
directory is atomic, and durable once the directory itself is fsynced.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import zlib
from collections.abc import Callable
from io import FileIO
from pathlib import Path

from eggroll_llm.errors import ConfigError

_STAGING, _RETIRED = ".tmp-", ".old-"


def fsync_directory(path: Path) -> None:
    """Make the entries of a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content in hex digits. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def staging_of(path: Path) -> Path:
    """Return the temporary name beside `path`, of fixed length, of what is not whole: being written or removed."""
    return path.parent / f"{_STAGING}{zlib.crc32(os.fsencode(path.name)):08x}-{os.getpid():07}"


def write_text(path: Path, text: str) -> None:
    """Replace a file; after an error the old one is still there. Raises OSError."""
    staging = staging_of(path)
    try:
        with staging.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        staging.replace(path)
        fsync_directory(path.parent)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise


def append(file: FileIO, data: bytes, *, durable: bool = False) -> None:
    """Write all of `data` at the end of an unbuffered file, if `durable` to the disk; after an error nothing is there.

    Raises OSError.
    """
    size, done = os.fstat(file.fileno()).st_size, 0
    try:
        while done < len(data):
            done += file.write(data[done:])
        if durable:
            os.fsync(file.fileno())
    except OSError:
        with contextlib.suppress(OSError):
            file.truncate(size)
        raise


def try_lock(descriptor: int) -> bool:
    """Take the lock on an open file and return True, or False when somebody has it.

    Raises OSError where the file system has no locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def unlock(descriptor: int) -> None:
    """Release the lock on an open file; closing it is not enough, as a forked child may have it, too."""
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def replace_directory(target: Path, write: Callable[[Path], None]) -> None:
    """Call `write` on an empty directory and rename it to `target`; after an error the old `target` is unchanged.

    Raises:
        OSError: from writing, also when a library wrapped it, with the bytes already written.
        Whatever else `write` raises.
    """
    staging = staging_of(target)
    retired = target.parent / f"{_RETIRED}{target.name}"
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        write(staging)
        fsync_tree(staging)
        # A directory cannot be renamed over a full one. `recover` undoes half of it.
        if target.exists():
            shutil.rmtree(retired, ignore_errors=True)
            target.rename(retired)
        staging.rename(target)
        fsync_directory(target.parent)
    except BaseException as error:
        written = sum(path.stat().st_size for path in staging.rglob("*") if path.is_file())
        shutil.rmtree(staging, ignore_errors=True)
        if retired.exists() and not target.exists():
            retired.rename(target)
        if cause := of_the_system(error):
            reason = f"{cause.strerror or cause} after {written} bytes, which were removed again"
            raise OSError(cause.errno, reason, cause.filename) from error
        raise
    shutil.rmtree(retired, ignore_errors=True)


def of_the_system(error: BaseException) -> OSError | None:
    """Return the system's error behind this one, which safetensors or `torch.save` may have wrapped; else None."""
    if isinstance(error, OSError):
        return error
    text = str(error).partition("\n")[0]
    if type(error).__name__ == "SafetensorError" and (code := re.search(r"\(os error (\d+)\)", text)):
        return OSError(int(code[1]), os.strerror(int(code[1])))
    # Where torch writes its files, small and large ones; it does not say why it cannot.
    if isinstance(error, RuntimeError) and re.search("iostream error|inline_container", text):
        return OSError(f"torch.save failed: {text}")
    return None


def remove_directory(target: Path) -> None:
    """Delete a directory without ever showing a half-deleted one under its name.

    What a file system keeps of it for a while, as NFS does of open files, `recover` removes.
    """
    staging = staging_of(target)
    target.rename(staging)
    shutil.rmtree(staging, ignore_errors=True)


def recover(parent: Path) -> list[str]:
    """Remove or restore what a killed process left in the middle of a replacement; return the names."""
    found = sorted(path for path in parent.iterdir() if path.name.startswith((_STAGING, _RETIRED)))
    for path in found:
        target = parent / path.name.removeprefix(_RETIRED)
        if path.name.startswith(_RETIRED) and not target.exists():
            path.rename(target)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    return [path.name for path in found]


def fsync_tree(root: Path) -> None:
    """Make every file and directory below `root`, and `root`, durable."""
    for folder, _, names in os.walk(root, topdown=False):
        for name in names:
            with Path(folder, name).open("rb") as file:
                os.fsync(file.fileno())
        fsync_directory(Path(folder))


def describe_failure(path: Path, error: OSError, wanted: str) -> str:
    """Return a sentence with the path, the cause, what was to be written (with its size) and the bytes free."""
    try:
        free = f"{shutil.disk_usage(path if path.is_dir() else path.parent).free} bytes are free"
    except OSError:
        free = "free space unknown"
    cause, file = error.strerror or error, error.filename
    if isinstance(file, str) and not Path(file).is_relative_to(path.parent):  # it may be one that was to be read
        cause = f"{cause}: {file}"
    remedy = "Use a shorter name." if error.errno == errno.ENAMETOOLONG else "Free space or check permissions."
    return f"{path}: cannot write {wanted} ({cause}; {free}). {remedy}"


def check_output_file(out: Path, example: str) -> None:
    """Raise ConfigError for an `--out` that cannot be a file; `example` is a name that could."""
    try:
        is_folder = out.is_dir()
    except OSError as error:
        raise ConfigError(f"--out {describe_failure(out, error, 'it')}") from error
    if is_folder or not out.name:
        raise ConfigError(f"--out {out}: is a folder: name a file in it, such as {out / example}")
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: the folder {out.parent} does not exist: create it")


def write_output_file(out: Path, text: str) -> None:
    """Replace the file that `--out` names. Raises ConfigError when it cannot be written; the old one is still there."""
    try:
        write_text(out, text)
    except OSError as error:
        raise ConfigError(f"--out {describe_failure(out, error, f'{len(text.encode())} bytes')}") from error


def cache_root() -> Path:
    """Return the cache of models and kernels: $EGGROLL_CACHE, or eggroll-llm in $XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("EGGROLL_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "eggroll-llm"
