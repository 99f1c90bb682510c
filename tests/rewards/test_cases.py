"""Graded answers, one a line: our own, and those in `shared/cases` next to the checkout where it exists."""

import json
from pathlib import Path

import pytest

import rewards

HERE = Path(__file__).parent
FOLDERS = {"own": HERE, "shared": HERE.parents[2] / "shared" / "cases"}


def rows(folder: str, task: str) -> list[dict]:
    path = FOLDERS[folder] / (f"cases_{task}.jsonl" if folder == "own" else f"{task}.jsonl")
    if folder == "shared" and not path.is_file():
        pytest.skip(f"{path} is not here")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("folder", FOLDERS)
def test_countdown_cases(folder):
    wrong = []
    for row in rows(folder, "countdown"):
        options = {name: row[name] for name in ("use_all", "answer_format", "thought_open") if name in row}
        score = rewards.countdown.score(row["completion"], row["numbers"], row["target"], **options)
        verdict = {1.0: "correct", 0.1: "format", 0.0: "none"}[score.reward]
        assert score.correct == (verdict == "correct")
        assert score.detail in rewards.countdown.DETAILS
        if verdict != row["expect"]:
            wrong.append((row["why"], row["completion"][:80], row["expect"], score))
    assert wrong == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_gsm8k_cases(folder):
    wrong = []
    for row in rows(folder, "gsm8k"):
        options = {name: row[name] for name in ("truncated", "thought_open") if name in row}
        score = rewards.gsm8k.score(row["completion"], row["answer"], **options)
        assert score.reward == float(score.correct)
        assert score.detail in rewards.gsm8k.DETAILS
        if score.correct != row["accept"]:
            wrong.append((row["why"], row["completion"][:80], row["accept"], score))
    assert wrong == []


def test_own_lists_are_long_and_have_no_repetitions():
    for task in ("countdown", "gsm8k"):
        keys = [json.dumps({**row, "why": ""}, sort_keys=True) for row in rows("own", task)]
        assert len(keys) > 60
        assert len(set(keys)) == len(keys)
