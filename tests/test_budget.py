"""What a configuration will cost, against numbers worked out by hand for a tiny model."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eggroll_llm.budget import GIB, budget
from eggroll_llm.config import EngineConfig, EsConfig, GrpoConfig, RunConfig, SamplingConfig
from eggroll_llm.model_files import tensor_shapes
from eggroll_llm.prompts import ProblemSet
from eggroll_llm.session import Prepared

# Of a layer: q and o 128 x 128, k and v 64 x 128, gate and up 256 x 128, down 128 x 256; two layers.
WEIGHTS = 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 256 * 128)
WIDTH = 2 * (2 * (128 + 128) + 2 * (64 + 128) + 3 * (256 + 128))
ES = EsConfig(population=6, sigma=0.01, learning_rate=0.01, rank=4)


def lines(model_dir: Path, **changes: Any) -> list[str]:
    config = RunConfig(
        task="countdown",
        steps=10,
        sampling=SamplingConfig(prompts_per_step=3, samples_per_prompt=2, max_tokens=50, temperature=1.0),
        es=ES,
        engine=EngineConfig(slots=5, kv_cache_gib=0.5, dtype="bfloat16"),
    )
    none: Any = None
    return budget(
        Prepared(
            config=dataclasses.replace(config, **changes),
            task=none,
            model_dir=model_dir,
            train=ProblemSet(problems=[{}] * 4, hashes=[""] * 4, prompts=[(1,) * 10, (1,) * 20, (1,) * 30, (1,) * 40]),
            held_out=ProblemSet(problems=[{}] * 3, hashes=[""] * 3, prompts=[(1,)] * 3),
        )
    )


@pytest.fixture
def model(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


def test_completions_and_tokens(model: Path) -> None:
    """36 completions with 25 prompt tokens on average and at most 50 generated ones."""
    assert lines(model)[:4] == [
        "problems: 4 for training, 3 held out",
        "per step: 36 completions = 6 members x 3 prompts x 2 samples",
        "per step: 900 prompt tokens (25 each), at most 1,800 generated",
        "in all: 10 steps, 360 completions",
    ]
    assert lines(model, steps=0, minutes=2.5)[3] == "in all: at most 2.5 minutes of training"


@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 2), ("float32", 4)])
@pytest.mark.parametrize(("optimizer", "tensors"), [("sgd", 0), ("momentum", 1), ("adam", 2)])
def test_memory(
    model: Path, monkeypatch: pytest.MonkeyPatch, dtype: Any, size: int, optimizer: Any, tensors: int
) -> None:
    """In units of a KiB, as a tiny model takes no GiB."""
    monkeypatch.setattr("eggroll_llm.budget.GIB", 1024)
    engine = EngineConfig(slots=5, kv_cache_gib=0.5, dtype=dtype)
    memory = [
        line.removeprefix("memory: ")
        for line in lines(model, engine=engine, es=dataclasses.replace(ES, optimizer=optimizer))
        if line.startswith("memory: ")
    ]
    parts = {
        "masters (float32)": 4 * WEIGHTS,
        f"served weights ({dtype})": size * WEIGHTS,
        "slots": size * 5 * 4 * WIDTH,
        "noise of a step": size * 3 * 4 * WIDTH,
    }
    if tensors:
        parts["optimizer"] = 4 * tensors * WEIGHTS
    parts["key-value cache"] = 512
    assert memory[:-1] == [f"{amount / 1024:.2f} GiB for {name}" for name, amount in parts.items()]
    assert memory[-1].startswith(f"{sum(parts.values()) / 1024:.2f} GiB for these together")


def test_a_gib_is_one(model: Path) -> None:
    assert GIB == 1024**3
    assert "memory: 0.50 GiB for key-value cache" in lines(model)


def test_memory_of_grpo(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All weights, embeddings too, and what grows with the micro batch is named: it cannot be told beforehand."""
    monkeypatch.setattr("eggroll_llm.budget.GIB", 1024)
    weights = sum(math.prod(shape) for shape in tensor_shapes(model).values())
    memory = [
        line.removeprefix("memory: ")
        for line in lines(model, method="grpo", grpo=GrpoConfig(learning_rate=1e-5, micro_batch=2))
        if line.startswith("memory: ")
    ]
    parts = {
        "weights in training (float32)": 4 * weights,
        "gradients": 4 * weights,
        "optimizer": 8 * weights,
        "served weights (bfloat16)": 2 * weights,
        "key-value cache": 512,
    }
    assert memory[:-1] == [f"{amount / 1024:.2f} GiB for {name}" for name, amount in parts.items()]
    assert memory[-1].startswith(f"{sum(parts.values()) / 1024:.2f} GiB for these together, besides")
    assert memory[-1].endswith("the activations of 2 completions of at most 90 tokens")
