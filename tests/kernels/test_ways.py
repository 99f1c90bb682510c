"""vLLM's own adapter arithmetic, and ours without a compiler, serve the same members as our engine."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from next_token import next_token_logprobs
from torch import Tensor

from eggroll_llm.config.schema import EngineConfig
from eggroll_llm.engine.interface import Request
from eggroll_llm.engine.vllm.engine import VllmEngine
from eggroll_llm.es.estimate import UpdateSpec
from eggroll_llm.es.noise import NoiseSpec
from eggroll_llm.es.settings import EsSettings
from eggroll_llm.kernels import build, member_term
from eggroll_llm.system.hardware import serves_on_cpu

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not serves_on_cpu(), reason="vLLM's own adapters serve no float32 on a GPU"),
]

NOISE = NoiseSpec(seed=3, step=1, rank=2, sigma=0.05)
UPDATE = UpdateSpec(
    step=1, noise_step=1, seed=3, rank=2, sigma=0.05, learning_rate=0.02, fitness_M=(1.0, -1.0, 0.5, 0.25)
)
REQUESTS = [Request(prompt_ids=tuple(range(5 + m, 45 + m)), member=m) for m in (0, 1, 3, 2)]


def before_and_after(model_dir: Path, *, stock: bool) -> tuple[Tensor, Tensor]:
    """Log-probabilities of four members, before and after an update."""
    config = EngineConfig(dtype="float32", kv_cache_gib=0.05, slots=4, max_sequences=16, max_model_len=64)
    engine = VllmEngine(model_dir, config, EsSettings(rank=2), stock=stock)
    try:
        engine.begin(NOISE, 4)
        before = next_token_logprobs(engine, REQUESTS)
        engine.update(UPDATE)
        engine.begin(NOISE, 4)
        return before, next_token_logprobs(engine, REQUESTS)
    finally:
        engine.close()


def test_all_ways_agree(tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    ours = before_and_after(tiny_model("llama"), stock=False)
    assert (ours[0] - ours[1]).abs().max() > 0.02
    assert (ours[0][0] - ours[0][1]).abs().max() > 0.02
    stock = before_and_after(tiny_model("llama"), stock=True)
    monkeypatch.setattr(build, "library", lambda: None)
    member_term.implementation.cache_clear()
    try:
        without_a_compiler = before_and_after(tiny_model("llama"), stock=False)
    finally:
        member_term.implementation.cache_clear()
    for other in (stock, without_a_compiler):
        for found, expected in zip(other, ours, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
