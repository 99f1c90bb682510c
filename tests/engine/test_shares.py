"""The rule by which requests are shared out, as a property of any course of events."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eggroll_llm.engine.shares import Shares


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), max_size=30),
    capacity=st.integers(1, 40),
    engines=st.integers(1, 5),
    choices=st.lists(st.tuples(st.sampled_from(["answer", "lose", "join"]), st.integers(0, 10**6)), max_size=200),
)
def test_every_request_is_answered_once_in_whole_groups(
    sizes: list[int], capacity: int, engines: int, choices: list[tuple[str, int]]
) -> None:
    """Whatever order engines answer, die and join in; a first share is no larger than an equal part, up to a group."""
    numbers = iter(range(sum(sizes)))
    groups = [[next(numbers) for _ in range(size)] for size in sizes]
    shares: Shares[int] = Shares(groups, capacity)
    live = set(range(engines))
    holding: dict[int, list[int]] = {engine: [] for engine in live}
    answered: list[int] = []
    largest = max(sizes, default=0)

    def feed(engine: int) -> None:
        before = len(holding[engine])
        left = shares.unanswered - sum(map(len, holding.values()))
        taken = shares.take(engine, len(live))
        holding[engine] += taken
        equal = -(-left // len(live))
        assert len(taken) < equal + largest or not taken
        assert len(holding[engine]) < max(before + 1, capacity + largest)
        assert shares.held(engine) == len(holding[engine])
        for group in groups:  # of a group that nobody has begun to answer, all is with one engine
            if not set(group) & set(answered):
                assert len([e for e in holding if set(group) & set(holding[e])]) <= 1

    for engine in live:
        feed(engine)
    for what, number in [*choices, *[("answer", 0)] * (2 * sum(sizes) + 5)]:
        busy = sorted(engine for engine in live if holding[engine])
        if what == "answer" and busy:
            engine = busy[number % len(busy)]
            request = holding[engine].pop(number % len(holding[engine]))
            assert shares.answered(engine, request)
            assert not shares.answered(engine, request)
            answered.append(request)
            feed(engine)
        elif what == "lose" and len(live) > 1:
            engine = sorted(live)[number % len(live)]
            live.remove(engine)
            assert shares.lost(engine) == len(holding.pop(engine))
            for other in live:
                feed(other)
        elif what == "join":
            engine = max(live) + 1 + number
            live.add(engine)
            holding[engine] = []
            feed(engine)
    assert sorted(answered) == list(range(sum(sizes)))
    assert shares.unanswered == 0


@pytest.mark.slow
def test_two_simulated_engines_are_nearly_twice_as_fast() -> None:
    """By the rule, with the costs of the documentation's table."""
    root = Path(__file__).parents[2]
    command = [sys.executable, root / "scripts" / "simulate_engines.py", "--engines", "2"]
    printed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    found = [float(text) for text in re.findall(r"(\d\.\d\d) \|$", printed, re.MULTILINE)]
    assert len(found) == 6
    assert all(0.95 < efficiency <= 1 for efficiency in found)
