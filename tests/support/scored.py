"""Answers for tasks, and what a scorer makes of completions that are all there."""

from collections.abc import Sequence

from eggroll_llm.engine.interface import Completion
from eggroll_llm.records.answers import Graded
from eggroll_llm.tasks.task import Answer, Problem, Score, Verdict
from eggroll_llm.training.scorer import Scorer, graded, score_of


def written(text: str, problem: Problem | None = None, *, truncated: bool = False) -> Answer:
    return Answer(text=text, problem=problem or {}, truncated=truncated)


def verdicts(scorer: Scorer, pairs: Sequence[tuple[Completion, Problem]], *, voted: bool = False) -> list[Verdict]:
    scoring = scorer.begin(voted=voted)
    for i, pair in enumerate(pairs):
        scoring.put(i, *pair)
    found = dict(scoring.rest())
    return [found[i] for i in range(len(pairs))]


def score_all(scorer: Scorer, pairs: Sequence[tuple[Completion, Problem]]) -> list[Score]:
    return [score_of(verdict) for verdict in verdicts(scorer, pairs)]


def score(scorer: Scorer, completion: Completion, problem: Problem) -> Score:
    return score_all(scorer, [(completion, problem)])[0]


def grade(scorer: Scorer, completion: Completion, problem: Problem) -> Graded:
    return graded(verdicts(scorer, [(completion, problem)], voted=True)[0])
