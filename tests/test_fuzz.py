"""What is fuzzed holds of every input to start from, of each with hypothesis's edits, and of what fuzzing has found."""

import pytest
from fuzz_targets import TARGETS, Target, checking
from hypothesis import given, settings
from hypothesis import strategies as st


def edits(target: Target) -> st.SearchStrategy[list[tuple[int, int, bytes]]]:
    """Where, in thousandths of the input, how many bytes are taken away, and what is put there."""
    pieces = st.one_of(st.binary(max_size=4), *([st.sampled_from(target.words)] if target.words else []))
    return st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 40), pieces), max_size=6)


@pytest.mark.parametrize("name", TARGETS)
def test_inputs_to_start_from(name: str) -> None:
    with checking(TARGETS[name]) as check:
        for seed in TARGETS[name].seeds():
            check(seed)


@pytest.mark.parametrize("name", TARGETS)
def test_edited_inputs(name: str) -> None:
    target = TARGETS[name]

    @settings(max_examples=200, deadline=None)
    @given(seed=st.sampled_from(target.seeds()), changes=edits(target))
    def holds(seed: bytes, changes: list[tuple[int, int, bytes]]) -> None:
        data = seed
        for thousandth, taken, put in changes:
            at = len(data) * thousandth // 1000
            data = data[:at] + put + data[at + taken :]
        check(data)

    with checking(target) as check:
        holds()
