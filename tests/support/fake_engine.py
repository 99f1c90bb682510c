"""A stand-in for the engine with the real arithmetic of ES, and a bench that runs the real session with it.

Members are W + sign sigma E of two small matrices, and a completion is a number that depends on them. Runs in a child
process as well: `Bench(folder, pytest.MonkeyPatch())`.
"""

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eggroll_llm.config.schema import CheckpointConfig, EngineConfig, EvalConfig, LogConfig, RunConfig, SamplingConfig
from eggroll_llm.engine.interface import Completion, Decoding, Engine, Request, Scored, UpdateTimes
from eggroll_llm.engine.watchdog import Watchdog
from eggroll_llm.es.estimate import UpdateSpec
from eggroll_llm.es.masters import MasterWeights
from eggroll_llm.es.noise import NoiseSpec, served_factors
from eggroll_llm.es.settings import EsSettings
from eggroll_llm.records.journal import read_journal
from eggroll_llm.system.jsonl import last_step
from eggroll_llm.tasks.prompts import ProblemSet
from eggroll_llm.tasks.task import Answer, Score
from eggroll_llm.training import session
from eggroll_llm.training.limits import Course
from eggroll_llm.training.prepare import Prepared

SHAPES = {"a.weight": (6, 4), "b.weight": (3, 6)}
MEMBERS, PROMPTS = 8, 3
AT_ONCE = 4
"""Completions of a `poll`."""
TIMES = ("time", "throughput", "wall_time", "memory", "engines", "wire")
"""What two equal runs may differ in."""
CONFIG = RunConfig(
    task="fake.py:TASK",
    seed=7,
    steps=4,
    engine=EngineConfig(timeout_seconds=0),  # a watchdog is a process, and there are hundreds of runs
    sampling=SamplingConfig(prompts_per_step=PROMPTS, max_tokens=9),
    es=EsSettings(population=MEMBERS, sigma=0.05, learning_rate=0.02, rank=2),
    eval=EvalConfig(every=2, problems=5, max_tokens=7),
    checkpoint=CheckpointConfig(every=0, keep=2),
    log=LogConfig(samples=2, completions=4),
)


