"""Several processes score side by side: which one scores what, and in which order, decides nothing."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from eggroll_llm.config.schema import RewardConfig
from eggroll_llm.errors import TaskError
from eggroll_llm.tasks.sandbox.pool import ScorePool
from eggroll_llm.tasks.task import Answer, Verdict
from eggroll_llm.tasks.user import UserTask

TASK = """
import os, pathlib, signal, time
from rewards import Score

if os.path.exists("{folder}/broken"):
    raise RuntimeError("no longer")

def wait_for(name):
    while not os.path.exists("{folder}/" + name):
        time.sleep(0.01)

class Mine:
    def problems(self, split):
        return [{{"n": n}} for n in range(12)]
    def prompt(self, problem):
        return "?"
    def answer(self, completion):
        return completion.upper()
"""
SCORE = """
    def score(self, completion, problem):
        word, _, name = completion.partition(" ")
        if word in ("touch", "meet"):
            pathlib.Path("{folder}", f"{{problem['n']}}").touch()
        if word in ("wait", "meet"):
            wait_for(name)
        if word == "loop":
            while True:
                pass
        if word == "exit":
            os._exit(3)
        if word == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if word == "fork" and not os.fork():
            return 7.0
        if word == "who":
            return Score(1.0, True, str(os.getpid()))
        return Score(problem["n"], True, completion)
"""
BATCH = """
    def score_batch(self, completions, problems, truncated):
        assert truncated == [c.startswith("cut") for c in completions]
        if "raise" in completions:
            raise ValueError("no")
        if "exit" in completions:
            os._exit(3)
        if "loop" in completions:
            while True:
                pass
        if "memory" in completions:
            bytearray(1 << 40)
        if "None" in completions:
            return None
        if "short" in completions:
            return [1.0] * (len(completions) - 1)
        scores = [Score(p["n"], True, " ".join(completions)) for p in problems]
        return ["text" if c == "text" else score for c, score in zip(completions, scores)]
