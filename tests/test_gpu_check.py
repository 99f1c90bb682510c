"""`scripts/gpu_check.sh`: a stand-in for Python takes the place of a machine with a GPU."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts/gpu_check.sh"
PYTHON = """#!/bin/sh
echo "$@" >>"$CALLS"
case "$*" in
*pytest*)
    echo ".....s [100%]"; [ -z "$SAYS" ] || echo "$SAYS"; echo "5 passed"
    case "$*" in *$ONLY) [ -z "$TESTS_TAKE" ] || exec sleep "$TESTS_TAKE" ;; esac
    exit "${TESTS_END:-0}" ;;
*bench*) echo "the table"; [ -z "$BENCH_TAKES" ] || exec sleep "$BENCH_TAKES"; exit "${BENCH_ENDS:-0}" ;;
*) echo "H100; torch 2" ;;
esac
"""

Check = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "scripts").mkdir()
    shutil.copy(SCRIPT, tmp_path / "scripts")
    for test in ("kernels/test_fold.py", "engine/test_engine.py", "engine/test_sampling_triton.py"):
        (tmp_path / "tests" / test).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tests" / test).touch()
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


@pytest.fixture
def check(checkout: Path) -> Check:
    def run(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHON": str(checkout / "python"), "CALLS": str(checkout / "calls")} | variables
        command = [str(checkout / "scripts/gpu_check.sh"), *words]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    return run


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    result = subprocess.run(
        [str(SCRIPT)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""},
        check=False,
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert "finds no CUDA GPU" in result.stderr


def test_the_tests_and_the_table_are_on_one_page(check: Check, checkout: Path) -> None:
    result = check()
    assert result.returncode == 0, result.stderr
    (checkout / "calls").unlink()
    result = check(SAYS="FAILED a - no", TESTS_END="1")
    assert result.returncode == 1
    page = result.stdout.splitlines()
    assert page[0].startswith("H100; torch 2; ")
    assert "FAILED a - no" in page
    assert [line for line in page if line in ("5 passed", "the table")] == [*["5 passed"] * 2, "the table", "5 passed"]
    assert not any(line.startswith(".....") for line in page)
    _, _, kernels, engines, bench, others = (checkout / "calls").read_text().splitlines()
    assert kernels.endswith(" --numprocesses=8 tests/kernels")
    assert engines.endswith(" tests/engine/test_sampling_triton.py")
    assert others.endswith(" tests/engine/test_engine.py")
    assert bench == (
        "-m eggroll_llm bench --random-weights qwen2.5-1.5b --variants population --repeats 2 "
        "--out build/gpu_check/bench.json"
    )
    assert (checkout / "build/gpu_check/bench.log").read_text() == "the table\n"


def test_arguments_are_those_of_the_benchmark(check: Check, checkout: Path) -> None:
    assert check("--random-weights", "qwen2.5-7b", OUT="out").returncode == 0
    (bench,) = [call for call in (checkout / "calls").read_text().splitlines() if " bench " in call]
    assert bench == "-m eggroll_llm bench --random-weights qwen2.5-7b --out out/bench.json"


@pytest.mark.parametrize("failure", [{"TESTS_END": "1"}, {"BENCH_ENDS": "2"}])
def test_a_failure_of_any_part_is_the_status_and_spares_the_others(check: Check, failure: dict[str, str]) -> None:
    result = check(**failure)
    assert result.returncode == 1
    assert "5 passed" in result.stdout
    assert "the table" in result.stdout


def test_what_takes_too_long_is_stopped_and_spares_the_rest(check: Check) -> None:
    result = check(TESTS_TAKE="60", SECONDS_IN_ALL="1")
    assert result.returncode == 1
    assert result.stdout.count("5 passed\nstopped after 1 s\n") == 3
    assert "the table" in result.stdout
    result = check(BENCH_TAKES="60", SECONDS_OF_BENCH="1")
    assert result.returncode == 1
    assert "the table\nstopped after 1 s\n" in result.stdout
    assert result.stdout.count("5 passed") == 3


def test_the_last_part_may_be_cut_off(check: Check) -> None:
    for said, status in (("", 0), ("FAILED a - no", 1)):
        result = check(TESTS_TAKE="60", ONLY="test_engine.py", SECONDS_IN_ALL="3", SAYS=said)
        assert result.returncode == status, result.stdout
        assert result.stdout.count("5 passed\nstopped after ") == 1
