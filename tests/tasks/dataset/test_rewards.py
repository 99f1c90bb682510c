"""Rewards of task "dataset": functions get what TRL gives them, and their values become one reward with parts."""

import json

import pytest
from dataset_files import SUMS
from scored import grade, verdicts

from eggroll_llm.config.schema import RewardConfig
from eggroll_llm.engine.interface import Completion
from eggroll_llm.errors import TaskError
from eggroll_llm.tasks.prompts import ProblemSet
from eggroll_llm.training.recorder import completion_row, reward_metrics
from eggroll_llm.training.scorer import ScoredRollout, Scorer, rewards_of
from rewards import Score

TWO = """
def right(completions, answer, **kwargs):
    return [float(c == a) for c, a in zip(completions, answer)]

def short(completions, **kwargs):
    return [None if len(c) > 9 else 1 / len(c) for c in completions]

async def slow(completions, completion_ids):
    import asyncio
    await asyncio.sleep(0.01)
    return [len(ids) for ids in completion_ids]
"""
SEES = """
import json
def seen(**kwargs):
    with open({path!r}, "w") as file:
        json.dump(kwargs, file)
    return [0.0] * len(kwargs["completions"])
"""


def completion(text, **how):
    return Completion(text=text, token_ids=tuple(range(len(text))), truncated=False, prompt_tokens=1, **how)


def judged(task, texts, **limits):
    """Verdicts on completions of the first training problem, and how many failed."""
    with Scorer(task, RewardConfig(**limits)) as scorer:
        problem = task.problems("train")[0]
        return verdicts(scorer, [(completion(text), problem) for text in texts]), scorer.failures


def test_several_rewards_are_added_by_weight_and_kept_apart(load):
    task = load(
        code=TWO, rewards=("my.py:right", "my.py:short", "my.py:slow", "exact"), reward_weights=(1.0, 0.5, 0.25, 2.0)
    )
    answer = task.problems("train")[0]["answer"]
    found, failures = judged(task, [answer, "12345678", "1234567890"])
    assert [verdict.score for verdict in found] == [
        Score(1 + 0.5 / len(answer) + 0.25 * len(answer) + 2, True, "reward",
              {"right": 1.0, "short": 1 / len(answer), "slow": len(answer), "exact": 1.0}),
        Score(0.0625 + 2, False, "reward", {"right": 0.0, "short": 0.125, "slow": 8.0, "exact": 0.0}),
        Score(2.5, False, "reward", {"right": 0.0, "short": None, "slow": 10.0, "exact": 0.0}),
    ]  # fmt: skip
    assert failures == 0
    assert "rewards: 1 × my.py:right + 0.5 × my.py:short" in task.notes[0]


def test_functions_need_no_right_answer(load):
    """Nor is the column that is said to hold it read."""
    task = load(
        [{"prompt": f"{n}?", "answer": None} for n in range(20)],
        code=TWO,
        rewards="my.py:short",
        answer_column="answer",
    )
    assert judged(task, ["1234"])[1] == 0


@pytest.mark.parametrize("messages", [False, True])
def test_a_function_gets_what_trl_gives_it(load, tmp_path, messages):
    """The arguments of TRL 1.16 but for what only its trainer has; texts or messages by the data set's prompts."""
    seen = tmp_path / "seen.json"
    asked = [[{"role": "user", "content": text}] if messages else text for text in ("1?", "2?")]
    rows = [{"prompt": prompt, "answer": 2, "tags": ["x"]} for prompt in asked]
    task = load(rows, code=SEES.format(path=str(seen)), rewards="my.py:seen")
    judged(task, ["two", "2"])
    prompt = task.problems("train")[0]["prompt"]
    assert prompt in asked
    assert json.loads(seen.read_text()) == {
        "prompts": [prompt, prompt],
        "completions": [[{"role": "assistant", "content": text}] if messages else text for text in ("two", "2")],
        "completion_ids": [[0, 1, 2], [0]],
        "answer": [2, 2],
        "tags": [["x"], ["x"]],
    }


def test_each_reward_is_recorded_by_its_name():
    """A step's row has the mean over the completions that it applies to; a completion's has its value, or null."""
    scores = [Score(2.0, True, "", {"a": 1.0, "b": 1.0}), Score(0.5, False, "", {"a": 0.5, "b": None})]
    rollouts = [
        ScoredRollout(member=i, prompt=0, sample=0, completion=completion("x"), score=score)
        for i, score in enumerate(scores)
    ]
    metrics = reward_metrics(rollouts, rewards_of(rollouts, 1, 1))
    assert metrics == {"rewards/a/mean": 0.75, "rewards/b/mean": 1.0, "reward/mean": 1.25, "reward/accuracy": 0.5}
    problems = ProblemSet(problems=[{"id": "p"}], prompts=[(1,)], hashes=[""])
    rows = [completion_row(rollout, 1, problems, [0]) for rollout in rollouts]
    assert [row["rewards"] for row in rows] == [{"a": 1.0, "b": 1.0}, {"a": 0.5, "b": None}]


