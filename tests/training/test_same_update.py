"""What must not matter to an update does not matter to the weights: compared are the masters of whole runs.

The rewards move by a constant or a factor, members swap their places, twins their signs, and the batch is cut up. Each
proof has a counterpart that must move the weights, so that it can fail.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_engine import CONFIG, MEMBERS, PROMPTS, SHAPES, Bench, FakeEngine, Near
from torch import Tensor

from eggroll_llm.config.schema import CheckpointConfig, EvalConfig
from eggroll_llm.engine.interface import Completion, Decoding, Request, UpdateTimes
from eggroll_llm.es.estimate import UpdateSpec
from eggroll_llm.es.noise import NoiseSpec, served_factors_of
from eggroll_llm.records.journal import read_journal

WAYS = [("centered", True), ("rank", True), ("sign", True), ("centered", False), ("rank", False)]
Weights = Mapping[str, Tensor]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


class Changed(Near):
    """Rewards that a function of reward and number of the problem has changed."""

    def __init__(self, change: Callable[[float, int], float]) -> None:
        self.change = change

    def reward(self, member: int, value: float, problem: Mapping[str, Any]) -> float:
        return self.change(super().reward(member, value, problem), int(problem["x"][0]))


class Relabelled(FakeEngine):
    """Member m is who member ORDER[m] is in the ordinary engine, in answers and in updates."""

    order = tuple(range(MEMBERS))

    def _weight(self, name: str, member: int | None) -> Tensor:
        return super()._weight(name, None if member is None else self.order[member])

    def update(self, spec: UpdateSpec) -> UpdateTimes:
        def factors_of(noise: NoiseSpec, pairs_K: Tensor, *rest: Any) -> dict[str, tuple[Tensor, Tensor]]:
            first_K = [self.order[pair * (2 if spec.antithetic else 1)] for pair in pairs_K.tolist()]
            who_K = torch.tensor([member // 2 if spec.antithetic else member for member in first_K])
            sign_K = torch.tensor([1 - 2 * (member % 2) if spec.antithetic else 1 for member in first_K])
            factors = served_factors_of(noise, who_K, *rest)
            return {name: (A_KOR * sign_K[:, None, None], B_KIR) for name, (A_KOR, B_KIR) in factors.items()}

        return UpdateTimes(report=self.masters.apply(spec, factors_of), update=0.25, serve=0.125)


class Splitting(FakeEngine):
    """Answers request by request, the last one first."""

    def generate(self, requests: Sequence[Request], decoding: Decoding) -> list[Completion]:
        alone = [super(Splitting, self).generate([request], decoding)[0] for request in reversed(requests)]
        return alone[::-1]


def run(bench: Bench, name: str, way: tuple[Any, bool], task: Near | None = None, engine: type = FakeEngine) -> Weights:
    """The masters after a run of a few updates."""
    es = dataclasses.replace(CONFIG.es, fitness=way[0], antithetic=way[1])
    bench.make_engine = engine
    rest = {"eval": EvalConfig(every=0, problems=5), "checkpoint": CheckpointConfig(every=0, best=False)}
    bench.train(name, task=task, es=es, steps=STEPS, **rest)
    assert type(bench.engine) is engine
    return {key: tensor.clone() for key, tensor in bench.engine.masters.state().items()}


def distance(one: Weights, other: Weights) -> float:
    assert one.keys() == other.keys() == {f"master/{name}" for name in SHAPES}
    return max(float((one[key] - other[key]).abs().max()) for key in one)


STEPS = 3
SAME = 2e-6  # some roundings of a float32 weight of about 2; a step moves it by 2e-2
OTHER = 1e-3


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_constants_and_positive_factors_of_rewards_change_no_update(bench: Bench, way: tuple[Any, bool]) -> None:
    plain = run(bench, "plain", way)
    changes: dict[str, Callable[[float, int], float]] = {
        "constant": lambda reward, problem: reward + 1000.0,
        "small": lambda reward, problem: reward * 1e-30,
        "large": lambda reward, problem: reward * 3e12,
        "both": lambda reward, problem: 0.1 * reward - 7.0,
        "constant of each problem": lambda reward, problem: reward + 10.0 * problem,
    }
    for name, change in changes.items():
        assert distance(run(bench, name, way, Changed(change)), plain) < SAME, name
    assert distance(run(bench, "negative", way, Changed(lambda reward, problem: -reward)), plain) > OTHER
    if way[0] != "sign":  # of which only the order of twins counts, and it may stay the same
        assert distance(run(bench, "squared", way, Changed(lambda reward, problem: -(reward**4))), plain) > OTHER


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_permuting_members_changes_no_update(bench: Bench, way: tuple[Any, bool]) -> None:
    """Pairs swap places, without pairs members do; with rewards, noise and all. Their fitness goes with them."""

    class Permuted(Relabelled):
        order = (4, 5, 0, 1, 6, 7, 2, 3) if way[1] else (3, 7, 0, 2, 6, 1, 5, 4)

    plain = run(bench, "plain", way)
    assert distance(run(bench, "permuted", way, engine=Permuted), plain) < SAME
    journals = [read_journal(bench.folder / name / "journal.jsonl").entries for name in ("plain", "permuted")]
    for one, other in zip(*journals, strict=True):
        assert other.fitness == pytest.approx([one.fitness[member] for member in Permuted.order], abs=1e-4)
        assert len(set(one.fitness)) > 1

    class Wrong(Permuted):
        update = FakeEngine.update  # credits the noise of others

    assert distance(run(bench, "wrong", way, engine=Wrong), plain) > OTHER


@pytest.mark.parametrize("way", [way for way in WAYS if way[1]], ids=str)
def test_swapping_twins_with_their_rewards_changes_no_update(bench: Bench, way: tuple[Any, bool]) -> None:
    class Swapped(Relabelled):
        order = (1, 0, 2, 3, 5, 4, 6, 7)

    class Wrong(Swapped):
        update = FakeEngine.update

    plain = run(bench, "plain", way)
    assert distance(run(bench, "swapped", way, engine=Swapped), plain) < SAME
    assert distance(run(bench, "wrong", way, engine=Wrong), plain) > OTHER


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_splitting_the_batch_changes_no_update(bench: Bench, way: tuple[Any, bool]) -> None:
    """Answers one at a time: the same bits. The sum over pairs in pieces of one, in another order of additions."""
    plain = run(bench, "plain", way)
    alone = run(bench, "alone", way, engine=Splitting)
    assert len(bench.engine.decodings) > STEPS * MEMBERS * PROMPTS
    assert distance(alone, plain) == 0
    bench.monkeypatch.setattr("eggroll_llm.es.masters.PAIR_CHUNK", 1)
    assert distance(run(bench, "pieces", way), plain) < SAME
