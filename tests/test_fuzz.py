"""What holds of a grader holds of every input to start from, and of each with hypothesis's edits."""

import importlib.util
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from fuzz_graders import in_time
from fuzz_targets import TARGETS, Check, Target
from hypothesis import given
from hypothesis import strategies as st

FUZZ = Path(__file__).with_name("fuzz.py")


def edits(target: Target) -> st.SearchStrategy[list[tuple[int, int, bytes]]]:
    """Where, in thousandths of the input, how many bytes are taken away, and what is put there."""
    pieces = st.one_of(st.binary(max_size=4), *([st.sampled_from(target.words)] if target.words else []))
    return st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 40), pieces), max_size=6)


@pytest.mark.parametrize("name", TARGETS)
def test_inputs_to_start_from(name: str) -> None:
    for seed in TARGETS[name].seeds():
        TARGETS[name].check(seed)


@pytest.mark.parametrize("name", TARGETS)
def test_edited_inputs(name: str) -> None:
    target = TARGETS[name]

    @given(seed=st.sampled_from(target.seeds()), changes=edits(target))
    def holds(seed: bytes, changes: list[tuple[int, int, bytes]]) -> None:
        data = seed
        for thousandth, taken, put in changes:
            at = len(data) * thousandth // 1000
            data = data[:at] + put + data[at + taken :]
        target.check(data)

    holds()


def breaks(check: Check, data: bytes) -> bool:
    try:
        check(data)
    except Exception:
        return True
    return False


@pytest.mark.parametrize(
    ("name", "place", "wrong"),
    [
        ("countdown", "rewards.countdown._evaluate", lambda steps: Fraction(98)),
        ("countdown", "rewards.countdown._meets", lambda value, goal: True),
        ("gsm8k", "rewards.gsm8k._normalise", str.strip),
        ("gsm8k", "rewards.gsm8k.read_number", lambda text: text),
    ],
)
def test_what_is_wrong_is_noticed(name: str, place: str, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, wrong)
    assert any(breaks(TARGETS[name].check, seed) for seed in TARGETS[name].seeds())


def test_what_takes_long_is_noticed() -> None:
    assert in_time(lambda: 3, seconds=10.0) == 3
    with pytest.raises(AssertionError, match=r"took 0\.0\d\d s"):
        in_time(lambda: 3, seconds=0.0)


def fuzz(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, FUZZ, *arguments], capture_output=True, text=True)


def test_without_atheris_it_says_what_to_install() -> None:
    if importlib.util.find_spec("atheris"):
        pytest.skip("atheris is installed")
    result = fuzz("gsm8k")
    assert result.returncode == 2
    assert "atheris is not installed: pip install --no-deps atheris==3.0.0" in result.stderr


@pytest.mark.slow
@pytest.mark.fuzz
def test_with_atheris_it_fuzzes(tmp_path: Path) -> None:
    if not importlib.util.find_spec("atheris"):
        pytest.skip("atheris is not installed")
    result = fuzz("gsm8k", "--seconds=30", f"--corpus={tmp_path / 'corpus'}")
    numbers = r"gsm8k: [1-9]\d* inputs, [1-9]\d* edges, [1-9]\d* features, [1-9]\d* inputs kept, \d+ s: nothing found\n"
    assert re.search(numbers, result.stdout)
    assert any((tmp_path / "corpus").iterdir())
    assert result.returncode == 0
