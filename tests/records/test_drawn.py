"""Answers that several steps learn from, kept on disk."""

import dataclasses
import math
from pathlib import Path

import pytest

from eggroll_llm.records.drawn import Drawn, drawn_text, read_drawn

DRAWN = Drawn(
    step=3,
    indices=(7, 2),
    token_ids=(((1, 2), (3,)), ((4,), (5, 6, 7))),
    rewards=((0.1, 1.0), (0.0, -2.5)),
    logprobs=(-0.10000000149011612, -1e-30, -12.0),
    metrics={"reward/mean": -0.35, "completions": 0},
)


def test_answers_come_back_to_the_bit(tmp_path: Path) -> None:
    path = tmp_path / "drawn.json"
    assert read_drawn(path) is None
    path.write_text(drawn_text(DRAWN))
    assert read_drawn(path) == DRAWN
    path.write_text(drawn_text(dataclasses.replace(DRAWN, step=4, rewards=((math.inf, -math.inf), (0.0, 1.0)))))
    found = read_drawn(path)
    assert found is not None
    assert (found.step, found.rewards[0]) == (4, (math.inf, -math.inf))


@pytest.mark.parametrize("text", ["", "[]", "3", '{"step": 1}', "{" * 100_000, "\0", '"'])
def test_what_is_not_ours_is_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "drawn.json"
    path.write_text(text)
    assert read_drawn(path) is None


def test_every_cut_of_the_file_is_none(tmp_path: Path) -> None:
    path = tmp_path / "drawn.json"
    path.write_text(drawn_text(DRAWN))
    whole = path.read_text()
    for length in range(len(whole.rstrip())):
        path.write_text(whole[:length])
        assert read_drawn(path) is None
