"""The best constant answer: patterns against every expression that they stand for, gold answers against the grader."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from eggroll_llm.config.recipe import load_recipe
from eggroll_llm.records.baseline import Constant
from eggroll_llm.tasks.constant import best_constant, best_pattern
from eggroll_llm.tasks.load import load_task
from eggroll_llm.tasks.task import Answer, Verdict
from eggroll_llm.training.scorer import Scorer
from rewards import Score, countdown

RECIPES = Path(__file__).parents[2] / "recipes"


def problem(target: int, *numbers: int) -> dict[str, object]:
    return {"id": "x", "numbers": list(numbers), "target": target}


def test_the_best_of_all_patterns_is_found() -> None:
    sums, differences = [problem(9, 4, 5), problem(12, 8, 4)], [problem(5, 4, 9), problem(1, 7, 6), problem(2, 3, 5)]
    both = sums + differences
    assert best_pattern("+-", both) == Constant(pattern="a - b, largest first", accuracy=0.6, problems=5)
    assert best_pattern("+", both) == Constant(pattern="a + b", accuracy=0.4, problems=5)
    found = best_pattern("+-*/", [problem(20, 3, 2, 4)])
    assert found == Constant(pattern="(a + b) * c, as given", accuracy=1.0, problems=1)


def test_each_count_of_numbers_has_a_pattern() -> None:
    found = best_pattern("+-", [problem(3, 1, 2), problem(6, 1, 2, 3), problem(0, 1, 2, 9)])
    assert found == Constant(pattern="a + b; a + b + c", accuracy=2 / 3, problems=3)


@pytest.mark.parametrize("target", [20, "20", 20.0])
def test_a_target_may_be_written_in_any_way(target: object) -> None:
    found = best_pattern("+-*/", [{"numbers": [10, 10], "target": target}])
    assert found
    assert found.accuracy == 1


def test_nothing_divides_by_zero() -> None:
    found = best_pattern("/", [problem(1, 0, 0)])
    assert found == Constant(pattern="a / b, as given", accuracy=0.0, problems=1)


def test_only_few_numbers_have_patterns() -> None:
    assert best_pattern("+", []) is None
    assert best_pattern("+", [problem(9, 1, 1, 1, 1, 1, 4)]) is None
    assert best_pattern("+", [{"x": 1}]) is None


class Words:
    """Problems with an answer each; a completion is right when it ends in the answer."""

    def __init__(self, train: str, test: str, *, answers: bool = True) -> None:
        self.rows, self.answers = {"train": [{"a": a} for a in train], "test": [{"a": a} for a in test]}, answers
        self.judged = self.read = 0

    def gold(self, problem: Mapping[str, Any]) -> str | None:
        return None if problem["a"] == "-" else f"because {id(problem)}, so {problem['a']}"

    def answer(self, answer: Answer) -> str | None:
        raise AssertionError("called where nothing limits it")

    def judge(self, answers: Sequence[Answer], *, voted: bool = False) -> Iterator[Verdict]:
        for answer in answers:
            self.read += voted
            self.judged += not voted
            vote = answer.text[-1] if voted and self.answers else None
            yield Verdict(score=Score(1.0, answer.text[-1] == answer.problem["a"], ""), vote=vote)

    def best(self, **options: Any) -> Constant | None:
        task: Any = self
        return best_constant(task, self.rows["train"], self.rows["test"], self.judge, **options)


def test_of_frequent_gold_answers_the_one_that_the_task_grades_best_is_found() -> None:
    """Most frequent in training is x; y is right more often on the held-out problems, z is never in training."""
    assert Words("xxxyy-", "xyyzzzz").best() == Constant(pattern="y", accuracy=2 / 7, problems=7)
    assert Words("---", "xy").best() is None  # no gold answers


def test_answers_that_cannot_be_read_are_told_apart_by_their_text() -> None:
    found = Words("xy", "yy", answers=False).best()
    assert found
    assert found.accuracy == 1
    assert found.pattern.startswith("because ")


def test_the_work_is_bounded_by_number_and_by_time() -> None:
    many = Words("".join(map(chr, range(97, 97 + 20))), "abc")
    assert many.best()
    assert many.judged == 16 * 3
    slow = Words("xy", "xy")
    assert slow.best(seconds=-1.0) is None
    assert (slow.read, slow.judged) == (1, 1)


def test_what_gold_answers_hold_does_nothing_to_a_terminal() -> None:
    found = Words("\x1b", "\x1b").best()
    assert found
    assert found.pattern == "\\x1b"


def test_sums_and_their_kinds() -> None:
    """The constant answer of the recipe that no constant answer solves, through the processes of its own score."""
    config = load_recipe(RECIPES / "addition_smollm2.toml")
    task = load_task(config.task, config.task_options, base_dir=RECIPES)
    held_out = task.problems("test")
    with Scorer(task) as scorer:
        found = best_constant(task, task.problems("train"), held_out, scorer.judge)
        assert (scorer.scored, scorer.failures) == (0, 0)
    assert found == Constant(pattern="107", accuracy=9 / 512, problems=512)
    assert task.kind({"a": 15, "b": 15}) == "carry"
    assert task.kind({"a": 15, "b": 14}) == "no carry"


def test_the_grader_agrees_about_two_numbers() -> None:
    """What the terminal says of Countdown is what its own grader gives a model that always subtracts."""
    config = load_recipe(RECIPES / "countdown_smollm2.toml")
    task = load_task(config.task, config.task_options, base_dir=RECIPES)
    held_out = task.problems("test")[: config.eval.problems]
    found = best_constant(task, task.problems("train"), held_out, lambda answers: [])
    assert found
    assert found.pattern == "a - b, largest first"
    right = [
        countdown.score(f"{max(p['numbers'])}-{min(p['numbers'])}", p["numbers"], p["target"], answer_format="line")
        for p in held_out
    ]
    assert found.accuracy == sum(score.correct for score in right) / len(held_out)
    assert Counter(map(task.kind, held_out)) == {"sum": 247, "difference": 265}
