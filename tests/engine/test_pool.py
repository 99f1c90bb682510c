"""Several engines come to the run of one, byte for byte, whatever becomes of them on the way."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from fake_engine import CONFIG, Bench, rows, same_run
from pipe_link import Fault, Plan, pool

from eggroll_llm.config.schema import CheckpointConfig

CHANGES = {
    "steps": 5,
    "es": dataclasses.replace(CONFIG.es, optimizer="adam"),
    "checkpoint": CheckpointConfig(every=2, keep=2),
}


class Benches(Bench):
    """Runs the real session with some engines, in processes of their own."""

    def run(self, name: str, engines: int, faults: dict[int, Fault], on_existing: str = "fail", **options: Any) -> Path:
        changes = CHANGES | options.pop("changes", {})
        self.make_engine = lambda config, journal: pool(
            Plan(config, journal, faults), engines, say=self.display.message, sequences=4, **options
        )
        self.train(name, on_existing, **changes)
        return self.folder / name


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Benches:
    return Benches(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run by one engine in this process."""
    with pytest.MonkeyPatch.context() as patch:
        bench = Bench(tmp_path_factory.mktemp("one"), patch)
        bench.train("run", **CHANGES)
        return bench.folder / "run"


@pytest.mark.parametrize("engines", [1, 2, 3])
def test_any_number_of_engines_makes_the_same_run(bench: Benches, one: Path, engines: int) -> None:
    run = bench.run("run", engines, {})
    same_run(one, run)
    assert {row["engines"] for row in rows(run)[1:]} == {engines}
    assert "engines" not in rows(one)[1]
    assert not bench.display.messages


LOSSES = {
    "sampling": ("sample", 3),
    "evaluation": ("evaluate", 2),
    "update": ("update", 3),
    "begin": ("begin", 2),
    "checksum": ("checksum", 3),
}


@pytest.mark.parametrize("engines", [1, 3])
@pytest.mark.parametrize("phase", LOSSES)
def test_a_killed_engine_changes_nothing(bench: Benches, one: Path, phase: str, engines: int) -> None:
    method, after = LOSSES[phase]
    run = bench.run("run", engines, {engines - 1: Fault(method, after)})
    same_run(one, run)
    assert sum(row["engines/lost"] for row in rows(run)[1:]) == 1
    lost = next(text for text in bench.display.messages if " lost " in text)
    assert lost.startswith(f"engine {engines} on node-{engines} lost (killed by signal 9)")
    assert lost.endswith("a replacement is starting")
