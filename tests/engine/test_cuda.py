"""What a GPU has to compute as a CPU does. Skipped without one; `engine/test_engine.py` runs on either."""

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor
from without_vllm import dense_logprobs

from eggroll_llm.config.schema import EngineConfig
from eggroll_llm.engine.interface import Completion, Decoding, Request
from eggroll_llm.es import noise as definition
from eggroll_llm.es.estimate import UpdateSpec, fold_with_torch
from eggroll_llm.es.masters import MasterWeights
from eggroll_llm.es.noise import NoiseSpec, served_factors
from eggroll_llm.es.settings import EsSettings
from eggroll_llm.kernels.fold import fold_for
from eggroll_llm.kernels.noise import served_factors_of

if TYPE_CHECKING:
    from eggroll_llm.engine.vllm.engine import VllmEngine

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

SHAPES = [("a.weight", 384, 128), ("b.weight", 130, 257), ("c.weight", 384, 128)]


def spec(step: int, learning_rate: float) -> UpdateSpec:
    return UpdateSpec(
        step=step,
        noise_step=step,
        seed=3,
        rank=2,
        sigma=1e-3,
        learning_rate=learning_rate,
        fitness_M=tuple(math.sin(m * m) for m in range(64)),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rank", [1, 3, 16])
def test_noise_has_the_bits_that_a_cpu_makes(rank: int, dtype: torch.dtype) -> None:
    noise, pairs_K = NoiseSpec(seed=2**40 + 3, step=7, rank=rank, sigma=1e-3), torch.tensor([0, 5, 2047, 9])
    on_cpu = definition.served_factors_of(noise, pairs_K, SHAPES, dtype, "cpu")
    for source in (definition.served_factors_of, served_factors_of):  # in torch and by the kernel
        on_gpu = source(noise, pairs_K, SHAPES, dtype, "cuda")
        for name, factors in on_cpu.items():
            for cpu, gpu in zip(factors, on_gpu[name], strict=True):
                assert gpu.device.type == "cuda"
                assert torch.equal(cpu, gpu.cpu())


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("compiled", [True, False])
def test_updates_agree_with_those_of_a_cpu_and_repeat_to_the_bit(optimizer: str, compiled: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {name: 0.05 * torch.randn(out, inside, generator=generator) for name, out, inside in SHAPES}

    def trained(device: str) -> MasterWeights:
        settings = EsSettings(optimizer=optimizer)
        on_device = {name: weight.to(device) for name, weight in weights.items()}
        fold = fold_for(torch.device(device)) if compiled else fold_with_torch
        masters = MasterWeights(on_device, settings, torch.bfloat16, fold)
        for step in (1, 2):
            masters.apply(spec(step, learning_rate=1e-3))
        return masters

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")  # TF32, which updates must not use
    try:
        cpu, gpu, again = (trained(device).state() for device in ("cpu", "cuda", "cuda"))
    finally:
        torch.set_float32_matmul_precision(before)
    assert gpu.keys() == again.keys()
    assert all(torch.equal(gpu[key], again[key]) for key in gpu)
    for name, weight in weights.items():
        right, found = cpu[f"master/{name}"], gpu[f"master/{name}"].cpu()
        moved = (right - weight).square().mean().sqrt()
        assert moved > 1e-4
        assert (found - right).square().mean().sqrt() < 1e-4 * moved


PROMPT = (5, 6, 7, 8, 9, 60, 61)
NOISE = NoiseSpec(seed=3, step=1, rank=1, sigma=0.05)


def check_decoding(engine: "VllmEngine", model_dir: Path, members: Sequence[int | None]) -> None:
    """Members answer in one batch; of the last six each token is the most probable with dense weights, in bfloat16."""
    requests = [Request(prompt_ids=PROMPT, member=member) for member in members]
    answers = engine.generate(requests, Decoding(max_tokens=4, temperature=0.0, ignore_eos=True))
    for request, answer in list(zip(requests, answers, strict=True))[-6:]:
        added = {}
        for name, (out, inside) in engine.shapes.items() if request.member is not None else ():
            pair = torch.tensor([request.member // 2])
            A_KOR, B_KIR = served_factors(NOISE, pair, name, out, inside, torch.bfloat16, "cpu")
            added[name] = (-1) ** request.member * A_KOR[0].float() @ B_KIR[0].float().T
        for length, token_id in enumerate(answer.token_ids):
            logprobs = dense_logprobs(model_dir, [PROMPT + answer.token_ids[:length]], added)[0]
            assert logprobs[token_id] > logprobs.max() - 0.2  # what bfloat16 can blur


def check_sampling(engine: "VllmEngine", monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row is drawn with the seed of its request, while requests of several lengths come and go."""
    runner = engine._llm.model_executor.driver_worker.worker.model_runner
    forward, drawn = runner.sampler.topk_topp_sampler.forward, []

    def watched(sample: Callable[..., Tensor], logits: Tensor, seed_Q: Tensor, position_Q: Tensor) -> Tensor:
        wanted = [runner.requests[request].sampling_params.extra_args["seed"] for request in runner.input_batch.req_ids]
        drawn.append((seed_Q.tolist()[: len(wanted)], wanted))
        return sample(logits, seed_Q, position_Q)

    *others, sample = forward.args
    watching = functools.partial(forward.func, *others, functools.partial(watched, sample))
    monkeypatch.setattr(runner.sampler.topk_topp_sampler, "forward", watching)
    requests = [Request(prompt_ids=PROMPT, member=member, seed=100 + i) for i, member in enumerate((None, 0, 1) * 10)]
    engine.submit(dict(enumerate(requests[::2])), Decoding(max_tokens=3, temperature=1.0, ignore_eos=True))
    engine.submit(dict(enumerate(requests[1::2], 100)), Decoding(max_tokens=7, temperature=1.0, ignore_eos=True))
    answers: dict[int, Completion] = {}
    while len(answers) < len(requests):
        answers |= engine.poll()
    assert len(drawn) > 7
    assert all(found == wanted for found, wanted in drawn)


@pytest.mark.vllm
@pytest.mark.parametrize("kind", ["qwen2", "granite"])  # in fused blocks, and layer by layer
def test_graphs_decode_what_each_member_would(
    tiny_model: Callable[[str], Path], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In batches of every kind of size, padded or not, with the base model among the members, which change places.

    An update changes weights in the places that the graphs read.
    """
    from eggroll_llm.engine.vllm.engine import VllmEngine

    model_dir = tiny_model(kind)
    config = EngineConfig(dtype="bfloat16", gpu_memory_utilization=0.1, slots=5, max_sequences=24, max_model_len=64)
    little = {"kv_cache_memory_bytes": 2**26}
    engine = VllmEngine(model_dir, config, EsSettings(), vllm_args=little)
    try:
        runner = engine._llm.model_executor.driver_worker.worker.model_runner
        assert len(runner.cudagraph_dispatcher.get_capture_descs()[0][1]) == 6  # 1, 2, 4, 8, 16, 24
        assert runner.use_async_scheduling
        engine.begin(NOISE, 12)
        for turn, size in enumerate((1, 2, 3, 8, 9, 17, 24, 30)):  # as many members as slots, others every time
            members = [None, *((turn + each) % 12 for each in range(5))]
            check_decoding(engine, model_dir, [members[i % 6] for i in range(size)])
        check_sampling(engine, monkeypatch)
        fitness = (1.0, -1.0, 0.5, 0.25, -0.75, 0.0)
        engine.update(
            UpdateSpec(step=1, noise_step=1, seed=3, rank=1, sigma=0.05, learning_rate=0.02, fitness_M=fitness)
        )
        engine.export(tmp_path / "updated")
        before, after = (dense_logprobs(at, [PROMPT], {}) for at in (model_dir, tmp_path / "updated"))
        assert (before - after).abs().max() > 0.1
        engine.begin(NOISE, 6)
        for size in (1, 9, 24):
            check_decoding(engine, tmp_path / "updated", [(None, 0, 1, 2, 4, 5)[i % 6] for i in range(size)])
    finally:
        engine.close()


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize(("kind", "offload"), [("float32", True), ("split", False), ("split", True)])
def test_masters_have_the_same_bits_wherever_they_are_kept(kind: str, offload: bool, optimizer: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {name: (0.05 * torch.randn(o, i, generator=generator)).bfloat16() for name, o, i in SHAPES}

    def trained(kind: str, offload: bool) -> MasterWeights:
        settings = EsSettings(optimizer=optimizer, masters=kind)
        given = {name: weight.clone() for name, weight in weights.items()}
        masters = MasterWeights(given, settings, torch.bfloat16, device=torch.device("cuda"), offload=offload)
        for step in (1, 2, 3):
            masters.apply(spec(step, learning_rate=1e-4))
        return masters

    usual, other = trained("float32", False), trained(kind, offload)
    right, found = usual.state(), other.state()
    assert all(torch.equal(right[key].cpu(), value.cpu()) for key, value in found.items())
    assert found["master/a.weight"].is_pinned() == (kind == "float32")
    for name in weights:
        assert other.served(name).device.type == ("cpu" if kind == "float32" else "cuda")
        assert int((other.served(name).cpu() != usual.served(name).cpu()).sum()) <= (10 if kind == "split" else 0)
