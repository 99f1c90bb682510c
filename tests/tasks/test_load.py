"""load_task: names, options, a user's own file, and the check of gold answers."""

import math
import textwrap

import pytest

from eggroll_llm.errors import ConfigError, TaskError
from eggroll_llm.tasks import check_golds, load_task
from rewards import Score

TASK = """
from rewards import Score

class Reverse:
    def problems(self, split):
        return [{"word": "drawer"}, {"id": "mine", "word": "stop"}]
    def prompt(self, problem):
        return f"Reverse {problem['word']}:"
    def score(self, completion, problem):
        return float(completion == problem["word"][::-1])

class Full(Reverse):
    stop = ["\\n"]
    notes = ("short",)
    def __init__(self, bonus=0.0):
        self.bonus = bonus
    def score(self, completion, problem, truncated=False):
        return Score(-1.0 if truncated else 1.0 + self.bonus, not truncated, "full")
    def gold(self, problem):
        return "x"
    def answer(self, completion):
        return len(completion) or None

TASK = Reverse()
FULL = Full()
WORDS = 3
class NoPrompt:
    problems = score = print
class Empty(Reverse):
    def problems(self, split):
        return [] if split == "test" else super().problems(split)
class Texts(Reverse):
    def problems(self, split):
        return ["drawer"]
class WrongGold(Reverse):
    def gold(self, problem):
        return "pots"
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mine.py").write_text(TASK, encoding="utf-8")
    return tmp_path


def test_a_user_task_is_completed(folder):
    task = load_task("mine.py:TASK", {}, base_dir=folder)
    assert task.problems("train") == [{"id": "train-1", "word": "drawer"}, {"id": "mine", "word": "stop"}]
    assert task.problems("test")[0]["id"] == "test-1"
    assert task.prompt(task.problems("train")[1]) == "Reverse stop:"
    assert (task.stop, task.notes, task.gold(task.problems("test")[0])) == ((), (), None)
    assert task.score("reward", {"word": "drawer"}, truncated=True) == Score(1.0, True, "reward")
    assert task.score("drawer", {"word": "drawer"}) == Score(0.0, False, "reward")


def test_a_user_task_gets_what_it_asks_for(folder):
    task = load_task("mine.py:FULL", {}, base_dir=folder)
    assert (task.stop, task.notes) == (("\n",), ("short",))
    assert task.score("", {}, truncated=True) == Score(-1.0, False, "full")
    assert load_task("mine.py:Full", {"bonus": 2.0}, base_dir=folder).score("", {}).reward == 3.0


def test_what_a_majority_votes_on_is_the_users_or_nothing(folder):
    full, plain = (load_task(f"mine.py:{name}", {}, base_dir=folder) for name in ("FULL", "TASK"))
    assert [full.answer(text) for text in ("abc", "")] == ["3", None]
    assert plain.answer("abc") is None


@pytest.mark.parametrize(
    ("value", "score"),
    [
        (True, Score(1.0, True, "reward")),
        (0.5, Score(0.5, False, "reward")),
        (2, Score(2.0, True, "reward")),
        (math.inf, Score(math.inf, True, "reward")),
    ],
)
def test_numbers_become_scores(folder, value, score):
    assert user_score(folder, value) == score


@pytest.mark.parametrize("value", [None, "1", [1.0], {}, 1j, math.nan])
def test_anything_else_becomes_nan(folder, value):
    score = user_score(folder, value)
    assert math.isnan(score.reward)
    assert not score.correct


def test_tensors_with_one_number_become_scores(folder):
    torch = pytest.importorskip("torch")
    assert user_score(folder, torch.tensor(1.0)) == Score(1.0, True, "reward")
    assert user_score(folder, torch.tensor([0.5])) == Score(0.5, False, "reward")
    assert math.isnan(user_score(folder, torch.tensor([0.5, 1.0])).reward)


def user_score(folder, value):
    task = load_task("mine.py:TASK", {}, base_dir=folder)
    task.inner.score = lambda completion, problem: value
    return task.score("", {})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("countdwn", {}, 'task = "countdwn" is not known. .* Did you mean "countdown"'),
        ("yours.py:TASK", {}, "yours.py: there is no such file"),
        ("mine.py:TAKS", {}, "mine.py: there is no TAKS in it. Did you mean TASK"),
        ("mine.py:WORDS", {}, "mine.py: WORDS has no method problems"),
        ("mine.py:NoPrompt", {}, "mine.py: NoPrompt has no method prompt"),
        ("mine.py:TASK", {"bonus": 1}, "TASK is an object, so it takes no task_options, but bonus is set"),
        ("mine.py:Full", {"bonsu": 1}, "Full does not accept task_options .*bonsu"),
        ("mine.py:Empty", {}, r'mine.py: problems\("test"\) is empty'),
        ("mine.py:Texts", {}, r"mine.py: problems\(\"train\"\) holds 'drawer', which is not a dict"),
        ("mine.py:WrongGold", {}, r"'train-1' \(train\): its own gold answer scores 0 \(reward\)"),
    ],
)
def test_mistakes_are_named(folder, name, options, message):
    with pytest.raises(TaskError, match=message):
        load_task(name, options, base_dir=folder)


@pytest.mark.parametrize("code", ["import nothing_of_that_name", "1 / 0", "def f(:", "raise SystemExit(3)"])
def test_a_file_that_cannot_be_imported(tmp_path, code):
    (tmp_path / "broken.py").write_text(code, encoding="utf-8")
    with pytest.raises(TaskError, match=r"broken.py: importing it failed: \w+"):
        load_task("broken.py:TASK", {}, base_dir=tmp_path)


def test_a_user_task_may_define_dataclasses(tmp_path):
    code = """
        from __future__ import annotations
        from dataclasses import dataclass
        @dataclass
        class Task:
            size: int = 1
            def problems(self, split): return [{"n": n} for n in range(self.size)]
            def prompt(self, problem): return [{"role": "user", "content": "?"}]
            def score(self, completion, problem, **anything): return anything["truncated"]
    """
    (tmp_path / "mine.py").write_text(textwrap.dedent(code), encoding="utf-8")
    task = load_task("mine.py:Task", {"size": 2}, base_dir=tmp_path)
    assert len(task.problems("train")) == 2
    assert task.score("", {}, truncated=True).reward == 1.0


def test_unknown_and_ill_typed_options(tmp_path):
    with pytest.raises(ConfigError, match=r"recipe.toml.*task_options.sede.*task_options.seed"):
        load_task("countdown", {"sede": 1}, base_dir=tmp_path, source="recipe.toml")
    with pytest.raises(ConfigError, match=r"task_options.count"):
        load_task("countdown", {"count": 2}, base_dir=tmp_path)
    with pytest.raises(ConfigError, match=r"task_options.prompt_style"):
        load_task("gsm8k", {"prompt_style": "tinyzero"}, base_dir=tmp_path)


def test_check_golds_catches_a_grader_that_refuses_its_own_gold(folder):
    task = load_task("mine.py:FULL", {}, base_dir=folder)
    check_golds(task)
    task.inner.score = lambda completion, problem, truncated: Score(math.nan, False, "nan")
    with pytest.raises(TaskError, match="its own gold answer scores nan"):
        check_golds(task)
