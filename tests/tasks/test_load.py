"""load_task: names, options, a user's own file, and the check of gold answers."""

import math
import textwrap

import pytest
from scored import grade, written

from eggroll_llm.config.recipe import sourced
from eggroll_llm.config.toml import Origin
from eggroll_llm.engine.interface import Completion
from eggroll_llm.errors import ConfigError, TaskError
from eggroll_llm.tasks.load import load_task
from eggroll_llm.tasks.task import check_golds
from eggroll_llm.training.scorer import Scorer
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
    assert task.kind(task.problems("test")[0]) == ""
    assert task.score(written("reward", {"word": "drawer"}, truncated=True)) == Score(1.0, True, "reward")
    assert task.score(written("drawer", {"word": "drawer"})) == Score(0.0, False, "reward")


def test_a_user_task_gets_what_it_asks_for(folder):
    task = load_task("mine.py:FULL", {}, base_dir=folder)
    assert (task.stop, task.notes) == (("\n",), ("short",))
    assert task.score(written("", truncated=True)) == Score(-1.0, False, "full")
    assert load_task("mine.py:Full", {"bonus": 2.0}, base_dir=folder).score(written("")).reward == 3.0


def test_what_a_majority_votes_on_is_the_users_or_nothing(folder):
    full, plain = (load_task(f"mine.py:{name}", {}, base_dir=folder) for name in ("FULL", "TASK"))
    assert [full.answer(written(text)) for text in ("abc", "")] == ["3", None]
    assert plain.answer(written("abc")) is None


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


@pytest.mark.parametrize("value", [None, "1", [1.0], [], (1.0, 0.5), {}, 1j])
def test_anything_else_is_an_error_that_says_what_it_was(folder, value):
    with pytest.raises(TypeError, match=r"score\(\) returned .*; return a number or a rewards.Score") as info:
        user_score(folder, value)
    assert f"returned {value!r};" in str(info.value)


def test_nan_is_a_number(folder):
    score = user_score(folder, math.nan)
    assert math.isnan(score.reward)
    assert not score.correct


def test_tensors_with_one_number_become_scores(folder):
    torch = pytest.importorskip("torch")
    assert user_score(folder, torch.tensor(1.0)) == Score(1.0, True, "reward")
    assert user_score(folder, torch.tensor([0.5])) == Score(0.5, False, "reward")
    for several in (torch.tensor([0.5, 1.0]), torch.tensor([])):
        with pytest.raises(TypeError, match=r"score\(\) returned tensor\("):
            user_score(folder, several)


def user_score(folder, value):
    task = load_task("mine.py:TASK", {}, base_dir=folder)
    task.inner.score = lambda completion, problem: value
    return task.score(written(""))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("countdwn", {}, 'task = "countdwn" is not known. .* Did you mean "countdown"'),
        ("yours.py:TASK", {}, "yours.py: there is no such file"),
        ("mine.py:TAKS", {}, "mine.py: does not define TAKS. Did you mean TASK"),
        ("mine.py:WORDS", {}, "mine.py: WORDS has no method problems"),
        ("mine.py:NoPrompt", {}, "mine.py: NoPrompt has no method prompt"),
        ("mine.py:TASK", {"bonus": 1}, "TASK is an object, so it takes no task_options, but bonus is set"),
        ("mine.py:Full", {"bonsu": 1}, "Full does not accept task_options .*bonsu"),
        ("mine.py:Empty", {}, r'mine.py: problems\("test"\) is empty'),
        ("mine.py:Texts", {}, r"mine.py: problems\(\"train\"\) holds 'drawer', which is not a dict"),
        ("mine.py:WrongGold", {}, r"'train-1' \(train\): its gold answer scores 0 \(reward\)"),
    ],
)
def test_mistakes_are_named(folder, name, options, message):
    with pytest.raises(TaskError, match=message):
        load_task(name, options, base_dir=folder)


@pytest.mark.parametrize("code", ["import nothing_of_that_name", "1 / 0", "def f(:", "raise SystemExit(3)"])
def test_a_file_that_cannot_be_imported(tmp_path, code):
    (tmp_path / "broken.py").write_text(code, encoding="utf-8")
    with pytest.raises(TaskError, match=r"broken.py: importing it failed:\n(?s:.)*(Error|SystemExit): ") as info:
        load_task("broken.py:TASK", {}, base_dir=tmp_path)
    assert 'broken.py", line 1' in str(info.value)