"""


@pytest.fixture
def pool(tmp_path: Path, user_task: Callable[[str], UserTask]) -> Iterator[Callable[..., ScorePool]]:
    opened: list[ScorePool] = []

    def make(source: str = SCORE, **limits: float) -> ScorePool:
        task = user_task((TASK + source).format(folder=tmp_path))
        opened.append(ScorePool(task, RewardConfig(**{"timeout_seconds": 60.0, "workers": 3, **limits})))  # type: ignore[arg-type]
        return opened[-1]

    yield make
    for one in opened:
        one.close()


def answers(pool: ScorePool, *texts: str) -> list[Answer]:
    problems = pool._task.problems("train")
    return [
        Answer(text=text, problem=problem, truncated=text.startswith("cut"))
        for text, problem in zip(texts, problems, strict=False)
    ]


def judge(pool: ScorePool, *texts: str) -> list[Verdict]:
    return list(pool.judge(answers(pool, *texts), voted=False))


def rewards(verdicts: Sequence[Verdict]) -> list[float | None]:
    return [verdict.score and verdict.score.reward for verdict in verdicts]


def test_they_score_at_the_same_time(pool: Callable[..., ScorePool]) -> None:
    """Each score returns only when the two others have begun; those of the next three, too."""
    texts = ("meet 2", "meet 0", "meet 1", "meet 5", "meet 3", "meet 4")
    assert rewards(judge(pool(), *texts)) == [0, 1, 2, 3, 4, 5]


def test_whoever_wants_a_score_does_not_wait_for_it(pool: Callable[..., ScorePool], tmp_path: Path) -> None:
    """Of two that are put, the first is late; votes come along."""
    scores = pool(workers=2)
    judging = scores.begin(voted=True)
    for number, answer in enumerate(answers(scores, "wait now", "b")):
        judging.put(number, answer)
    found: list[tuple[int, Verdict]] = []
    while not found:
        found = judging.ready()
    assert judging.ready() == []
    assert [(number, verdict.vote) for number, verdict in found] == [(1, "B")]
    (tmp_path / "now").touch()
    assert [(number, verdict.vote) for number, verdict in judging.rest()] == [(0, "WAIT NOW")]


@pytest.mark.parametrize("bad", ["exit", "killed", "loop"])
def test_one_that_ends_or_hangs_costs_its_own_answer_and_the_others_go_on(
    pool: Callable[..., ScorePool], bad: str
) -> None:
    texts = ["a"] * 12
    texts[4] = bad
    verdicts = judge(pool(timeout_seconds=3.0), *texts)
    assert rewards(verdicts) == [None if n == 4 else n for n in range(12)]
    assert verdicts[4].failure.startswith("score() took longer" if bad == "loop" else "score() ended its process")


def test_while_one_hangs_the_others_score_the_rest(pool: Callable[..., ScorePool]) -> None:
    """It goes on when the last has been scored."""
    texts = ["wait 11", *["a"] * 10, "touch"]
    assert rewards(judge(pool(), *texts)) == list(range(12))


def test_a_fork_answers_nothing(pool: Callable[..., ScorePool]) -> None:
    assert rewards(judge(pool(), *["fork"] * 12)) == list(range(12))


def test_what_is_left_of_the_last_set_is_dropped(pool: Callable[..., ScorePool]) -> None:
    """No process goes on with it, and no verdict on it is taken for another."""
    scores = pool(workers=2)
    judging = scores.begin(voted=False)
    for number, answer in enumerate(answers(scores, "a", "loop", "loop", "loop", "loop")):
        judging.put(number, answer)
    assert next(judging.rest())[0] == 0
    assert rewards(judge(scores, *["b"] * 12)) == list(range(12))


def test_nothing_is_left_of_them(pool: Callable[..., ScorePool]) -> None:
    scores = pool()
    pids = {int(verdict.score.detail) for verdict in judge(scores, *["who"] * 12) if verdict.score}
    assert 1 <= len(pids) <= 3
    scores.close()
    scores.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert rewards(judge(scores, "a", "b")) == [0, 1]


def test_one_that_cannot_be_replaced_ends_it_all(pool: Callable[..., ScorePool], tmp_path: Path) -> None:
    scores = pool(workers=2)
    scores.start()
    (tmp_path / "broken").touch()
    with pytest.raises(TaskError, match=r"(?s)mine\.py: in the scoring process .*RuntimeError: no longer"):
        judge(scores, *["exit"] * 3, *["a"] * 9)
    with pytest.raises(TaskError, match="no longer"):
        scores.start()


def batch(pool: ScorePool, *texts: str) -> list[tuple[float, str] | str]:
    """Reward and detail of each, or the last line of why there is none. The last answers are put first."""
    judging = pool.begin(voted=False)
    for number, answer in reversed(list(enumerate(answers(pool, *texts)))):
        judging.put(number, answer)
    found = dict(judging.rest())
    verdicts = [found[number] for number in range(len(texts))]
    return [(v.score.reward, v.score.detail) if v.score else v.failure.rpartition("\n")[2] for v in verdicts]


def test_a_batch_is_of_neighbours_whatever_comes_first(pool: Callable[..., ScorePool]) -> None:
    for workers in (1, 2):
        found = batch(pool(SCORE + BATCH, workers=workers, batch_size=3), *"abc", "d", "cut", "f", "g")
        assert found == [
            *((n, "a b c") for n in range(3)),
            *((n, "d cut f") for n in range(3, 6)),
            (6, "g"),
        ]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("raise", ""),
        ("exit", "score() ended its process with status 3"),
        ("loop", "score() took longer than 3 s"),
        ("memory", ""),
    ],
)
def test_where_a_batch_fails_its_answers_are_scored_one_by_one(
    pool: Callable[..., ScorePool], bad: str, said: str
) -> None:
    """By `score`, which fails for the same one, or not."""
    found = batch(pool(SCORE + BATCH, workers=2, batch_size=3, timeout_seconds=3.0), "a", bad, "c", "d", "e")
    assert found == [(0, "a"), said or (1, bad), (2, "c"), (3, "d e"), (4, "d e")]


def test_without_a_score_a_batch_of_one_takes_its_place(pool: Callable[..., ScorePool]) -> None:
    found = batch(pool(BATCH, workers=1, batch_size=3), "a", "raise", "c", "d")
    assert found == [(0, "a"), "ValueError: no", (2, "c"), (3, "d")]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("short", "score_batch() returned 2 scores for 3 completions; return one for each"),
        ("None", "score_batch() returned None; return a list of scores"),
    ],
)
def test_a_batch_with_another_number_of_scores_fails_and_says_so(
    pool: Callable[..., ScorePool], bad: str, said: str
) -> None:
    found = batch(pool(SCORE + BATCH, workers=1, batch_size=3), "a", bad, "c", "d", "e", "f")
    assert found == [said, said, said, *((n, "d e f") for n in range(3, 6))]


def test_what_is_no_score_costs_its_own_answer_in_a_batch(pool: Callable[..., ScorePool]) -> None:
    found = batch(pool(SCORE + BATCH, workers=1, batch_size=3), "a", "text", "c")
    assert found[0] == (0, "a text c")
    assert found[1] == "TypeError: score() returned 'text'; return a number or a rewards.Score"
    assert found[2] == (2, "a text c")
