"""Nothing is ever added to served weights and subtracted again: hundreds of populations leave every byte as it was."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from eggroll_llm.config.schema import EngineConfig
from eggroll_llm.engine.interface import Decoding, Request
from eggroll_llm.engine.vllm.engine import VllmEngine
from eggroll_llm.es.estimate import UpdateSpec
from eggroll_llm.es.noise import NoiseSpec
from eggroll_llm.system.hardware import serves_on_cpu

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(not serves_on_cpu(), reason="reads the packed weights of a CPU"),
]

POPULATION, SLOTS, RANK, SIGMA = 6, 4, 2, 0.05


@torch.inference_mode()
def served_bytes(engine: VllmEngine) -> dict[str, bytes]:
    """Of all that vLLM computes with. A linear weight on CPU is packed: its product with the identity is its bits."""
    worker = engine._llm.model_executor.driver_worker.worker
    model = worker.model_runner.model
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    for layer in worker.model_runner.es_population.layers:
        base = layer.module.base_layer
        tensors.pop(f"{layer.name}.base_layer.weight")
        identity = torch.eye(layer.in_features, dtype=engine.dtype)
        tensors[layer.name] = base.cpu_linear(identity, base.weight, None)
    return {name: bytes_of(tensor) for name, tensor in tensors.items()}


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().flatten().contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(("kind", "dtype", "steps"), [("llama", "float32", 300), ("qwen2", "bfloat16", 100)])
def test_hundreds_of_populations_leave_the_served_weights_as_they_were(
    tiny_model: Callable[[str], Path], kind: str, dtype: Any, steps: int
) -> None:
    config = EngineConfig(dtype=dtype, kv_cache_gib=0.05, max_sequences=16)
    engine = VllmEngine(tiny_model(kind), config, slots=SLOTS, rank=RANK, max_model_len=64)
    try:
        before = served_bytes(engine)
        masters = {name: tensor.clone() for name, tensor in engine.state().items()}
        linear = engine._llm.model_executor.driver_worker.worker.model_runner.es_population.layers
        for layer in linear:  # what is compared is what the masters round to
            rounded = torch.cat([masters[f"master/{name}"].to(engine.dtype) for name in layer.parameters])
            assert before[layer.name] == bytes_of(rounded.T)
        tokens = set()
        for step in range(1, steps + 1):
            engine.begin(NoiseSpec(seed=3, step=step, rank=RANK, sigma=SIGMA), POPULATION)
            requests = [Request(prompt_ids=(5 + step % 300, 7, 11), member=m) for m in (*range(POPULATION), None)]
            tokens |= {completion.token_ids for completion in engine.generate(requests, Decoding(max_tokens=1))}
        assert len(tokens) > 20  # the members were at work
        assert served_bytes(engine) == before
        assert all(torch.equal(tensor, masters[name]) for name, tensor in engine.state().items())

        fitness = (1.0, -1.0, 0.5, 0.25, -0.75, 0.0)
        engine.update(
            UpdateSpec(step=1, noise_step=1, seed=3, rank=RANK, sigma=SIGMA, learning_rate=0.02, fitness_M=fitness)
        )
        after = served_bytes(engine)
        assert {name for name in before if before[name] != after[name]} == {layer.name for layer in linear}
    finally:
        engine.close()
