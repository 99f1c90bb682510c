"""The C++ of this package as a shared library: compiled once per machine into the user's cache, without a word.

Where that fails `library()` is None, callers compute with torch operations instead, and `doctor` gives the reason.
"""

import ctypes
import hashlib
import os
import platform
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from eggroll_llm.system.files import cache_root
from eggroll_llm.system.hardware import cpu_flags, cxx_compiler

HERE = Path(__file__).parent
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-std=c++17")
SOURCES: dict[str, tuple[str, ...]] = {  # with flags of their own
    "member_term.cpp": (),
    "norms.cpp": (),
    "fold.cpp": (),
    "integer.cpp": (),
    "noise.cpp": ("-ffp-contract=off", "-fno-math-errno"),  # a fused multiply-add would change the bits
}
HEADERS = ("vector.h",)
TIMEOUT = 120  # seconds for the compiler; it takes about ten


class BuildError(RuntimeError):
    """The library cannot be built here. The message gives the reason in one line."""


@cache
def library() -> ctypes.CDLL | None:
    """Return the loaded library; None where it cannot be built."""
    try:
        return ctypes.CDLL(str(build()))
    except (BuildError, OSError):
        return None


def build() -> Path:
    """Return the compiled library, compiling it on the first call. Raises BuildError."""
    compiler = cxx_compiler()
    if compiler is None:
        raise BuildError("no g++ or clang++")
    path = cache_root() / "kernels" / f"eggroll-{_build_id(compiler)}.so"
    if os.path.isfile(path):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=path.parent) as directory:
            objects = []
            for source, flags in SOURCES.items():
                objects.append(str(Path(directory, source).with_suffix(".o")))
                _run(compiler, *FLAGS, *flags, "-c", str(HERE / source), "-o", objects[-1])
            built = Path(directory, path.name)
            _run(compiler, *FLAGS, "-shared", *objects, "-o", str(built))
            with built.open("rb") as file:
                os.fsync(file.fileno())  # an empty file in its place would never be compiled again
            built.replace(path)
    except OSError as error:
        raise BuildError(f"{compiler}: {error}") from error
    return path


def _run(compiler: str, *arguments: str) -> None:
    try:
        subprocess.run([compiler, *arguments], check=True, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        raise BuildError(f"{compiler} took more than {TIMEOUT} s") from None
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if "error" in line] or [f"status {error.returncode}"]
        raise BuildError(f"{compiler}: {lines[0]}") from error


def _build_id(compiler: str) -> str:
    """Sources, flags, compiler, processor: what is built with -march=native must not be loaded on another machine."""
    texts = [(HERE / name).read_text(encoding="utf-8") for name in (*SOURCES, *HEADERS)]
    flags = [flag for own in (FLAGS, *SOURCES.values()) for flag in own]
    parts = (*texts, *flags, compiler, platform.machine(), platform.processor(), *sorted(cpu_flags()))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
