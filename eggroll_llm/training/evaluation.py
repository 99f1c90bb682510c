"""Answers of the base model to a set of problems, graded: the evaluation of a training run, and of `eggroll-llm eval`.

A completion depends on the prompt, the weights and a seed derived from (seed, problem, sample). An interrupted
evaluation continues with what is missing. It gets the same samples as an uninterrupted one where the engine computes a
sequence independently of its batch (docs/determinism.md); elsewhere a few may differ. Requests go to the base model;
the members of a population are not touched.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from eggroll_llm.engine.interface import Completion, Decoding, Engine, Progress, Request, Sampler, Scored
from eggroll_llm.engine.sampling import plain, sampling_seed
from eggroll_llm.records.accuracy import mean
from eggroll_llm.records.answers import TASK, Graded, Sample
from eggroll_llm.records.drawn import Drawn
from eggroll_llm.system import signals
from eggroll_llm.tasks.prompts import ProblemSet
from eggroll_llm.tasks.task import Problem
from eggroll_llm.training.scorer import Scorer, answered, graded

REFERENCES, REFERENCE_TOKENS = 8, 64
"""Answers of the base model that later weights are compared on, and the length limit of each."""

Grader = Callable[[Completion, Problem], Graded] | Scorer
"""Total: any completion has a grade. One that takes its time is a `Scorer`, which grades while others are sampled."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Result of one pass over a set of problems, one greedy answer each, graded by the task."""

    samples: tuple[Sample, ...]
    """Answer to each problem, in order."""
    seconds: float
    """Time that sampling and scoring took."""

    @property
    def problems(self) -> int:
        """Return the number of problems."""
        return len(self.samples)

    @property
    def accuracy(self) -> float:
        """Return the fraction of correct answers."""
        return mean([sample.scores[TASK].correct for sample in self.samples])

    @property
    def reward(self) -> float:
        """Return the mean of the finite rewards."""
        return mean(finite_rewards(self.samples, TASK))

    @property
    def truncated(self) -> float:
        """Return the fraction of completions that the length limit ended."""
        return mean([sample.truncated for sample in self.samples])

    @property
    def metrics(self) -> dict[str, float]:
        """Return the evaluation's part of a row of metrics."""
        return {
            "eval/accuracy": self.accuracy,
            "eval/problems": self.problems,
            "eval/reward": self.reward,
            "eval/truncated": self.truncated,
            "time/eval": self.seconds,
        }

    def against(self, base: Iterable[Sample]) -> dict[str, float]:
        """Return how many problems are solved here and not in `base`, and the reverse; {} if `base` lacks a problem."""
        before = {(sample.problem, sample.prompt_hash): sample.scores[TASK].correct for sample in base}
        now = {(sample.problem, sample.prompt_hash): sample.scores[TASK].correct for sample in self.samples}
        if now.keys() - before.keys():
            return {}
        return {
            "eval/won": sum(solved and not before[key] for key, solved in now.items()),
            "eval/lost": sum(before[key] and not solved for key, solved in now.items()),
        }


def finite_rewards(samples: Iterable[Sample], grader: str) -> list[float]:
    """Return the rewards of a grader that are neither NaN nor infinite."""
    return [reward for sample in samples if math.isfinite(reward := sample.scores[grader].reward)]


def evaluate(
    engine: Sampler,
    scorer: Scorer,
    problems: ProblemSet,
    decoding: Decoding,
    on_progress: Progress | None = None,
) -> Evaluation:
    """Answer every problem once and grade it as the task does."""
    start = time.perf_counter()
    samples: list[Sample] = []

    def keep(sample: Sample) -> None:
        samples.append(sample)
        if on_progress:
            on_progress(len(samples), len(problems.problems))

    answer(engine, problems, {TASK: scorer}, decoding, keep)
    samples.sort(key=lambda sample: sample.problem)
    return Evaluation(samples=tuple(samples), seconds=time.perf_counter() - start)


def draw_reference(engine: Engine, problems: ProblemSet, decoding: Decoding) -> Drawn:
    """Return answers of the weights to the first problems, at temperature 1, with their log-probabilities.

    Raises ModelError when the engine cannot score with this architecture.
    """
    indices = range(min(REFERENCES, len(problems.prompts)))
    requests = [Request(prompt_ids=problems.prompts[p], seed=sampling_seed(0, 0, p, 0)) for p in indices]
    completions = engine.generate(requests, plain(decoding, max_tokens=REFERENCE_TOKENS))
    drawn = Drawn(step=0, indices=tuple(indices), token_ids=tuple((each.token_ids,) for each in completions))
    (logprob_N,) = engine.score(_scored(problems, drawn), [None])
    return dataclasses.replace(drawn, logprobs=tuple(logprob_N.tolist()))


