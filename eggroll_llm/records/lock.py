"""The lock on a run directory.

It is the kernel's (`flock`), so it ends with its process however that dies; pid and host are written into the
lock file only to name the holder. A holder still named when the lock is free died without closing it.
"""

import contextlib
import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eggroll_llm.errors import RunDirError
from eggroll_llm.system.files import try_lock, unlock
from eggroll_llm.system.jsonl import parse_json


class RunLock:
    """The lock, held from construction to `close`. Raises RunDirError when another process has it."""

    def __init__(self, file: Path) -> None:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            locked = try_lock(descriptor)
        except OSError as error:
            os.close(descriptor)
            raise RunDirError(
                f"{file}: the file system has no file locks ({error.strerror}). Put the run directory on another one."
            ) from None
        if not locked:
            holder = _read_holder(descriptor)
            os.close(descriptor)
            raise RunDirError(
                f"{file.parent}: in use by {_name_holder(holder)}. Wait for it, stop it, or choose another --run-dir."
            )
        self._descriptor: int | None = descriptor
        holder = _read_holder(descriptor)
        self.stale = _describe_process(holder) if holder else ""
        """Holder that died without releasing the lock; empty when there was none."""
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
            os.fsync(descriptor)
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Release the lock; a second call does nothing."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, 0)
            unlock(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = None


def holder_of(file: Path) -> str:
    """Return which process holds the lock, as its file says; empty when none does, or one that is dead.

    The lock itself is not tried, which would be in the way of a run that starts.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError:
        return ""
    try:
        holder = _read_holder(descriptor)
    finally:
        os.close(descriptor)
    return _describe_process(holder) if holder and not _is_dead(holder) else ""


def _read_holder(descriptor: int) -> dict[str, Any]:
    """Content of the lock file; empty after a proper end."""
    try:
        holder = parse_json(os.pread(descriptor, 4096, 0) or b"{}")
    except ValueError:
        return {"pid": "unknown"}
    return holder if isinstance(holder, dict) else {"pid": "unknown"}


def _describe_process(holder: Mapping[str, Any]) -> str:
    return f"process {holder.get('pid', 'unknown')} on {holder.get('host', 'unknown')}"


def _name_holder(holder: Mapping[str, Any]) -> str:
    """Return the process named in the file or, when that one is gone, a child that inherited the lock."""
    name = _describe_process(holder)
    return f"a child of {name} (which has ended)" if _is_dead(holder) else name


def _is_dead(holder: Mapping[str, Any]) -> bool:
    """Return whether the process was one of this machine and has ended."""
    pid = holder.get("pid")
    here = holder.get("host") == socket.gethostname() and Path("/proc/self").exists()
    return here and isinstance(pid, int) and not Path(f"/proc/{pid}").exists()
