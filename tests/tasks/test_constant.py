"""The best fixed pattern, against every expression that the pattern stands for."""

from pathlib import Path

import pytest

from eggroll_llm.config.recipe import load_recipe
from eggroll_llm.tasks.constant import Constant, best_constant
from eggroll_llm.tasks.load import load_task
from rewards import countdown

RECIPES = Path(__file__).parents[2] / "recipes"


def problem(target: int, *numbers: int) -> dict[str, object]:
    return {"id": "x", "numbers": list(numbers), "target": target}


def test_the_best_of_all_patterns_is_found() -> None:
    sums, differences = [problem(9, 4, 5), problem(12, 8, 4)], [problem(5, 4, 9), problem(1, 7, 6), problem(2, 3, 5)]
    found = best_constant("countdown", {"operators": "+-"}, sums + differences)
    assert found == Constant(pattern="a - b, largest first", accuracy=0.6)
    assert best_constant("countdown", {"operators": "+"}, sums + differences) == Constant(pattern="a + b", accuracy=0.4)
    assert best_constant("countdown", {}, [problem(20, 3, 2, 4)]) == Constant(
        pattern="(a + b) * c, as given", accuracy=1.0
    )


def test_each_count_of_numbers_has_a_pattern() -> None:
    found = best_constant(
        "countdown", {"operators": "+-"}, [problem(3, 1, 2), problem(6, 1, 2, 3), problem(0, 1, 2, 9)]
    )
    assert found == Constant(pattern="a + b; a + b + c", accuracy=2 / 3)


@pytest.mark.parametrize("target", [20, "20", 20.0])
def test_a_target_may_be_written_in_any_way(target: object) -> None:
    found = best_constant("countdown", {}, [{"numbers": [10, 10], "target": target}])
    assert found
    assert found.accuracy == 1


def test_nothing_divides_by_zero() -> None:
    found = best_constant("countdown", {"operators": "/"}, [problem(1, 0, 0)])
    assert found == Constant(pattern="a / b, as given", accuracy=0.0)


def test_only_countdown_has_patterns_and_only_of_few_numbers() -> None:
    assert best_constant("gsm8k", {}, [problem(9, 4, 5)]) is None
    assert best_constant("countdown", {}, []) is None
    assert best_constant("countdown", {}, [problem(9, 1, 1, 1, 1, 1, 4)]) is None
    assert best_constant("countdown", {}, [{"x": 1}]) is None


def test_the_grader_agrees_about_the_demo() -> None:
    """What the terminal says of the demo is what the demo's own grader gives a model that always subtracts."""
    config = load_recipe(RECIPES / "countdown_smollm2.toml")
    task = load_task(config.task, config.task_options, base_dir=RECIPES)
    held_out = task.problems("test")[: config.eval.problems]
    found = best_constant(config.task, config.task_options, held_out)
    assert found
    assert found.pattern == "a - b, largest first"
    right = [
        countdown.score(f"{max(p['numbers'])}-{min(p['numbers'])}", p["numbers"], p["target"], answer_format="line")
        for p in held_out
    ]
    assert found.accuracy == sum(score.correct for score in right) / len(held_out)