def divergence_from(reference: Drawn, engine: Engine, problems: ProblemSet) -> float:
    """Return the mean divergence of the weights from those that gave the reference, in nats a token."""
    import torch  # evaluations are compared without it

    from eggroll_llm.es.likelihood import divergence

    return divergence(engine.score(_scored(problems, reference), [None]), torch.tensor(reference.logprobs))


def _scored(problems: ProblemSet, drawn: Drawn) -> list[Scored]:
    return [(problems.prompts[p], ids) for p, (ids,) in zip(drawn.indices, drawn.token_ids, strict=True)]


def answer(
    engine: Sampler,
    problems: ProblemSet,
    graders: Mapping[str, Grader],
    decoding: Decoding,
    on_sample: Callable[[Sample], None],
    *,
    samples: int = 1,
    seed: int = 0,
    done: Collection[tuple[int, int]] = (),
) -> None:
    """Answer every problem `samples` times with the base model, without the (problem, sample) that are `done`.

    `on_sample` gets each answer when it is graded, in no particular order; after an exception, too, what was graded.
    """
    grading = _Grading(graders)
    wanted = [(p, s) for p in range(len(problems.problems)) for s in range(samples) if (p, s) not in done]
    requests = [Request(prompt_ids=problems.prompts[p], seed=sampling_seed(seed, 0, p, s)) for p, s in wanted]
    try:
        with contextlib.closing(engine.stream(requests, decoding)) as arriving:
            for i, completion in arriving:
                signals.check()  # which the engine may have swallowed
                p, s = wanted[i]
                grading.put(i, _sample(problems, p, s, completion), answered(problems, p, completion)[0])
                for sample in grading.ready():
                    on_sample(sample)
        for sample in grading.rest():
            on_sample(sample)
    except BaseException:
        for sample in grading.ready():  # what was graded while the engine computed
            on_sample(sample)
        raise


def _sample(problems: ProblemSet, problem: int, sample: int, completion: Completion) -> Sample:
    """Return a sample without grades."""
    doc = problems.problems[problem]
    return Sample(
        problem=problem,
        sample=sample,
        id=doc.get("id", problem),
        doc=doc,
        prompt_hash=problems.hashes[problem],
        completion=completion.text,
        tokens=len(completion.token_ids),
        truncated=completion.truncated,
        scores={},
        kind=_kind(problems, problem),
    )


def _kind(problems: ProblemSet, problem: int) -> str:
    return problems.kinds[problem] if problems.kinds else ""


def grade_again(samples: Iterable[Sample], problems: ProblemSet, graders: Mapping[str, Grader]) -> list[Sample]:
    """Return the samples graded again, with the current graders and the current problems, in no particular order."""
    grading = _Grading(graders)
    for i, sample in enumerate(samples):
        text = Completion(text=sample.completion, token_ids=(), truncated=sample.truncated, prompt_tokens=0)
        completion, problem = answered(problems, sample.problem, text)
        place = sample.problem
        sample = dataclasses.replace(sample, id=problem.get("id", place), doc=problem, kind=_kind(problems, place))
        grading.put(i, sample, completion)
    return list(grading.rest())


class _Grading:
    """Answers under several graders, each complete with the last of its grades."""

    def __init__(self, graders: Mapping[str, Grader]) -> None:
        self._names = list(graders)
        self._functions = {name: grader for name, grader in graders.items() if not isinstance(grader, Scorer)}
        self._scorings = {n: grader.begin(voted=True) for n, grader in graders.items() if isinstance(grader, Scorer)}
        self._open: dict[int, tuple[Sample, dict[str, Graded]]] = {}
        self._complete: list[Sample] = []

    def put(self, number: int, sample: Sample, completion: Completion) -> None:
        """Have an answer graded; numbers as those of `Scoring.put`."""
        grades = {name: grade(completion, sample.doc) for name, grade in self._functions.items()}
        self._open[number] = sample, grades
        for scoring in self._scorings.values():
            scoring.put(number, completion, sample.doc)
        self._add(number, {})

    def ready(self) -> list[Sample]:
        """Return the answers that have become complete, without waiting for any."""
        for name, scoring in self._scorings.items():
            for number, verdict in scoring.ready():
                self._add(number, {name: graded(verdict)})
        return self._take()

    def rest(self) -> Iterator[Sample]:
        """Yield all others; no more is put."""
        for name, scoring in self._scorings.items():
            for number, verdict in scoring.rest():
                self._add(number, {name: graded(verdict)})
                yield from self._take()
        yield from self._take()

    def _take(self) -> list[Sample]:
        complete, self._complete = self._complete, []
        return complete

    def _add(self, number: int, more: Mapping[str, Graded]) -> None:
        sample, grades = self._open[number]
        grades |= more
        if len(grades) == len(self._names):
            del self._open[number]
            self._complete.append(dataclasses.replace(sample, scores={name: grades[name] for name in self._names}))