def test_texts_can_be_given_as_messages(load):
    code = "def reward(prompts, completions): return [float(p[0]['role'] == 'user' and c[0]['content'] == 'a') for p, c in zip(prompts, completions)]"  # noqa: E501
    found, _ = judged(load(code=code, rewards="my.py:reward", completions="messages"), ["a"])
    assert found[0].score.reward == 1.0


def test_a_reward_that_trl_ships(load):
    trl = pytest.importorskip("trl.rewards")
    rows = [{"prompt": [{"role": "user", "content": row["question"]}]} for row in SUMS]
    texts = ["<think>1</think>\n2", "<think>1", "<think>a</think>b"]
    found, _ = judged(
        load(rows, code="from trl.rewards import think_format_reward", rewards="my.py:think_format_reward"), texts
    )
    wanted = trl.think_format_reward([[{"role": "assistant", "content": text}] for text in texts])
    assert [verdict.score.reward for verdict in found] == wanted
    assert len(set(wanted)) == 2


def test_none_of_all_rewards_says_nothing_and_is_counted(load):
    code = (
        "def reward(completions): return [None if c == 'a' else float('nan') if c == 'b' else 1 for c in completions]"
    )
    found, failures = judged(load(code=code, rewards="my.py:reward"), ["a", "b", "c"])
    assert failures == 2
    assert [verdict.score and verdict.score.reward for verdict in found] == [None, None, 1.0]
    assert all("every reward returned None" in verdict.failure for verdict in found[:2])


def test_a_wrong_number_of_rewards_fails_all_of_the_batch(load):
    code = "def reward(completions): return [1.0] * (1 if 'a' in completions else len(completions))"
    found, failures = judged(load(code=code, rewards="my.py:reward"), ["a", "b"])
    assert failures == 2
    assert found[0].failure == "reward() returned 1 rewards for 2 completions; return one for each"


def test_only_the_culprit_of_a_batch_scores_nothing(load):
    code = """
def reward(completions):
    import os
    if "exit" in completions:
        os._exit(3)
    return [1.0 / (c != "raise") for c in completions]
"""
    found, failures = judged(load(code=code, rewards="my.py:reward"), ["a", "exit", "raise", "b"])
    assert failures == 2
    assert [verdict.score and verdict.score.reward for verdict in found] == [1.0, None, None, 1.0]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def reward(completions): return 1.0", r"reward\(\) returned 1\.0; return a list"),
        ("def reward(completions): return [1.0]", r"reward\(\) returned 1 rewards for 2 completions"),
        ("def reward(completions): return ['a'] * len(completions)", r"reward\(\) returned 'a'; return a number"),
        ("def reward(completions): return [c['content'] for c in completions]", r"\(as texts: (?s:.)*TypeError"),
        ("def reward(completions, anwser): pass", r"reward\(\) needs anwser, but the columns .* Did you mean answer"),
        ("def reward(completions, trainer_state): pass", r"needs trainer_state, which only TRL's trainer has"),
        ("reward = 5", r"reward = 5 is not a function"),
        ("import nothing_of_that_name", r"my\.py: importing it failed"),
    ],
)
def test_functions_that_cannot_be_called_are_found_at_the_start(load, code, said):
    with pytest.raises(TaskError, match=said):
        load(code=code, rewards="my.py:reward")


def test_files_of_rewards_share_modules_beside_them(load, tmp_path):
    """Imported late as well: loading the second file must not take the modules of the first away."""
    (tmp_path / "helper.py").write_text("VALUE = 3.0")
    (tmp_path / "other.py").write_text("def other(completions):\n    return [1.0] * len(completions)")
    code = "def late(completions):\n    from helper import VALUE\n    return [VALUE] * len(completions)"
    task = load(code=code, rewards=("my.py:late", "other.py:other"))
    found, _ = judged(task, ["a"])
    assert found[0].score.parts == {"late": 3.0, "other": 1.0}
    before = task.file_hash
    (tmp_path / "helper.py").write_text("VALUE = 4.0")
    assert load(code=code, rewards=("my.py:late", "other.py:other")).file_hash != before


