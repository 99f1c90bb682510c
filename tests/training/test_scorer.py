"""The boundary to a grader: whatever it does, a completion gets a score and the failure is counted."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
from scored import grade, score, score_all

from eggroll_llm.engine.interface import Completion
from eggroll_llm.errors import TaskError
from eggroll_llm.records.answers import Graded
from eggroll_llm.tasks.task import Answer, Score
from eggroll_llm.training.scorer import FAILED, Scorer


def completion(text: str = "x", truncated: bool = False) -> Completion:
    return Completion(text=text, token_ids=(1,), truncated=truncated, prompt_tokens=3)


def scorer(grade: Any) -> Scorer:
    task: Any = SimpleNamespace(score=grade)
    return Scorer(task)


def test_the_grader_gets_text_problem_and_truncation() -> None:
    seen = []

    def grade(answer: Answer) -> Score:
        seen.append((answer.text, answer.problem, answer.truncated))
        return Score(0.5, True, "fine")

    found = scorer(grade)
    assert score(found, completion("4+5", True), {"id": 7}) == Score(0.5, True, "fine")
    assert seen == [("4+5", {"id": 7}, True)]
    assert (found.scored, found.failures) == (1, 0)


def raising(error: BaseException) -> Any:
    def grade(answer: Answer) -> Score:
        raise error

    return grade


@pytest.mark.parametrize(
    "grade",
    [
        raising(KeyError("answer")),
        raising(RecursionError()),
        raising(MemoryError()),
        lambda answer: None,
        lambda answer: 1.0,
        lambda answer: Score("much", True, ""),  # type: ignore[arg-type]
        lambda answer: Score(None, True, ""),  # type: ignore[arg-type]
        lambda answer, problem: Score(1.0, True, ""),
    ],
)
def test_a_failing_grader_costs_its_own_completion(grade: Any) -> None:
    found = scorer(grade)
    assert score(found, completion(), {}) == Score(0.0, False, FAILED)
    assert (found.scored, found.failures) == (1, 1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rewards_that_are_not_finite_pass(value: float) -> None:
    """They are the loop's to drop, with the whole member."""
    found = scorer(lambda answer: Score(value, False, ""))
    assert repr(score(found, completion(), {"id": 5}).reward) == repr(value)
    assert found.failures == 0
    assert found.first_dropped == f'{value} for problem 5, answer "x"'


def test_the_first_failure_is_kept_with_its_sample_and_said_once() -> None:
    """Of hostile text: nothing in the sentence acts on a terminal, and it is not as long as the answer."""
    said: list[str] = []
    answers = ["1", "\x1b[2J" + "y" * 10_000, "two"]
    found = scorer(lambda answer: Score(float(answer.text), True, ""))
    found.say = said.append
    scores = score_all(found, [(completion(text), {"id": f"{n}\n"}) for n, text in enumerate(answers)])
    assert scores == [Score(1.0, True, ""), Score(0.0, False, FAILED), Score(0.0, False, FAILED)]
    sample, _, traceback = found.first_failure.partition("\n")
    assert sample == 'problem 1\\n, answer "\\x1b[2J' + "y" * 152 + '…"'
    assert traceback.startswith("Traceback (most recent call last)")
    assert "ValueError: could not convert string to float: '\\x1b[2Jyyyy" in traceback
    assert len(said) == 1
    assert sample in said[0]
    assert "ValueError: could not convert string to float" in said[0]
    found.start_counting()
    assert (found.scored, found.failures) == (0, 0)
    score(found, completion("three"), {})
    assert found.first_failure.startswith(sample)
    assert len(said) == 1


def test_scores_become_plain_values() -> None:
    torch = pytest.importorskip("torch")
    found = scorer(lambda answer: Score(torch.tensor(0.5), torch.tensor(True), 3))  # type: ignore[arg-type]
    plain = score(found, completion(), {})
    assert plain == Score(0.5, True, "3")
    assert [type(value) for value in (plain.reward, plain.correct, plain.detail)] == [float, bool, str]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143)])
def test_interrupting_a_grader_ends_the_run(error: BaseException) -> None:
    with pytest.raises(type(error)):
        score(scorer(raising(error)), completion(), {})


def test_the_first_step_stops_only_when_everything_failed() -> None:
    scorer(raising(KeyError("answer"))).check(of=" of the first step")  # nothing was scored
    broken = scorer(raising(KeyError("answer")))
    score(broken, completion(), {})
    score(broken, completion(), {})
    with pytest.raises(TaskError, match=r"failed on all 2 completions of the first step") as info:
        broken.check(of=" of the first step")
    assert "KeyError: 'answer'" in str(info.value)
    assert "test_scorer.py" in str(info.value)

    fussy = scorer(lambda answer: Score(float(answer.text), True, ""))
    score(fussy, completion("no number"), {})
    score(fussy, completion("1"), {})
    fussy.check(of=" of the first step")
    assert (fussy.scored, fussy.failures) == (2, 1)


@pytest.mark.parametrize(
    ("answer", "voted"),
    [(lambda answer: answer.text if answer.truncated else None, None), (raising(ValueError("no")), None)],
)
def test_a_grade_is_the_score_with_the_answer(answer: Any, voted: str | None) -> None:
    task: Any = SimpleNamespace(score=lambda answer: Score(0.5, True, "so"), answer=answer)
    assert grade(Scorer(task), completion(), {}) == Graded(correct=True, reward=0.5, detail="so", answer=voted)
    named: Any = SimpleNamespace(score=task.score, answer=lambda answer: "18")
    assert grade(Scorer(named), completion(), {}).answer == "18"
