"""Two hundred steps take no more memory than forty."""

from collections.abc import Callable
from pathlib import Path

import pytest

from eggroll_llm.bench.plain import memory_gib
from eggroll_llm.config.schema import EngineConfig
from eggroll_llm.engine.interface import Decoding, Request
from eggroll_llm.engine.vllm.engine import VllmEngine
from eggroll_llm.es.estimate import UpdateSpec
from eggroll_llm.es.noise import NoiseSpec
from eggroll_llm.es.settings import EsSettings

pytestmark = pytest.mark.vllm

POPULATION, SLOTS = 6, 4


def test_memory_does_not_grow(tiny_model: Callable[[str], Path]) -> None:
    config = EngineConfig(dtype="bfloat16", kv_cache_gib=0.05, max_sequences=16, slots=SLOTS, max_model_len=64)
    engine = VllmEngine(tiny_model("llama"), config, EsSettings(rank=2))
    resident = []
    for step in range(1, 241):
        engine.begin(NoiseSpec(seed=0, step=step, rank=2, sigma=0.01), POPULATION)
        requests = [
            Request(prompt_ids=tuple(range(step % 90 + 3, step % 90 + 23)), member=m) for m in range(POPULATION)
        ]
        engine.generate(requests, Decoding(max_tokens=2))
        engine.update(
            UpdateSpec(
                step=step,
                noise_step=step,
                seed=0,
                rank=2,
                sigma=0.01,
                learning_rate=1e-5,
                fitness_M=(1.0, -1.0) * (POPULATION // 2),
            )
        )
        resident.append(memory_gib() * 1024)
    engine.close()
    assert resident[-1] - resident[39] < 2.0, f"{resident[39]:.1f} MiB after 40 steps, {resident[-1]:.1f} after 240"