LOADS = """
class Mine:
    stop = ()
    def __init__(self, size=1):
        {init}
    def problems(self, split):
        {problems}
        return [{{"id": "a"}}]
    def prompt(self, problem):
        {prompt}
        return "?"
    def score(self, completion, problem):
        {score}
        return 1.0
    def gold(self, problem):
        {gold}
        return "!"
    {body}
"""


@pytest.mark.parametrize(
    ("place", "code", "said"),
    [
        ("init", "1 / 0", r"mine\.py: Mine\(\) failed:\n(?s:.)*ZeroDivisionError"),
        ("init", "raise TypeError('mine')", r"mine\.py: Mine\(\) failed:\n(?s:.)*TypeError: mine"),
        ("init", "import sys; sys.exit('no data')", r"mine\.py: Mine\(\) failed:\n(?s:.)*SystemExit: no data"),
        ("problems", "1 / 0", r'mine\.py: problems\("train"\) failed:\n(?s:.)*ZeroDivisionError'),
        ("problems", "return None", r'mine\.py: problems\("train"\) failed:\n(?s:.)*NoneType'),
        ("problems", "return (1 / 0 for _ in [1])", r'mine\.py: problems\("train"\) failed:\n(?s:.)*ZeroDivision'),
        ("gold", "1 / 0", r"mine\.py: gold\(\) of problem 'a' failed:\n(?s:.)*ZeroDivisionError"),
        ("gold", "return 5", r"mine\.py: gold\(\) of problem 'a' is 5\. Return the text of an answer"),
        ("score", "1 / 0", r"'a' \(train\): score\(\) failed on its gold answer '!':\n(?s:.)*ZeroDivisionError"),
        ("score", "return None", r"'a' \(train\): score\(\) failed on its gold (?s:.)*returned None"),
        ("score", "import os; os._exit(4)", r"failed on its gold answer '!':\nscore\(\) ended .* status 4"),
        ("body", "stop = 5", r"mine\.py: stop = 5 is not text"),
        ("body", "stop = ['x', None]", r"mine\.py: stop = \['x', None\] is not text"),
        ("body", "notes = property(lambda self: 1 / 0)", r"mine\.py: notes failed:\n(?s:.)*ZeroDivisionError"),
    ],
)
def test_user_code_that_fails_when_it_is_loaded(tmp_path, place, code, said):
    """Named with the end of its traceback, which has its line."""
    parts = dict.fromkeys(("init", "problems", "prompt", "score", "gold", "body"), "pass") | {place: code}
    (tmp_path / "mine.py").write_text(LOADS.format(**parts), encoding="utf-8")
    with pytest.raises(TaskError, match=said) as info:
        load_task("mine.py:Mine", {}, base_dir=tmp_path)
    assert len(str(info.value).splitlines()) < 15
    assert ("1 / 0" in code) <= ('mine.py", line ' in str(info.value))


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("1 / 0", r"mine\.py: prompt\(\) of problem 'a' failed:\n(?s:.)*ZeroDivisionError"),
        ("return None", r"mine\.py: prompt\(\) of problem 'a' is None\. Return a text"),
        ("return []", r"prompt\(\) of problem 'a' is \[\]\."),
        (
            "return [{'role': 'user'}]",
            r"prompt\(\) of problem 'a' is \[\{'role': 'user'\}\]\. .* with a role and a content",
        ),
    ],
)
def test_a_prompt_that_is_none(tmp_path, code, said):
    parts = dict.fromkeys(("init", "problems", "prompt", "score", "gold", "body"), "pass") | {"prompt": code}
    (tmp_path / "mine.py").write_text(LOADS.format(**parts), encoding="utf-8")
    task = load_task("mine.py:Mine", {}, base_dir=tmp_path)
    with pytest.raises(TaskError, match=said):
        task.prompt(task.problems("train")[0])


@pytest.mark.parametrize(
    ("code", "said"), [("1 / 0", "failed:(?s:.)*ZeroDivisionError"), ("return 5", r"is 5\. Return a")]
)
def test_a_kind_that_is_no_text(tmp_path, code, said):
    parts = dict.fromkeys(("init", "problems", "prompt", "score", "gold"), "pass")
    body = f"def kind(self, problem):\n        {code}"
    (tmp_path / "mine.py").write_text(LOADS.format(**parts, body=body), encoding="utf-8")
    task = load_task("mine.py:Mine", {}, base_dir=tmp_path)
    with pytest.raises(TaskError, match=rf"mine\.py: kind\(\) of problem 'a' {said}"):
        task.kind(task.problems("test")[0])


