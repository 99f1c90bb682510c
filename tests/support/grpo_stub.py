"""A task, a recipe and a stand-in for the engine: both methods run in a second, and nothing is left to chance."""

import copy
import dataclasses
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from eggroll_llm.config.recipe import load_recipe
from eggroll_llm.engine.interface import Completion, Decoding, Request, Scored
from eggroll_llm.engine.watchdog import Watchdog
from eggroll_llm.training import scorer, session
from eggroll_llm.training.limits import Course

TASK = """
import math
from rewards import Score

class Letters:
    stop = ("{stop}",) if "{stop}" else ()
    notes = ()
    def problems(self, split):
        letters = "abcdefgh" if split == "train" else "ijklmnopqrstuvwxyzAB"
        return [{{"id": f"{{split}}-{{letter}}", "letter": letter}} for letter in letters]
    def prompt(self, problem):
        return "Question: how many are left? " + "Make 9 " * (ord(problem["letter"]) % 3) + problem["letter"]
    def score(self, completion, problem, *, truncated=False):
        values = [ord(c) % 17 for c in completion]
        reward = sum(values) / (17 * max(1, len(values)))
        return Score({reward}, len(values) > 8, "letters")
    def answer(self, completion, *, truncated=False):
        return None
    def gold(self, problem):
        return None

TASK = Letters()
"""
RECIPE = """
model = "{model}"
task = "letters.py:TASK"
method = "{method}"
seed = 5
steps = 4
[sampling]
prompts_per_step = 3
samples_per_prompt = 4
max_tokens = 12
temperature = 0.8
[es]
population = 6
sigma = 0.05
learning_rate = 0.02
[grpo]
learning_rate = 1e-2
dtype = "float32"
micro_batch = 3
[engine]
dtype = "float32"
kv_cache_gib = 0.05
max_sequences = 16
[eval]
every = 2
problems = 4
[checkpoint]
every = 3
"""
TIMES = ("time", "throughput", "wall_time", "memory", "engines", "wire")


def write_recipe(
    folder: Path, model: Path, method: str = "grpo", reward: str = "reward", stop: str = "", more: str = ""
) -> Path:
    """A recipe and its task's file in a folder."""
    (folder / "letters.py").write_text(TASK.format(reward=reward, stop=stop))
    path = folder / f"{method}.toml"
    path.write_text(RECIPE.format(model=model, method=method) + more)
    return path


class StubEngine:
    """Answers at random, as seed and prompt say, whatever the weights; says how likely they make the answer."""

    dtype = torch.float32

    def __init__(self, model_dir: Path) -> None:
        self.watchdog = Watchdog(0)
        self.model_dir = model_dir
        model, self.tokenizer = loaded(model_dir, (model_dir / "model.safetensors").stat().st_mtime_ns)
        self.model = copy.deepcopy(model)
        self.asked: list[tuple[tuple[Request, ...], Decoding]] = []
        self.answers: list[list[Completion]] = []
        self.loads = 0
        self.added_logprob: Callable[[Request], float] = lambda request: 0.0
        """By how much the engine's log-probability of each token differs from the trainer's."""
        self.on_generate: Callable[[Decoding], None] = lambda decoding: None
        self.closed = False

    def metrics(self) -> dict[str, float]:
        return {}

    def load_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        self.model.load_state_dict(weights)
        self.loads += 1

    def generate(self, requests: Sequence[Request], decoding: Decoding) -> list[Completion]:
        self.asked.append((tuple(requests), decoding))
        self.on_generate(decoding)
        self.answers.append([self._answer(request, decoding) for request in requests])
        return self.answers[-1]

    def stream(self, requests: Sequence[Request], decoding: Decoding) -> Any:
        yield from reversed(list(enumerate(self.generate(requests, decoding))))

    def _answer(self, request: Request, decoding: Decoding) -> Completion:
        rng = random.Random(f"{request.seed} {request.prompt_ids}")
        length = rng.randint(1, decoding.max_tokens)
        ids = [rng.randrange(3, 300) for _ in range(length)]
        truncated = length == decoding.max_tokens
        if not truncated:
            ids[-1] = self.tokenizer.eos_token_id
        logprobs: tuple[float, ...] = ()
        if decoding.logprobs:
            with torch.no_grad():
                of = token_logprobs(self.model, request.prompt_ids, ids, decoding.temperature)
            logprobs = tuple((of + self.added_logprob(request)).tolist())
        return Completion(
            text=self.tokenizer.decode(ids, skip_special_tokens=True),
            token_ids=tuple(ids),
            truncated=truncated,
            prompt_tokens=len(request.prompt_ids),
            logprobs=logprobs,
        )

    # What ES asks for besides: nothing changes.
    def score(self, completions: Sequence[Scored], members: Sequence[int | None]) -> torch.Tensor:
        with torch.no_grad():
            row = torch.cat([token_logprobs(self.model, prompt, ids, 1.0) for prompt, ids in completions])
        return row.expand(len(members), -1)

    def begin(self, noise: Any, population: int, *, antithetic: bool) -> float:
        return 0.0

    def update(self, spec: Any) -> SimpleNamespace:
        report = SimpleNamespace(finite=True, rms=0.0, weights_rms=1.0, changed=0.0)
        return SimpleNamespace(report=report, update=0.0, serve=0.0)

    def state(self) -> dict[str, torch.Tensor]:
        return {}

    def checksum(self) -> str:
        return "0" * 16

    def export(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)

    def close(self) -> None:
        self.closed = True


