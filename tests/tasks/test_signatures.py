"""What will be called is checked before the engine starts, and a reward made for TRL is told how to become a task."""

import re
from pathlib import Path

import pytest
from scored import written

from eggroll_llm.errors import TaskError
from eggroll_llm.tasks.load import load_task
from eggroll_llm.tasks.user import UserTask

METHODS = {
    "problems": "def problems(self, split): return [{'id': 1, 'answer': 'a', 'word': 'a'}]",
    "prompt": "def prompt(self, problem): return '?'",
    "score": "def score(self, completion, problem): return float(completion == problem['answer'])",
}


def load(folder: Path, before: str = "", name: str = "Mine", **methods: str) -> UserTask:
    """The task of a class whose methods are these, and otherwise right."""
    body = "\n".join(f"    {line}" for line in (METHODS | methods).values())
    (folder / "mine.py").write_text(f"import functools, types\n{before}\nclass Mine:\n{body}\n")
    task = load_task(f"mine.py:{name}", {}, base_dir=folder)
    assert isinstance(task, UserTask)
    return task


def refused(folder: Path, before: str = "", name: str = "Mine", **methods: str) -> str:
    with pytest.raises(TaskError) as info:
        load(folder, before, name, **methods)
    assert str(info.value).startswith(f"{folder}/mine.py: {name}")
    return str(info.value)


@pytest.mark.parametrize(
    ("method", "code", "said"),
    [
        ("score", "def score(self, completion, problem, answer): return 1.0", "missing a required argument: 'answer'"),
        ("score", "def score(self, completion, problem, *, answer): return 1.0", "required .*argument: 'answer'"),
        ("score", "def score(self, completion, problem, truncated, /): return 1.0", "'truncated'"),
        ("score", "def score(self, completion, truncated): return 1.0", "multiple values for argument 'truncated'"),
        ("score", "def score(self, completion): return 1.0", "too many positional arguments"),
        ("score", "def score(completion, problem): return 1.0", "too many positional arguments"),
        ("score", "@staticmethod\n    def score(self, completion, problem): return 1.0", "missing a required argument"),
        ("score", "score = functools.partial(pow, 1, 2)", "too many positional arguments"),
        ("score", "def score(self, problem, completion): return 1.0", "takes its arguments in a different order from"),
        ("score", "async def score(self, completion, problem): return 1.0", "score is asynchronous"),
        ("score", "def score(self, completion, problem): yield 1.0", "score yields"),
        ("score", "score = 1.0", r"score = 1\.0 is not a method. Write def score\(self, completion, problem\)\.$"),
        ("score", "", "has no method score"),
        ("score_batch", "def score_batch(self, completion): return []", "too many positional arguments"),
        ("score_batch", "def score_batch(self, problems, completions): return []", "in a different order from"),
        ("score_batch", "async def score_batch(self, completions, problems): return []", "score_batch is asynchronous"),
        ("score_batch", "def score_batch(self, completions, problems): yield 1.0", "score_batch yields"),
        ("score_batch", "score_batch = None", r"score_batch = None is not a method\. .*, or remove it\.$"),
        ("prompt", "def prompt(self, problem, split): return '?'", "'split'"),
        ("prompt", "def prompt(self): return '?'", "too many positional arguments"),
        ("prompt", "async def prompt(self, problem): return '?'", "prompt is asynchronous"),
        ("prompt", "def prompt(self, problem): yield '?'", "prompt yields"),
        ("prompt", "prompt = 'Reverse:'", "prompt = 'Reverse:' is not a method"),
        ("problems", "def problems(self): return [{}]", "too many positional arguments"),
        ("problems", "def problems(self, split, size): return [{}]", "'size'"),
        ("problems", "async def problems(self, split): return [{}]", "problems is asynchronous"),
        ("problems", "problems = [{}]", r"problems = \[{}\] is not a method"),
        ("gold", "def gold(self): return 'a'", "too many positional arguments"),
        ("gold", "gold = 'a'", r"gold = 'a' is not a method. Write def gold\(self, problem\), or remove it\.$"),
        ("gold", "async def gold(self, problem): return 'a'", "gold is asynchronous"),
        ("answer", "def answer(self, completion, problem): return 'a'", "'problem'"),
        ("kind", "kind = 'hard'", r"kind = 'hard' is not a method. Write def kind\(self, problem\), or remove it\.$"),
        ("answer", "answer = None", r"answer = None is not a method. .*, or remove it\.$"),
    ],
)
def test_a_method_that_cannot_be_called_is_refused_when_it_is_loaded(
    tmp_path: Path, method: str, code: str, said: str
) -> None:
    message = refused(tmp_path, **{method: code})
    assert re.search(said, message)
    assert method in message