def test_an_interruption_while_user_code_runs_is_no_mistake_of_the_user(tmp_path):
    parts = dict.fromkeys(("init", "problems", "prompt", "score", "gold", "body"), "pass")
    code = "raise KeyboardInterrupt"
    (tmp_path / "mine.py").write_text(LOADS.format(**parts | {"init": code}), encoding="utf-8")
    with pytest.raises(KeyboardInterrupt):
        load_task("mine.py:Mine", {}, base_dir=tmp_path)


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
    assert task.score(written("", truncated=True)).reward == 1.0


def test_a_user_task_hears_of_an_open_thought_where_it_asks_for_it(user_task):
    code = """
        class Mine:
            def problems(self, split): return [{"word": "drawer"}]
            def prompt(self, problem): return "Reverse it.\\n<think>"
            def score(self, completion, problem, %s): return float(%s)
            def answer(self, completion): return completion
    """
    for parameters, reward, expected in (
        ("thought_open=False", "thought_open", 1.0),
        ("*, truncated, thought_open", "truncated + 2 * thought_open", 3.0),
        ("truncated=False", "truncated", 1.0),
        ("**anything", "anything == {'truncated': True}", 1.0),
        ("unknown=False", "unknown", 0.0),
    ):
        task = user_task(textwrap.dedent(code) % (parameters, reward))
        problem = task.problems("train")[0]
        open_thought = Completion(text="reward", token_ids=(), truncated=True, prompt_tokens=1, thought_open=True)
        with Scorer(task) as scorer:  # in the scoring process
            graded = grade(scorer, open_thought, problem)
        assert (graded.reward, graded.answer) == (expected, "reward"), parameters


def test_unknown_and_ill_typed_options(tmp_path):
    recipe = Origin(name="recipe.toml", text="steps = 1\n[task_options]\nsede = 1\nshots = 0\n")
    given = [("task-options.grader", "x"), ("es.shots", "1")]
    with pytest.raises(
        ConfigError, match=r"^recipe.toml:3: unknown key task_options.sede. Did you mean .*options.seed"
    ):
        load_task("countdown", sourced({"sede": 1}, recipe, given), base_dir=tmp_path)
    with pytest.raises(ConfigError, match=r"^--task_options.grader: task_options.grader = .x. is not a valid choice"):
        load_task("gsm8k", sourced({"shots": 0, "grader": "x"}, recipe, given), base_dir=tmp_path)
    for name, task in (("countdown", "Countdown"), ("gsm8k", "GSM8K")):
        with pytest.raises(TaskError, match=f"^recipe.toml:4: {task}: shots = 0 is too small"):
            load_task(name, sourced({"shots": 0}, recipe, given), base_dir=tmp_path)
    with pytest.raises(ConfigError, match=r"task_options.count"):
        load_task("countdown", {"count": 2}, base_dir=tmp_path)
    with pytest.raises(ConfigError, match=r"task_options.prompt_style"):
        load_task("gsm8k", {"prompt_style": "tinyzero"}, base_dir=tmp_path)


def test_options_of_a_user_task_are_named_with_their_line(folder):
    recipe = Origin(name="recipe.toml", text='task = "x"\n[task_options]\nbonus = 1\nbonsu = 2\n')
    with pytest.raises(TaskError, match=r"^recipe.toml:4: .*mine.py: Full does not accept task_options"):
        load_task("mine.py:Full", sourced({"bonus": 1.0, "bonsu": 2}, recipe, []), base_dir=folder)
    with pytest.raises(TaskError, match=r"^--task_options.bonus: .*mine.py: TASK is an object, so it takes no"):
        load_task("mine.py:TASK", sourced({"bonus": 1}, recipe, [("--task_options.bonus", "1")]), base_dir=folder)


def test_check_golds_catches_a_grader_that_refuses_its_own_gold(folder):
    task = load_task("mine.py:FULL", {}, base_dir=folder)
    check_golds(task)
    task.inner.score = lambda completion, problem, truncated: Score(math.nan, False, "nan")
    with pytest.raises(TaskError, match="its gold answer scores nan"):
        check_golds(task)
