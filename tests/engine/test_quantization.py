"""FP8: what is served after an update is what vLLM loads from the exported model; members are added in bfloat16."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from next_token import next_token_logprobs
from torch import Tensor
from without_vllm import dense_logprobs

from eggroll_llm.config.schema import EngineConfig
from eggroll_llm.engine.interface import Request
from eggroll_llm.engine.vllm.engine import VllmEngine
from eggroll_llm.engine.vllm.layers import Layer
from eggroll_llm.engine.vllm.ranks import Part
from eggroll_llm.engine.vllm.weights import initial_weights, quantise_rows
from eggroll_llm.errors import ModelError
from eggroll_llm.es.estimate import UpdateSpec
from eggroll_llm.es.noise import NoiseSpec, served_factors
from eggroll_llm.es.settings import EsSettings

pytestmark = pytest.mark.vllm

PROMPTS = tuple(tuple((7 * i + j) % 300 + 3 for j in range(40)) for i in range(3))
NOISE = NoiseSpec(seed=3, step=1, rank=2, sigma=0.05)
SPEC = UpdateSpec(
    step=1,
    noise_step=1,
    seed=3,
    rank=2,
    sigma=0.05,
    learning_rate=0.02,
    fitness_M=(1.0, -1.0, 0.5, 0.25, -0.75, 0.0),
)
MEMBERS = (None, 0, 1, 5)


def start(model_dir: Path, ranks: int = 1) -> VllmEngine:
    config = EngineConfig(
        dtype="bfloat16",
        quantization="fp8",
        kv_cache_gib=0.05,
        gpu_memory_utilization=0.1,
        slots=4,
        max_sequences=16,
        max_model_len=128,
        tensor_parallel=ranks,
    )
    return VllmEngine(model_dir, config, EsSettings(rank=2))


def quantised(engine: VllmEngine) -> dict[str, Tensor]:
    """Every FP8 weight and its scales, as vLLM holds them."""
    model: Any = engine._llm.model_executor.driver_worker.worker.model_runner.model
    parameters = {name: parameter.data for name, parameter in model.named_parameters()}
    names = [name for name, value in parameters.items() if value.dtype is torch.float8_e4m3fn]
    return {name: parameters[name] for each in names for name in (each, f"{each}_scale")}


def logprobs(engine: VllmEngine) -> Tensor:
    """[members, prompts, vocabulary], the base model first."""
    engine.begin(NOISE, 6)
    requests = [Request(prompt_ids=prompt, member=member) for member in MEMBERS for prompt in PROMPTS]
    return next_token_logprobs(engine, requests).view(len(MEMBERS), len(PROMPTS), -1)


def dense(model_dir: Path, engine: VllmEngine, member: int | None) -> Tensor:
    """What transformers computes in float32 with the bfloat16 weights, perturbed."""
    added = {}
    for name, (out, inside) in engine.shapes.items() if member is not None else ():
        A_KOR, B_KIR = served_factors(NOISE, torch.tensor([member // 2]), name, out, inside, engine.dtype, "cpu")
        added[name] = (-1.0 if member % 2 else 1.0) * A_KOR[0].float() @ B_KIR[0].float().T
    return dense_logprobs(model_dir, PROMPTS, added)


def test_an_update_serves_what_vllm_would_load(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    model_dir = tiny_model("llama")
    engine = start(model_dir)
    before, addresses = logprobs(engine), {name: value.data_ptr() for name, value in quantised(engine).items()}
    assert len(addresses) == 2 * 2 * 4  # values and scales of two layers with four products
    expected = [dense(model_dir, engine, member) for member in MEMBERS]
    for at, member in enumerate(MEMBERS):
        distance = [float((before[at] - other).abs().max()) for other in expected]
        # FP8 has three bits of mantissa: 0.7 from the weights it was rounded from, and other members are 5 away.
        assert distance[at] < 1.5 < 3 < min(distance[:at] + distance[at + 1 :]), (member, distance)
    engine.update(SPEC)
    after, served = logprobs(engine), {name: value.clone() for name, value in quantised(engine).items()}
    assert {name: value.data_ptr() for name, value in quantised(engine).items()} == addresses
    assert (after - before).abs().max() > 0.5
    checksum = engine.checksum()
    engine.export(tmp_path / "model")
    engine.close()

    loaded = start(tmp_path / "model")
    assert loaded.checksum() == checksum
    for name, value in quantised(loaded).items():
        assert torch.equal(value.view(torch.uint8), served[name].view(torch.uint8)), name
    assert torch.equal(logprobs(loaded), after)
    loaded.close()


def test_ranks_scale_whole_rows(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of o and down each of two ranks has a half of every row: else the start would refuse what vLLM has loaded."""
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")  # or each rank compiles vLLM's look into the vocabulary
    engine = start(tiny_model("llama"), ranks=2)
    before = logprobs(engine)
    engine.update(SPEC)
    after = logprobs(engine)
    engine.export(tmp_path / "model")
    for at, member in ((0, None), (1, 0)):
        right = dense(tmp_path / "model", engine, member)
        assert (after[at] - right).abs().max() < 1.5 < (after[1 - at] - right).abs().max()
    assert (after - before).abs().max() > 0.5
    engine.close()


def test_weights_in_a_form_that_cannot_be_rewritten_are_refused() -> None:
    """As where a kernel pads or packs them."""
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    linear: Any = torch.nn.Linear(1, 1)
    linear.tp_size = 1
    values, scales = quantise_rows(weight, linear)
    padded = torch.zeros(16, 16).to(torch.float8_e4m3fn)
    for kept, fine in ((values, True), (padded, False), (values.flip(0), False)):
        linear.weight = torch.nn.Parameter(kept.t(), requires_grad=False)
        linear.weight_scale = torch.nn.Parameter(scales, requires_grad=False)
        linear.es_loaded_weight = weight
        module = SimpleNamespace(base_layer=linear)
        layer = Layer(name="a", module=module, parameters=("a.weight",), parts=(Part(shape=(8, 16)),))
        if fine:
            assert torch.equal(initial_weights(linear, [layer])["a.weight"], weight)
        else:
            with pytest.raises(ModelError, match=r'^layer \'a\': .* set engine\.quantization to "none"'):
                initial_weights(linear, [layer])