@lru_cache(maxsize=4)
def loaded(model_dir: Path, written: int) -> tuple[Any, Any]:
    """The model and the tokenizer that a directory held when it was written."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(model_dir)


def token_logprobs(model: Any, prompt: Sequence[int], completion: Sequence[int], temperature: float) -> torch.Tensor:
    """log pi(token) of each token of one completion, by itself: no padding, no mask."""
    logits_TV = model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1] / temperature
    return logits_TV.log_softmax(-1)[range(len(completion)), list(completion)]


@dataclasses.dataclass
class Recorder:
    """A display that remembers."""

    messages: list[str] = dataclasses.field(default_factory=list)
    steps: list[int] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def working(self, text: str) -> None:
        assert text

    def course(self, course: Course) -> None:
        assert course.fraction is not None

    def sampling(self, label: str, done: int, total: int) -> None:
        assert done <= total

    def step(
        self, row: dict[str, Any], samples: Sequence[dict[str, Any]], *, seconds_left: float | None, note: str = ""
    ) -> None:
        self.steps.append(row["step"])
        self.notes.append(note)

    def evaluation(self, step: int, evaluation: Any) -> None:
        assert not math.isnan(evaluation.accuracy)

    def message(self, text: str) -> None:
        self.messages.append(text)


class Bench:
    """Runs the real session with the stand-in engine."""

    def __init__(self, folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.model, self.monkeypatch = folder, model, monkeypatch
        self.display = Recorder()
        self.make_engine: Callable[[Path], Any] = StubEngine
        self.prepare_engine: Callable[[StubEngine], None] = lambda engine: None
        self.processes = False
        """Whether the reward runs in a process of its own, which takes half a second to start."""

    def train(
        self, name: str, on_existing: Any = "fail", *, method: str = "grpo", reward: str = "reward", **flags: Any
    ) -> session.Outcome:
        recipe = write_recipe(self.folder, self.model, method, reward)
        config = load_recipe(recipe, [(key.replace("__", "."), str(value)) for key, value in flags.items()])
        if method == "es":
            config = dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, samples_per_prompt=1))

        def start(model_dir: Path, *_: Any, **__: Any) -> Any:
            self.engine = self.make_engine(model_dir)
            self.prepare_engine(self.engine)
            return self.engine

        with self.monkeypatch.context() as patch:
            patch.setattr(session, "start_engine", start)
            if not self.processes:
                patch.setattr(scorer, "sandboxed", lambda task: None)
            return session.train(config, self.folder, self.folder / name, on_existing, self.display)


def rows(path: Path, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / file).read_text().splitlines()]


def timeless(path: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if not key.startswith(TIMES)} for row in rows(path)]


def final(path: Path) -> dict[str, Tensor]:
    return load_file(path / "final" / "model.safetensors")


def same_run(one: Path, other: Path) -> None:
    """Weights and completions equal bit for bit, and metrics and evaluations but for times."""
    weights = [final(path) for path in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name
    assert (one / "completions.jsonl").read_text() == (other / "completions.jsonl").read_text()
    assert timeless(one) == timeless(other)
    answers = [{file.name: file.read_text() for file in (path / "evaluations").iterdir()} for path in (one, other)]
    assert answers[0] == answers[1]
