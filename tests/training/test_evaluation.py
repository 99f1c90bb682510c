"""What an evaluation asks of the engine, and its figures by hand."""

import dataclasses
from collections.abc import Generator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from eggroll_llm.engine.interface import Completion, Decoding, Request
from eggroll_llm.engine.sampling import sampling_seed
from eggroll_llm.records.answers import TASK, Graded, Sample
from eggroll_llm.tasks.prompts import ProblemSet
from eggroll_llm.tasks.task import Answer, Score
from eggroll_llm.training.evaluation import answer, evaluate, grade_again
from eggroll_llm.training.scorer import Scorer

PROBLEMS = ProblemSet(
    problems=[{"want": "a", "id": "first"}, {"want": "c"}], prompts=[(1, 2), (3,)], hashes=["h0", "h1"]
)
DECODING = Decoding(max_tokens=7, stop=("\n",))


class Engine:
    """Answers with the token ids of the prompt, the last request first."""

    def __init__(self) -> None:
        self.asked: list[Request] = []
        self.decoding: Decoding | None = None

    def stream(self, requests: Sequence[Request], decoding: Decoding) -> Generator[tuple[int, Completion], None, None]:
        self.asked, self.decoding = list(requests), decoding
        for i in reversed(range(len(requests))):
            ids = requests[i].prompt_ids
            yield i, Completion(text="a" if ids == (1, 2) else "b", token_ids=ids, truncated=i == 1, prompt_tokens=1)


class Grader:
    def score(self, answer: Answer) -> Score:
        return Score(0.5 if answer.truncated else 2.0, answer.text == answer.problem["want"], answer.text)

    def answer(self, answer: Answer) -> str | None:
        return None if answer.truncated else answer.text.upper()


def test_every_problem_is_put_once_to_the_base_model() -> None:
    engine: Any = Engine()
    task: Any = Grader()
    progress: list[tuple[int, int]] = []
    found = evaluate(engine, Scorer(task), PROBLEMS, DECODING, lambda *both: progress.append(both))
    assert [(request.prompt_ids, request.member) for request in engine.asked] == [((1, 2), None), ((3,), None)]
    assert engine.decoding is DECODING
    assert progress == [(1, 2), (2, 2)]
    assert found.samples[0] == Sample(
        problem=0,
        sample=0,
        id="first",
        doc={"want": "a", "id": "first"},
        prompt_hash="h0",
        completion="a",
        tokens=2,
        truncated=False,
        scores={TASK: Graded(correct=True, reward=2.0, detail="a", answer="A")},
    )
    assert (found.samples[1].id, found.samples[1].scores[TASK].answer) == (1, None)
    assert (found.problems, found.accuracy, found.reward, found.truncated) == (2, 0.5, 1.25, 0.5)
    assert found.seconds >= 0


def test_only_what_is_missing_is_asked_and_each_sample_has_its_own_seed() -> None:
    engine: Any = Engine()
    samples: list[Sample] = []
    graders = {name: Scorer(SimpleNamespace()) for name in ("x", "y")}  # type: ignore[arg-type]
    answer(engine, PROBLEMS, graders, DECODING, samples.append, samples=3, seed=5, done={(0, 1), (1, 0), (1, 2)})
    assert [(s.problem, s.sample) for s in samples] == [(1, 1), (0, 2), (0, 0)]
    assert [request.seed for request in engine.asked] == [
        sampling_seed(5, 0, p, s) for p, s in ((0, 0), (0, 2), (1, 1))
    ]
    # A grader that fails costs its own completion.
    assert samples[0].scores == {
        name: Graded(correct=False, reward=0.0, detail="reward_failed", answer=None) for name in ("x", "y")
    }
    answer(engine, PROBLEMS, graders, DECODING, samples.append, done={(0, 0), (1, 0)})
    assert len(samples) == 3


def test_what_stops_in_the_middle_closes_the_stream() -> None:
    closed = []

    class Watched(Engine):
        def stream(self, *arguments: Any) -> Generator[tuple[int, Completion], None, None]:
            try:
                yield from super().stream(*arguments)
            finally:
                closed.append(True)

    def stop(sample: Sample) -> None:
        raise KeyboardInterrupt

    engine: Any = Watched()
    with pytest.raises(KeyboardInterrupt):
        answer(engine, PROBLEMS, {}, DECODING, stop)
    assert closed == [True]


class Thinking(Grader):
    def score(self, answer: Answer) -> Score:
        return Score(float(answer.thought_open), answer.thought_open, answer.text)

    def answer(self, answer: Answer) -> str | None:
        return str(answer.thought_open)


def test_graders_hear_of_an_open_thought_then_and_when_they_grade_again() -> None:
    engine: Any = Engine()
    task: Any = Thinking()
    problems = dataclasses.replace(PROBLEMS, in_thought={1})
    samples: list[Sample] = []
    answer(engine, problems, {TASK: Scorer(task)}, DECODING, samples.append)
    assert [(s.problem, s.scores[TASK].reward, s.scores[TASK].answer) for s in samples] == [
        (1, 1.0, "True"),
        (0, 0.0, "False"),
    ]
    assert grade_again(samples, problems, {TASK: Scorer(task)}) == samples
