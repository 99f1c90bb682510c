"""Accuracies by kind of problem, and the constant answer in the file of an evaluation."""

import pytest

from eggroll_llm.records.answers import TASK, Graded, Sample, read_samples, write_samples
from eggroll_llm.records.baseline import Constant, Share, by_kind


def samples(*kinds: str) -> list[Sample]:
    """One answer a problem; every other one is right, from the first on."""
    grades = [Graded(correct=i % 2 == 0, reward=0.0, detail="") for i in range(len(kinds))]
    return [
        Sample(
            problem=i, sample=0, id=i, doc={}, prompt_hash="", completion="", tokens=1, truncated=False,
            scores={TASK: grade}, kind=kind,
        )
        for i, (kind, grade) in enumerate(zip(kinds, grades, strict=True))
    ]  # fmt: skip


def test_kinds_are_in_the_order_of_their_numbers() -> None:
    found = by_kind(samples("10 steps", "2 steps", "2 steps", "", "sum"))
    assert list(found.items()) == [
        ("sum", Share(accuracy=1.0, problems=1)),
        ("2 steps", Share(accuracy=0.5, problems=2)),
        ("10 steps", Share(accuracy=1.0, problems=1)),
    ]
    assert by_kind(samples("sum", "sum", "")) == {}


def test_the_rarest_of_many_kinds_count_together() -> None:
    found = by_kind(samples(*"aabbccddeeffgghhiijjkkllmmnnooppqqrrsstt", "u", "v"))
    assert list(found)[-2:] == ["t", "others"]
    assert found["others"] == Share(accuracy=0.5, problems=2)


def test_a_file_without_kinds_is_the_file_of_before_there_were_kinds(tmp_path) -> None:
    path, constant = tmp_path / "answers.jsonl", Constant(pattern="7", accuracy=0.25, problems=4)
    given = samples("", "sum")
    write_samples(path, constant.settings(), given)
    settings, found = read_samples(path)
    assert (Constant.of(settings), found) == (constant, given)
    plain, kind = path.read_text().splitlines()[1:]
    assert ("kind" in plain, '"kind": "sum"' in kind) == (False, True)


@pytest.mark.parametrize("damaged", [{}, {"constant": None}, {"constant": {"pattern": "7"}}, {"constant": [1]}])
def test_what_is_no_constant_answer_is_none(damaged) -> None:
    assert Constant.of(damaged) is None
