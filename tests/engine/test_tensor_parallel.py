"""One engine on several devices: two ranks of a CPU, each with its part of every layer, against one.

Members answer as one device does, to rounding: a sum over features is cut in two. Weights, optimizer state, checksums
and exports are those of one device to the bit, so a run goes on with any number of ranks.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from next_token import next_token_logprobs
from torch import Tensor

from eggroll_llm.config.schema import EngineConfig
from eggroll_llm.engine.interface import Completion, Decoding, Request
from eggroll_llm.engine.vllm import engine as vllm_engine
from eggroll_llm.engine.vllm.engine import VllmEngine
from eggroll_llm.engine.vllm.ranks import Part, environment
from eggroll_llm.errors import EngineError
from eggroll_llm.es.estimate import NonFiniteUpdate, UpdateSpec
from eggroll_llm.es.masters import MasterWeights
from eggroll_llm.es.noise import NoiseSpec
from eggroll_llm.es.settings import EsSettings
from eggroll_llm.kernels.fold import fold_for
from eggroll_llm.kernels.noise import served_factors_of
from eggroll_llm.system.hardware import serves_on_cpu

pytestmark = pytest.mark.vllm

POPULATION, SLOTS, RANK, SIGMA = 6, 4, 3, 0.05
PROMPTS = tuple(tuple((7 * i + j) % 300 + 3 for j in range(20)) for i in range(3))
MEMBERS = (None, 0, 1, 4, 5)
GREEDY = Decoding(max_tokens=8, ignore_eos=True)


def noise(step: int) -> NoiseSpec:
    return NoiseSpec(seed=3, step=step, rank=RANK, sigma=SIGMA)


def update(step: int, **changes: Any) -> UpdateSpec:
    fitness = (1.0, -1.0, 0.5, 0.25 * step, -0.75, 0.0)
    settings: dict[str, Any] = {"step": step, "noise_step": step, "seed": 3, "rank": RANK, "sigma": SIGMA}
    return UpdateSpec(**settings | {"learning_rate": 0.02, "fitness_M": fitness} | changes)


@dataclass(kw_only=True)
class Run:
    """What an engine answers and computes in three steps."""

    logprobs: list[Tensor]
    """Of the next token, of base model and members, before each update and after the last."""
    completions: list[Completion]
    scores: Tensor
    """Log-probabilities that base model and members give to two completions, at the end."""
    rms: list[float]
    checksums: list[str]
    states: list[dict[str, Tensor]]
    """Before the first update and after the last."""
    exported: bytes


def run(engine: VllmEngine, directory: Path) -> Run:
    def state() -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in engine.state().items()}

    def logprobs() -> Tensor:
        return next_token_logprobs(engine, [Request(prompt_ids=p, member=m) for m in MEMBERS for p in PROMPTS])

    found = Run(
        logprobs=[],
        completions=[],
        scores=torch.empty(0),
        rms=[],
        checksums=[engine.checksum()],
        states=[state()],
        exported=b"",
    )
    for step in (1, 2, 3):
        engine.begin(noise(step), POPULATION)
        found.logprobs.append(logprobs())
        found.rms.append(engine.update(update(step)).report.rms)
        found.checksums.append(engine.checksum())
    engine.begin(noise(4), POPULATION)
    found.logprobs.append(logprobs())
    found.completions = engine.generate([Request(prompt_ids=p, member=m) for m in MEMBERS for p in PROMPTS], GREEDY)
    found.scores = engine.score([(PROMPTS[0], (5, 6, 7)), (PROMPTS[1], (8, 9))], MEMBERS)
    found.states.append(state())
    engine.export(directory)
    found.exported = (directory / "model.safetensors").read_bytes()
    return found


@dataclass(frozen=True, kw_only=True)
class Both:
    one: Run
    two: Run
    engine: VllmEngine
    """The one with two ranks."""


@pytest.fixture(scope="module")
def both(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    """One head of k and v, of which both ranks have a copy; biases everywhere; states in more than one message."""
    model_dir = tiny_model("llama", num_key_value_heads=1, attention_bias=True, mlp_bias=True)
    runs: list[Run] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_engine, "BATCH", 50_000)
        patch.setenv("TORCH_COMPILE_DISABLE", "1")  # or each rank of a CPU compiles vLLM's look into the vocabulary
        for ranks in (1, 2):
            config = EngineConfig(
                dtype="float32" if serves_on_cpu() else "bfloat16",
                kv_cache_gib=0.05,
                gpu_memory_utilization=0.1,
                slots=SLOTS,
                max_sequences=16,
                max_model_len=64,
                tensor_parallel=ranks,
            )
            settings = EsSettings(rank=RANK, optimizer="adam")
            engine = VllmEngine(model_dir, config, settings)
            try:
                runs.append(run(engine, tmp_path_factory.mktemp("exported") / "model"))
                if ranks == 2:
                    yield Both(one=runs[0], two=runs[1], engine=engine)
            finally:
                engine.close()


def assert_equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


def test_members_answer_as_on_one_device(both: Both) -> None:
    for one, two in zip(both.one.logprobs, both.two.logprobs, strict=True):
        assert (one - two).abs().max() < 2e-4
        different = one.view(len(MEMBERS), -1)
        assert torch.pdist(different, p=torch.inf).min() > 0.02
    assert [each.token_ids for each in both.two.completions] == [each.token_ids for each in both.one.completions]


def test_members_score_as_on_one_device(both: Both) -> None:
    assert both.two.scores.shape == (len(MEMBERS), 5)
    assert (both.one.scores - both.two.scores).abs().max() < 2e-4
    assert torch.pdist(both.one.scores, p=torch.inf).min() > 0.02


def test_weights_and_all_that_is_made_of_them_have_the_bits_of_one_device(both: Both) -> None:
    assert len(set(both.one.checksums)) == 4
    assert both.two.checksums == both.one.checksums
    assert both.two.exported == both.one.exported
    assert both.two.rms == pytest.approx(both.one.rms, rel=0.05)


def test_a_run_goes_on_with_another_number_of_ranks(both: Both) -> None:
    """The state of two ranks is that of one: what one saves the other loads, and replays to the same bits."""
    (base, last), engine = both.one.states, both.engine
    assert_equal(both.two.states[1], last)
    engine.load_state(base)
    assert engine.checksum() == both.one.checksums[0]
    assert_equal(engine.state(), base)
    engine.replay([update(step) for step in (1, 2)])
    assert engine.checksum() == both.one.checksums[2]
    engine.load_state(last)
    assert engine.checksum() == both.one.checksums[3]
    engine.begin(noise(4), POPULATION)
    found = next_token_logprobs(engine, [Request(prompt_ids=p, member=m) for m in MEMBERS for p in PROMPTS])
    assert (found - both.one.logprobs[3]).abs().max() < 2e-4


def test_what_all_ranks_refuse_is_refused_as_by_one(both: Both) -> None:
    before = both.engine.checksum()
    with pytest.raises(NonFiniteUpdate, match="not applied"):
        both.engine.update(update(4, learning_rate=1e30))
    assert both.engine.checksum() == before


def test_a_rank_that_dies_is_an_error_of_the_engine_and_nothing_stays_behind(
    both: Both, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends the engine, so it is the last to use it. Ctrl-C, which reaches the ranks too, is not theirs to answer."""
    monkeypatch.setenv("VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS", "1")

    def running() -> list[int]:
        return [child.pid or 0 for child in multiprocessing.active_children() if "VllmWorker" in child.name]

    ranks = running()
    assert len(ranks) == 2
    for pid in ranks:
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
    time.sleep(0.2)
    assert both.engine.generate([Request(prompt_ids=PROMPTS[0])], GREEDY)
    threading.Timer(0.3, os.kill, (ranks[1], signal.SIGKILL)).start()
    requests = [Request(prompt_ids=PROMPTS[0]) for _ in range(2000)]
    with pytest.raises(EngineError, match="a rank of the engine ended"):
        both.engine.generate(requests, Decoding(max_tokens=40, ignore_eos=True))
    both.engine.close()
    assert not running()


