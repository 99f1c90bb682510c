"""What greedy answers on a CPU do not depend on: other requests, their order, threads, slots, chunks, cached prefixes.
Nor do the probabilities that members give to answers depend on the other members.

It holds to the bit, log-probabilities included, in float32 and, where the processor multiplies it without AMX, in
bfloat16, for prompts that fit one tile of vLLM's attention (docs/determinism.md).
"""

import dataclasses
import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from threads import threads

from eggroll_llm.config.schema import EngineConfig
from eggroll_llm.engine.interface import Decoding, Request
from eggroll_llm.engine.vllm import engine as engine_module
from eggroll_llm.engine.vllm import weights
from eggroll_llm.engine.vllm.engine import VllmEngine
from eggroll_llm.es.noise import NoiseSpec
from eggroll_llm.es.settings import EsSettings
from eggroll_llm.system.hardware import cpu_flags, serves_on_cpu
from eggroll_llm.tasks.prompts import Prompter

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not serves_on_cpu(), reason="what holds on CUDA is in test_engine.py"),
]

NATIVE_BFLOAT16 = "avx512_bf16" in cpu_flags() and "amx_bf16" not in cpu_flags()
DTYPES = [
    "float32",
    pytest.param(
        "bfloat16",
        marks=pytest.mark.skipif(not NATIVE_BFLOAT16, reason="oneDNN's sums depend on the batch on this processor"),
    ),
]
MEMBERS = 6
GREEDY = Decoding(max_tokens=16, logprobs=True)
Answer = tuple[tuple[int, ...], tuple[float, ...]]


@pytest.mark.parametrize("in_features", [576, 1536])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_a_layer_has_the_same_bits_in_any_batch(dtype: str, in_features: int) -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(320, in_features, generator=draw).to(getattr(torch, dtype))
    x = torch.randn(256, in_features, generator=draw).to(weight.dtype)
    layer: Any = torch.nn.Module()
    weights.repack(layer, weight)
    together = layer.cpu_linear(x, layer.weight, None)
    for count in (1, 2):
        with threads(count):
            for rows in (1, 2, 3, 7, 33, 100):
                apart = torch.cat([layer.cpu_linear(part, layer.weight, None) for part in x.split(rows)])
                assert torch.equal(apart, together), (count, rows)


LAYERS = 2


@pytest.fixture(scope="module")
def first_layers(embedded_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model without most of its layers, which are all alike: every product has the shape of a real one."""
    directory = tmp_path_factory.mktemp("first") / "layers"
    shutil.copytree(embedded_model, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((directory / "config.json").read_text()) | {"num_hidden_layers": LAYERS}
    (directory / "config.json").write_text(json.dumps(config))
    tensors = load_file(embedded_model / "model.safetensors")
    deeper = {name for name in tensors if name.startswith("model.layers.") and int(name.split(".")[2]) >= LAYERS}
    assert deeper
    kept = {name: tensor for name, tensor in tensors.items() if name not in deeper}
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def tile(dtype: str) -> int:
    """Tokens that vLLM's attention takes at once: those whose q, k, v, scores and sums fill half of the L2 cache."""
    head_size, itemsize = 64, getattr(torch, dtype).itemsize
    per_token = head_size * (4 + 4 + 2 * itemsize) + 32
    return int(torch.cpu.get_capabilities()["l2_cache_size"]) // 2 // per_token // 32 * 32


def requests_of(model_dir: Path, longest: int) -> list[Request]:
    """The base model and six members: three prompts of 15 to 120 tokens each, and one of `longest` for two of them."""
    draw, tokenizer = random.Random(0), Prompter(model_dir).tokenizer

    def example() -> str:
        a, b = draw.randint(1, 99), draw.randint(1, 99)
        return f"Make {a + b} from {a} and {b}: {a} + {b} = {a + b}"

    texts = ["\n".join([*(example() for _ in range(1 + i % 4)), "Make 57 from"]) for i in range(3 * (MEMBERS + 1))]
    prompts = [tuple(tokenizer(text)["input_ids"]) for text in texts]
    long = tuple(tokenizer("\n".join(example() for _ in range(longest // 10)))["input_ids"])[:longest]
    assert len(long) == longest
    members = [*3 * [None, *range(MEMBERS)], None, 0]
    return [Request(prompt_ids=ids, member=m) for ids, m in zip([*prompts, long, long], members, strict=True)]


def answers(engine: VllmEngine, requests: Sequence[Request], at_once: int) -> list[Answer]:
    """Answers with their log-probabilities, the requests sent in waves."""
    engine.begin(NoiseSpec(seed=3, step=1, rank=1, sigma=0.04), MEMBERS)
    waves = [requests[first : first + at_once] for first in range(0, len(requests), at_once)]
    return [(found.token_ids, found.logprobs) for wave in waves for found in engine.generate(wave, GREEDY)]


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_answer_depends_on_nothing_but_its_request(
    dtype: str, first_layers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = requests_of(first_layers, min(tile(dtype), 640))
    config = EngineConfig(dtype=dtype, kv_cache_gib=0.2, slots=MEMBERS, max_sequences=64, max_model_len=672)
    engine = VllmEngine(first_layers, config, EsSettings(), logprobs=True)
    try:
        with threads(2):
            together = answers(engine, requests, len(requests))
            assert len({token_ids for token_ids, _ in together}) > len(requests) // 2
            assert answers(engine, requests, len(requests)) == together
            assert answers(engine, requests[::3], 1) == together[::3]
        order = random.Random(1).sample(range(len(requests)), len(requests))
        shuffled = dict(zip(order, answers(engine, [requests[i] for i in order], 5), strict=True))
        assert [shuffled[i] for i in range(len(requests))] == together
        members: list[int | None] = [None, *range(MEMBERS)]
        scored = [(requests[i].prompt_ids, together[i][0]) for i in range(0, len(requests), 4)]
        with threads(2):
            scores = engine.score(scored, members)
            assert torch.equal(torch.cat([engine.score(scored, [member]) for member in members]), scores)
        with threads(1):
            assert torch.equal(engine.score(scored, members[::-1]).flip(0), scores)
    finally:
        engine.close()

    engine_args: Callable[..., Any] = engine_module.engine_args

    def in_chunks(*args: Any, **kwargs: Any) -> Any:
        found = engine_args(*args, **kwargs)
        found.max_num_batched_tokens = 50  # shorter than most prompts
        return found

    monkeypatch.setattr(engine_module, "engine_args", in_chunks)
    few = dataclasses.replace(config, slots=2, max_sequences=3)
    other = VllmEngine(first_layers, few, EsSettings(), prefix_caching=False, logprobs=True)
    try:
        with threads(1):
            assert answers(other, requests, len(requests)) == together
    finally:
        other.close()