class FakeEngine:
    """Serves "member value": value = sum b tanh(a x), x the prompt."""

    def __init__(self, config: RunConfig, journal: Path) -> None:
        generator = torch.Generator().manual_seed(0)
        weights = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        self.masters, self.dtype = MasterWeights(weights, config.es, torch.float32), torch.float32
        self.journal = journal
        self.decodings: list[Decoding] = []
        self.seen: list[tuple[int, str]] = []
        """At each update: entries in the journal on disk, and the checksum of the weights that it starts from."""
        self.closed = False
        self.submitted: list[tuple[int, Request]] = []
        self.watchdog = Watchdog(config.engine.timeout_seconds)
        self.on_generate: Callable[[Sequence[Request]], None] = lambda requests: None

    def begin(self, noise: NoiseSpec, population: int, *, antithetic: bool = True) -> float:
        self.noise, self.population, self.antithetic = noise, population, antithetic
        return 0.5

    def generate(self, requests: Sequence[Request], decoding: Decoding) -> list[Completion]:
        self.decodings.append(decoding)
        with self.watchdog:
            self.on_generate(requests)
        members = {request.member for request in requests}
        weights = {member: [self._weight(name, member) for name in SHAPES] for member in members}
        return [self._answer(request, *weights[request.member]) for request in requests]

    def stream(self, requests: Sequence[Request], decoding: Decoding) -> Generator[tuple[int, Completion], None, None]:
        """Last things first: nobody may count on the order."""
        yield from reversed(list(enumerate(self.generate(requests, decoding))))

    def submit(self, requests: Mapping[int, Request], decoding: Decoding) -> None:
        self.submitted += requests.items()
        self.decoding = decoding

    def poll(self) -> list[tuple[int, Completion]]:
        """Answer some, the last first."""
        now, self.submitted = self.submitted[-AT_ONCE:][::-1], self.submitted[:-AT_ONCE]
        completions = self.generate([request for _, request in now], self.decoding)
        return [(key, completion) for (key, _), completion in zip(now, completions, strict=True)]

    def abort(self) -> None:
        self.submitted.clear()

    def metrics(self) -> dict[str, float]:
        return {}

    def score(
        self, completions: Sequence[Scored], members: Sequence[int | None], temperature: float = 1.0
    ) -> torch.Tensor:
        """A token is the less probable, the further its number is from a member's value."""
        rows = []
        for member in members:
            a, b = (self._weight(name, member) for name in SHAPES)
            logprobs = [
                (-(_value(prompt, a, b) - torch.arange(10.0)).square() / temperature).log_softmax(0)[list(token_ids)]
                for prompt, token_ids in completions
            ]
            rows.append(torch.cat(logprobs))
        return torch.stack(rows)

    def scoring(self, *args: Any, **keywords: Any) -> Generator[None, None, torch.Tensor]:
        """In one pass."""
        scores = self.score(*args, **keywords)
        yield
        return scores

    def _answer(self, request: Request, a: torch.Tensor, b: torch.Tensor) -> Completion:
        member = -1 if request.member is None else request.member
        drawn = (request.seed or 0) % 3 if self.decodings[-1].temperature else 0
        return Completion(
            text=f"{member} {_value(request.prompt_ids, a, b) + drawn:.9g}",
            token_ids=(1, 2, 3 + drawn),
            truncated=False,
            prompt_tokens=len(request.prompt_ids),
        )

    def _weight(self, name: str, member: int | None) -> torch.Tensor:
        weight = self.masters.served(name)
        if member is None:
            return weight
        pair, sign = (member // 2, 1 - 2 * (member % 2)) if self.antithetic else (member, 1)
        return weight + sign * perturbation(self.noise, pair, name, *weight.shape)

    def update(self, spec: UpdateSpec) -> UpdateTimes:
        if self.journal.parent.is_dir():  # else it is on another machine
            entries = read_journal(self.journal).entries
            assert entries[-1].fitness == spec.fitness_M
            self.seen.append((len(entries), self.checksum()))
        return UpdateTimes(report=self.masters.apply(spec), update=0.25, serve=0.125)

    def replay(self, specs: Sequence[UpdateSpec]) -> None:
        for spec in specs:
            self.masters.apply(spec)

    def checksum(self) -> str:
        return self.masters.checksum()

    def state(self) -> dict[str, torch.Tensor]:
        return self.masters.state()

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        self.masters.load_state(state)

    def load_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        self.masters.load_state({f"master/{name}": weight for name, weight in weights.items()})

    def export(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        save_file({name: self.masters.served(name) for name in SHAPES}, directory / "model.safetensors")

    def close(self) -> None:
        self.watchdog.close()
        self.closed = True


@lru_cache(maxsize=256)
def perturbation(noise: NoiseSpec, pair: int, name: str, out: int, inside: int) -> torch.Tensor:
    """A B^T of a pair, as it is served; runs of a test make the same ones."""
    A_KOR, B_KIR = served_factors(noise, torch.tensor([pair]), name, out, inside, torch.float32, "cpu")
    return A_KOR[0] @ B_KIR[0].T


def _value(prompt: Sequence[int], a: torch.Tensor, b: torch.Tensor) -> float:
    x = torch.tensor(prompt, dtype=torch.float32) / 10
    return float((b @ (a @ x).tanh()).sum())


class Near:
    """The nearer to the target, the better."""

    stop = ("\n",)
    notes = ()

    def problems(self, split: str) -> list[dict[str, Any]]:
        count = 10 if split == "train" else 5
        return [{"id": f"{split}-{n}", "x": [n, 7 - n, 3, 5], "target": 2 + 0.3 * n} for n in range(count)]

    def reward(self, member: int, value: float, problem: Mapping[str, Any]) -> float:
        return -abs(value - problem["target"])

    def score(self, answer: Answer) -> Score:
        member, value = answer.text.split()
        reward = self.reward(int(member), float(value), answer.problem)
        return Score(reward, reward > -0.5, "near")

    def answer(self, answer: Answer) -> str | None:
        return None

    def gold(self, problem: Mapping[str, Any]) -> str | None:
        return None

    def kind(self, problem: Mapping[str, Any]) -> str:
        return ""


class Constant(Near):
    def reward(self, member: int, value: float, problem: Mapping[str, Any]) -> float:
        return 0.25


class NotFinite(Near):
    def __init__(self, *members: int) -> None:
        self.members = members

    def reward(self, member: int, value: float, problem: Mapping[str, Any]) -> float:
        bad = member in self.members and problem["x"][0] % 4 == 0  # one of the first step's three
        return math.nan if bad else super().reward(member, value, problem)


class Recorder:
    """A display that remembers."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.steps: list[tuple[int, list[dict[str, Any]], float | None]] = []
        self.evaluations: list[tuple[int, float]] = []
        self.notes: list[str] = []
        self.activities: list[str] = []
        self.courses: list[Course] = []

    def working(self, text: str) -> None:
        self.activities.append(text)

    def course(self, course: Course) -> None:
        self.courses.append(course)

    def sampling(self, label: str, done: int, total: int) -> None:
        self.progress = (label, done, total)

    def step(
        self, row: dict[str, Any], samples: Sequence[dict[str, Any]], *, seconds_left: float | None, note: str = ""
    ) -> None:
        self.steps.append((row["step"], list(samples), seconds_left))
        self.notes.append(note)

    def evaluation(self, step: int, evaluation: Any) -> None:
        self.evaluations.append((step, evaluation.accuracy))

    def message(self, text: str) -> None:
        self.messages.append(text)


class Bench:
    """Runs the real session with the stand-in engine."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch
        self.display = Recorder()
        self.prepare_engine: Callable[[Any], None] = lambda engine: None
        self.make_engine: Callable[[RunConfig, Path], Engine] = FakeEngine

    def train(self, name: str, on_existing: Any = "fail", *, task: Any = None, **changes: Any) -> session.Outcome:
        config = dataclasses.replace(CONFIG, **changes)
        with self.standing_in(name, config, task or Near()):
            return session.train(config, self.folder, self.folder / name, on_existing, self.display)

    @contextlib.contextmanager
    def standing_in(self, name: str, config: RunConfig, task: Any) -> Iterator[None]:
        """Within it, a run in the folder of that name gets this task and the stand-in engine."""
        prepared = Prepared(
            config=config,
            task=task,
            model_dir=self.folder,
            train=problem_set(task, "train"),
            held_out=problem_set(task, "test"),
        )

        def start(*_: Any, **__: Any) -> Engine:
            self.engine: Any = self.make_engine(config, self.folder / name / "journal.jsonl")
            self.prepare_engine(self.engine)
            return self.engine

        with self.monkeypatch.context() as patch:
            patch.setattr(session, "prepare", lambda *_: prepared)
            patch.setattr(session, "check_memory", lambda _: None)
            patch.setattr("eggroll_llm.training.prepare.model_identity", lambda _: "fake")
            patch.setattr(session, "start_engine", start)
            yield


def train_once(folder: Path, **runs: Mapping[str, Any]) -> Path:
    """Train runs by their names, with changes to the configuration, for all tests of a module; return the folder."""
    with pytest.MonkeyPatch.context() as patch:
        bench = Bench(folder, patch)
        for name, changes in runs.items():
            bench.train(name, **changes)
    return folder


def problem_set(task: Any, split: str) -> ProblemSet:
    problems = task.problems(split)
    return ProblemSet(
        problems=problems,
        prompts=[tuple(problem["x"]) for problem in problems],
        hashes=[problem["id"] for problem in problems],
        questions=[f"What of {problem['id']}?" for problem in problems],
        example="what is near?",
        kinds=[task.kind(problem) for problem in problems],
    )


def steps_left(run: Path) -> tuple[int, ...]:
    """The lengths to train to one after the other, 2 and 4, but not below what the run has: that is refused."""
    return (2, 4) if (last_step(run / "metrics.jsonl") or 0) <= 2 else (4,)


def rows(path: Path, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / file).read_text().splitlines()]


def timeless(path: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if not key.startswith(TIMES)} for row in rows(path)]


def same_run(one: Path, other: Path) -> None:
    """Weights, journal, completions equal bit for bit, and metrics apart from times."""
    assert (one / "journal.jsonl").read_text() == (other / "journal.jsonl").read_text()
    assert (one / "completions.jsonl").read_text() == (other / "completions.jsonl").read_text()
    assert timeless(one) == timeless(other)
    weights = [load_file(path / "final" / "model.safetensors") for path in (one, other)]
    for name in SHAPES:
        assert torch.equal(weights[0][name], weights[1][name]), name
    answers = [{file.name: file.read_text() for file in (path / "evaluations").iterdir()} for path in (one, other)]
    assert answers[0] == answers[1]