@pytest.mark.skipif(not serves_on_cpu(), reason="threads are shared on a CPU only")
def test_ranks_share_the_cores_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    with environment(EngineConfig(tensor_parallel=2)):
        assert os.environ["OMP_NUM_THREADS"] == "4"


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("masters", ["float32", "split"])
def test_masters_of_parts_are_parts_of_masters(optimizer: Any, masters: Any) -> None:
    """To the bit, whatever the optimizer keeps, for any number of ranks; rows and columns."""
    settings = EsSettings(optimizer=optimizer, momentum=0.9, masters=masters)
    shapes = {"a.weight": (192, 96), "b.weight": (96, 192)}
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    fold = fold_for(torch.device("cpu"))
    whole = MasterWeights({name: w.clone() for name, w in weights.items()}, settings, torch.bfloat16, fold)
    for step in (1, 2, 3):
        whole.apply(update(step), served_factors_of)
    expected = whole.state()
    for ranks in (2, 3, 4):
        for rank in range(ranks):
            parts = {n: Part(shape=shapes[n], axis=axis, index=rank, parts=ranks) for axis, n in enumerate(shapes)}
            part = MasterWeights({n: parts[n].of(w) for n, w in weights.items()}, settings, torch.bfloat16, fold)

            def factors_of(
                noise: NoiseSpec, pairs_K: Tensor, here: Any, *rest: Any, parts: dict[str, Part] = parts
            ) -> dict[str, tuple[Tensor, Tensor]]:
                return served_factors_of(noise, pairs_K, here, *rest, [parts[name].offset for name, _, _ in here])

            for step in (1, 2, 3):
                part.apply(update(step), factors_of)
            assert_equal(part.state(), {key: parts[key.split("/")[1]].of(value) for key, value in expected.items()})
