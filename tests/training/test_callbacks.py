"""What callbacks get, in which order, and how they end a run. On the stand-in for the engine."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from fake_engine import CONFIG, Bench, Near, rows, same_run

from eggroll_llm import Callback, StopTraining
from eggroll_llm.errors import ConfigError, ModelError
from eggroll_llm.records.answers import TASK, Sample
from eggroll_llm.training import session
from eggroll_llm.training.callbacks.base import check_callbacks


class Heard(Callback):
    """Remembers what it is called with; `stop` is raised in the method and step that are given."""

    def __init__(self, run: Path, stop: tuple[str, int, BaseException] | None = None) -> None:
        self.run, self.stop = run, stop
        self.calls: list[tuple[str, int]] = []
        self.values: list[Any] = []
        self.ended = 0

    def hear(self, name: str, step: int, *values: Any) -> None:
        assert rows(self.run)[-1]["step"] == step  # it is on disk
        self.calls.append((name, step))
        self.values.append(values)
        if self.stop and (name, step) == self.stop[:2]:
            raise self.stop[2]

    def on_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        self.hear("samples", step, samples)

    def on_evaluation(self, step: int, metrics: Mapping[str, Any], samples: Sequence[Sample]) -> None:
        self.hear("evaluation", step, metrics, samples)

    def on_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        self.hear("step", step, metrics)

    def on_end(self) -> None:
        self.ended += 1


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


def train(bench: Bench, name: str, *callbacks: Callback, on_existing: Any = "fail") -> session.Outcome:
    with bench.standing_in(name, CONFIG, Near()):
        run = bench.folder / name
        return session.train(CONFIG, bench.folder, run, on_existing, bench.display, callbacks=callbacks)


def test_a_callback_gets_what_the_files_hold_when_they_hold_it(bench: Bench) -> None:
    run = bench.folder / "run"
    heard = Heard(run)
    outcome = train(bench, "run", heard)
    step = ["samples", "step"], ["samples", "evaluation", "step"]
    expected = [("evaluation", 0), ("step", 0)] + [(name, i) for i in range(1, 5) for name in step[i % 2 == 0]]
    assert heard.calls == expected
    got = {call: values for call, values in zip(heard.calls, heard.values, strict=True)}
    assert [got["step", i][0] for i in range(5)] == list(outcome.metrics) == rows(run)
    assert [row for i in range(1, 5) for row in got["samples", i][0]] == rows(run, "completions.jsonl")
    metrics, samples = got["evaluation", 4]
    assert metrics == {key: value for key, value in outcome.last.items() if key.startswith("eval/")}
    assert {"eval/accuracy", "eval/won"} <= metrics.keys()
    assert sum(sample.scores[TASK].correct for sample in samples) / len(samples) == metrics["eval/accuracy"]
    assert heard.ended == 1
    train(bench, "alone")
    same_run(run, bench.folder / "alone")


@pytest.mark.parametrize(("where", "step"), [("evaluation", 0), ("samples", 3), ("step", 3), ("evaluation", 2)])
def test_a_callback_ends_a_run_as_its_limit_would(bench: Bench, where: str, step: int) -> None:
    """After that step, with a model, and the run resumes to the bits of one that was not stopped."""
    run = bench.folder / "run"
    other = Heard(run)
    outcome = train(bench, "run", Heard(run, (where, step, StopTraining("good enough"))), other)
    assert outcome.steps == step
    assert other.calls[-1] == ("step", step)
    assert f"a callback ended the run after step {step}: good enough" in bench.display.messages
    assert (outcome.final / "model.safetensors").is_file()
    train(bench, "run", on_existing="resume")
    train(bench, "alone")
    same_run(run, bench.folder / "alone")


def test_what_a_callback_raises_ends_the_run_by_itself(bench: Bench) -> None:
    run = bench.folder / "run"
    error, other = ZeroDivisionError("mine"), Heard(run)
    failing = Heard(run, ("samples", 3, error))
    with pytest.raises(ZeroDivisionError) as info:
        train(bench, "run", failing, other)
    assert info.value is error
    assert (failing.ended, other.ended, bench.engine.closed) == (1, 1, True)
    train(bench, "run", on_existing="resume")
    train(bench, "alone")
    same_run(run, bench.folder / "alone")


def test_every_end_is_heard_though_one_fails(bench: Bench) -> None:
    class Failing(Callback):
        def on_end(self) -> None:
            raise OSError("no room")

    other = Heard(bench.folder / "run")
    with pytest.raises(OSError, match="no room"):
        train(bench, "run", Failing(), other)
    assert (other.ended, bench.engine.closed) == (1, True)
    assert (bench.folder / "run" / "final" / "model.safetensors").is_file()


def test_the_end_is_heard_also_where_the_engine_does_not_start(bench: Bench) -> None:
    def make(*_: Any) -> Any:
        raise ModelError("no such layer")

    bench.make_engine, heard = make, Heard(bench.folder / "run")
    with pytest.raises(ModelError, match="no such layer"):
        train(bench, "run", heard)
    assert (heard.ended, heard.calls) == (1, [])


def test_what_is_no_callback_is_refused_before_anything_starts(bench: Bench) -> None:
    for wrong in (Callback, print, "wandb"):
        with pytest.raises(ConfigError, match=r"^callbacks\[1\] = .*: not an instance of a subclass of .* on_step\.$"):
            check_callbacks([Callback(), wrong])
    with pytest.raises(ConfigError, match=r"callbacks\[0\]"):
        train(bench, "run", Callback)  # type: ignore[arg-type]
    assert not (bench.folder / "run").exists()
