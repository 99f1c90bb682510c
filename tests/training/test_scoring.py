"""Completions are scored while others are sampled, and a run comes to the same bytes as if they were scored after."""

import random
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import fake_engine
import grpo_stub
import pytest
from fake_engine import MEMBERS, PROMPTS
from pipe_link import Plan, pool

from eggroll_llm.config.schema import RewardConfig
from eggroll_llm.engine.interface import Completion, Decoding, Request, Stream
from eggroll_llm.tasks.load import load_task

PATIENCE = 60.0
MARK = """
import os, tempfile
def mark():
    os.close(tempfile.mkstemp(dir=os.environ["SEEN"])[0])
"""
USERS = (
    MARK
    + """
from rewards import Score

class Mine:
    stop = ("\\n",)
    def problems(self, split):
        count = 10 if split == "train" else 5
        return [{"id": f"{split}-{n}", "x": [n, 7 - n, 3, 5], "target": 2 + 0.3 * n} for n in range(count)]
    def prompt(self, problem):
        return "?"
    def score(self, completion, problem):
        mark()
        member, value = completion.split()
        if member == "5" and problem["x"][0] % 4 == 0:
            os._exit(int(problem["x"][0]))
        if member == "3":
            raise ValueError(problem["id"])
        reward = float("nan") if member == "6" else -abs(float(value) - problem["target"])
        return Score(reward, reward > -0.5, "near")
"""
)
BATCH = """
    def score_batch(self, completions, problems):
        members = [completion.split()[0] for completion in completions]
        assert members == sorted(members, key=int)
        return [self.score(*both) for both in zip(completions, problems)]
"""


class Arrival:
    """In which order completions come; where one `waits`, it comes when all before it are scored: a file for each."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, *, seed: int | None, waits: bool) -> None:
        """`seed` is that of a shuffle of everything; None leaves the order."""
        self.folder, self.seed, self.waits = folder, seed, waits
        self.answered = 0
        folder.mkdir()
        monkeypatch.setenv("SEEN", str(folder))

    def scored(self) -> int:
        return len(list(self.folder.iterdir()))

    def take_over(self, engine: Any) -> None:
        """Let an engine's completions come so."""
        stream = engine.stream

        def arriving(requests: Sequence[Request], decoding: Decoding) -> Stream:
            answers = stream(requests, decoding)
            return answers if decoding.temperature == 1 else self._arrive(answers)  # nobody scores the reference

        engine.stream = arriving

    def _arrive(self, stream: Stream) -> Stream:
        arriving: Iterable[tuple[int, Completion]] = stream
        if self.seed is not None:
            completions = list(stream)
            arriving = random.Random(self.seed).sample(completions, len(completions))
        for numbered in arriving:
            yield numbered
            self.answered += 1
            deadline = time.monotonic() + PATIENCE
            while self.waits and self.scored() < self.answered:
                assert time.monotonic() < deadline, "completions are not scored while others are sampled"
                time.sleep(0.001)


def test_a_run_scores_while_it_samples_and_ends_as_if_it_did_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps and evaluations, by one process and by three, of one engine and two, whatever order completions come in.

    Scores that fail, end their process and are not finite come to the same first failure, counts, messages and files.
    """
    (tmp_path / "users.py").write_text(USERS)
    messages = {}
    for name, seed, waits, workers in (("one", 1, False, 1), ("waits", 2, True, 1), ("pool", None, True, 3)):
        arrival = Arrival(tmp_path / f"seen-{name}", monkeypatch, seed=seed, waits=waits)
        bench = fake_engine.Bench(tmp_path, monkeypatch)
        bench.prepare_engine = arrival.take_over
        if name == "pool":
            bench.make_engine = lambda config, journal: pool(Plan(config, journal, {}), 2, sequences=4)
        task = load_task("users.py:Mine", {}, base_dir=tmp_path)
        outcome = bench.train(name, task=task, steps=2, reward=RewardConfig(workers=workers, timeout_seconds=60))
        assert arrival.scored() == arrival.answered == 2 * MEMBERS * PROMPTS + 2 * 5
        assert outcome.metrics[1]["rewards/failed"] == 2 + PROMPTS
        assert outcome.metrics[1]["members/dropped"] == 2
        messages[name] = bench.display.messages
    for other in ("waits", "pool"):
        fake_engine.same_run(tmp_path / "one", tmp_path / other)
        assert messages[other] == messages["one"]
    assert ["ValueError: train-" in text for text in messages["one"] if "score() failed, so" in text] == [True]


def test_batches_are_the_same_whatever_order_completions_come_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And with them the run, which is the one without batches: a batch that fails is scored one by one."""
    (tmp_path / "users.py").write_text(USERS + BATCH)
    for name, workers, size in (("one", 1, 1), ("whole", 1, 1000), ("some", 2, 5)):
        arrival = Arrival(tmp_path / f"seen-{name}", monkeypatch, seed=size, waits=False)
        bench = fake_engine.Bench(tmp_path, monkeypatch)
        bench.prepare_engine = arrival.take_over
        reward = RewardConfig(workers=workers, batch_size=size, timeout_seconds=60)
        bench.train(name, task=load_task("users.py:Mine", {}, base_dir=tmp_path), steps=2, reward=reward)
    for other in ("whole", "some"):
        fake_engine.same_run(tmp_path / "one", tmp_path / other)


def test_rollouts_of_grpo_are_scored_while_they_are_sampled(
    tmp_path: Path, tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    body = "        values = "
    monkeypatch.setattr(grpo_stub, "TASK", MARK + grpo_stub.TASK.replace(body, f"        mark()\n{body}"))
    for name, waits, workers in (("one", False, 1), ("waiting", True, 2)):
        arrival = Arrival(tmp_path / f"seen-{name}", monkeypatch, seed=workers, waits=waits)
        bench = grpo_stub.Bench(tmp_path, tiny_model("llama"), monkeypatch)
        bench.prepare_engine, bench.processes = arrival.take_over, True
        bench.train(name, steps=2, reward__workers=workers)
        assert arrival.scored() == arrival.answered == 2 * 12 + 2 * 4
    grpo_stub.same_run(tmp_path / "one", tmp_path / "waiting")