@pytest.mark.parametrize(
    ("grader", "row", "right", "wrong", "vote"),
    [
        ("exact", {"answer": "Paris"}, "It is <answer>paris.</answer>", "Lyon", "paris"),
        ("gsm8k", {"answer": "2 + 16\n#### 18"}, "so\n#### 18", "#### 17", "18"),
        ("choice", {"answer": "(B)"}, "The answer is B.", "A", "B"),
        ("countdown", {"nums": [3, 7], "target": 10}, "<answer>3 + 7</answer>", "x", "3 + 7"),
    ],
)
def test_graders_by_name_need_no_process(load, grader, row, right, wrong, vote):
    task = load([{"question": f"{i}?", **row} for i in range(4)], rewards=grader)
    assert not task.needs_process
    with Scorer(task) as scorer:
        grades = [grade(scorer, completion(text), task.problems("train")[0]) for text in (right, wrong)]
    assert [given.correct for given in grades] == [True, False]
    assert grades[0].answer == vote


def test_math_compares_latex_in_a_process_of_its_own(load):
    """Values, not texts. What would take for ever costs its own completion; what Python would evaluate is text."""
    pytest.importorskip("math_verify")
    rows = [{"problem": f"{i}?", "solution": r"Thus $x = \boxed{\frac{1}{2}}$."} for i in range(3)]
    task = load(rows, rewards="math")
    assert task.needs_process
    texts = [r"\boxed{0.5}", r"$\frac{2}{4}$", r"\boxed{2}", "1/2", r"\boxed{9^{9^{9^{9}}}}", "\\boxed{" * 2000]
    texts += [r"\boxed{__import__('os')._exit(3)}", r"<think>\boxed{0.5}</think> no"]
    found, failures = judged(task, texts, timeout_seconds=20)
    assert [bool(verdict.score and verdict.score.correct) for verdict in found] == [True, True] + [False] * 6
    assert failures <= 2, found
    texts = ["\\boxed{1/2}\n\nQuestion: 3 + 4?\nAnswer: \\boxed{7}", "$x = 0.5$\n\nProblem: 3 + 4?\n$7$"]
    found, _ = judged(task, [*texts, r"First $0.5$, then \boxed{7}"], timeout_seconds=20)
    assert [verdict.score.correct for verdict in found] == [True, True, False]  # up to an invented next question
    with pytest.raises(TaskError, match=r"math gives the right answer '\\\\frac' 0"):
        load([{"problem": "?", "solution": r"\frac"}] * 3, rewards="math")


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        (r"We get $12$. Then \boxed{1", "truncated"),
        (r"First $x = 12$, hence the answer is \boxed", "truncated"),
        (r"$12$", "truncated"),
        (r"Thus \boxed{12", "truncated"),
        (r"Thus \boxed{12}", "correct"),
        (r"Thus \boxed{12}, as $13", "correct"),
        ("\\boxed{12}\n\nQuestion: what is 3+4?\nAnswer: \\boxed{7", "correct"),
    ],
)
def test_math_takes_no_answer_that_was_cut_off(text, detail):
    math = pytest.importorskip("eggroll_llm.tasks.dataset.math")
    pytest.importorskip("math_verify")
    assert math.score(text, "12", truncated=True).detail == detail
    assert math.read_answer(text, truncated=True) == ("12" if detail == "correct" else None)


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        (r"\boxed{4}. Wait, that is wrong.\n\n\boxed{5}".replace(r"\n", "\n"), "correct"),
        (r"\boxed{5}. Wait, that is wrong.\n\n\boxed{4}".replace(r"\n", "\n"), "wrong"),
        (r"\boxed{4} and \boxed{5}", "wrong"),  # two answers
        (r"It costs \$4 each." + "\n\nExample: two of them.\n\n" + r"So \boxed{5}", "correct"),
        (r"\boxed{5}" + "\n\nProblem: find x + 1.\n\n" + r"\boxed{6}", "correct"),
    ],
)
def test_math_takes_the_last_box_after_a_correction(text, detail):
    math = pytest.importorskip("eggroll_llm.tasks.dataset.math")
    pytest.importorskip("math_verify")
    assert math.score(text, "5").detail == detail


def test_math_does_not_keep_an_answer_that_it_could_not_read_in_time(monkeypatch):
    pytest.importorskip("math_verify")
    from eggroll_llm.tasks.dataset import math

    with monkeypatch.context() as patch:
        patch.setattr(math, "_parse", lambda text: [])
        assert math.score(r"\boxed{4111}", "4111").detail == "bad_gold"
    assert math.score(r"\boxed{4111}", "4111").detail == "correct"


def test_a_reward_that_divides_by_the_number_of_tokens_loads(load):
    value = "[len(c) / len(ids) for c, ids in zip(completions, completion_ids)]"
    code = f"def f(completions, completion_ids, **k):\n    return {value}"
    load(code=code, rewards=("my.py:f",))


def test_math_needs_its_package(load, monkeypatch):
    from eggroll_llm.errors import InstallError
    from eggroll_llm.system import installed

    monkeypatch.setattr(installed, "_is_installed", lambda name: name != "math_verify")
    with pytest.raises(InstallError, match=r'reward "math" needs math_verify, not installed here\. Run: .*math-verify'):
        load(rewards="math")