def test_it_says_what_is_called_and_where_the_rest_is(tmp_path: Path) -> None:
    assert refused(tmp_path, score="def score(self, completion, problem, answer): return 1.0") == (
        f"{tmp_path}/mine.py: Mine: score(completion, problem, answer) cannot be called as score(completion, problem): "
        "missing a required argument: 'answer'. Everything else is in the problem: problem[\"answer\"]. "
        "Write def score(self, completion, problem) in a class."
    )


@pytest.mark.parametrize(
    "score",
    [
        "def score(self, answer, row): return 1.0",
        "def score(self, completions, problem): return 1.0",
        "def score(self, completions, problem, **more): return 1.0",
        "def score(self, *anything): return 1.0",
        "def score(self, completion, problem, truncated): return 1.0",
        "def score(self, completion, problem, *, weight=1.0, **more): return 1.0",
        "@staticmethod\n    def score(completion, problem): return 1.0",
        "@classmethod\n    def score(cls, completion, problem): return 1.0",
        "score = staticmethod(lambda completion, problem: 1.0)",
        "score = staticmethod(max)",
    ],
)
def test_whatever_can_be_called_is_taken(tmp_path: Path, score: str) -> None:
    load(tmp_path, score=score)


def test_a_batch_takes_the_place_of_a_score(tmp_path: Path) -> None:
    """With the same optional arguments, as lists."""
    batch = "def score_batch(self, completions, problems, *, truncated): return [float(cut) for cut in truncated]"
    task = load(tmp_path, score=batch)
    assert (task.takes, task.batch_takes) == (frozenset(), {"truncated"})
    problem = task.problems("train")[0]
    assert [task.score(written("a", problem, truncated=cut)).reward for cut in (False, True)] == [0.0, 1.0]
    assert load(tmp_path).batch_takes is None


@pytest.mark.parametrize(
    "reward",
    [
        "def reward(completions, **kwargs): return []",
        "def reward(prompts, completions, answer): return []",
        "async def reward(completions=(), word=(), **kwargs): return []",
    ],
)
def test_a_reward_of_trl_is_told_where_it_belongs(tmp_path: Path, reward: str) -> None:
    """As the object named, or as the class's score; that it works there is shown in tests/tasks/dataset."""
    named = refused(tmp_path, before=reward, name="reward")
    assert "is a TRL reward function, not a task" in named
    assert re.search(r'rewards = "\w+\.py:reward"\. See docs/coming_from_trl\.md\.$', named)
    if "async" not in reward:
        inside = refused(tmp_path, score=reward.replace("reward(", "score(self, "))
        assert "is a TRL reward function. Move it out of the class as reward. Name it as a reward" in inside


@pytest.mark.parametrize(
    ("before", "said"),
    [
        (
            "def given(completion, problem): return 1.0",
            "is a function that cannot be called without task_options: miss",
        ),
        ("given = lambda text: 1.0", "missing a required argument: 'text'. A task needs problems"),
        ("given = [len]", "given has no method problems"),
        ("def given(): return 1.0", "given has no method problems"),
        (
            "class given:\n    def __init__(self, size): pass",
            r"\(size\) needs task_options: .*'size'. Set it in \[task_o",
        ),
        ("class given:\n    def __call__(self, completions, **kwargs): pass", "has no method problems"),
    ],
)
def test_what_else_is_no_task(tmp_path: Path, before: str, said: str) -> None:
    assert re.search(said, refused(tmp_path, before=before, name="given"))


def test_half_a_surrogate_pair_is_named(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"mine\.py: stop = '\\ud83d' is not valid Unicode text"):
        load(tmp_path, stop=r"stop = '\ud83d'")
    with pytest.raises(TaskError, match=r"Problem 1 \(train\): its gold answer '\\udc00' is not valid Unicode"):
        load(tmp_path, gold=r"def gold(self, problem): return '\udc00'")


def test_a_stop_that_would_end_every_answer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="has an empty text, at which every answer would end"):
        load(tmp_path, stop="stop = ['x', '']")
