"""What is measured: a recipe's model, or a model's shape without its weights."""

import json
from pathlib import Path

import pytest

from eggroll_llm.bench import plan
from eggroll_llm.bench.subject import (
    SHAPES,
    gpu_bytes,
    kv_cache_bytes,
    of_shape,
    population_bytes,
    shape_config,
)
from eggroll_llm.config.schema import EngineConfig
from eggroll_llm.errors import ModelError
from eggroll_llm.models.files import tensor_shapes
from eggroll_llm.models.targets import trained_parameters
from eggroll_llm.system.hardware import GIB

BFLOAT16 = EngineConfig(dtype="bfloat16")
MILLIONS = {"smollm2-135m": 134.5, "qwen2.5-0.5b": 494.0, "qwen2.5-1.5b": 1543.7, "qwen2.5-7b": 7615.6}
"""Parameters of the published models."""


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_has_the_parameters_of_the_published_model(name: str) -> None:
    import math

    with of_shape(name, BFLOAT16, 0.01, num_prompts=3, input_len=5) as subject:
        parameters = sum(math.prod(shape) for shape in tensor_shapes(subject.model_dir).values())
        assert parameters / 1e6 == pytest.approx(MILLIONS[name], abs=0.05)
        assert len(trained_parameters(subject.model_dir)) == 7 * SHAPES[name]["num_hidden_layers"]
        assert [len(prompt) for prompt in subject.prompts] == [5] * 3
        assert subject.context(output_len=20) == 32
        assert subject.context(output_len=28) == 64
        files = sum(path.stat().st_size for path in subject.model_dir.iterdir())
    assert files < 100_000  # no weights
    assert not subject.model_dir.exists()


def test_the_memory_of_a_gpu_is_foreseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Qwen2.5-1.5B with 512 sequences of 264 tokens, plain vLLM took 8.6 GiB of an H100, with a cache of 4.5."""
    monkeypatch.setattr("eggroll_llm.bench.subject.serves_on_cpu", lambda: False)
    with of_shape("Qwen2.5-1.5B", BFLOAT16, 0.01, num_prompts=1, input_len=128) as subject:
        assert kv_cache_bytes(subject, 512, 264) == 513 * 320 * 28_672
        plain = gpu_bytes(subject, plan.EAGER, 512, 264) - kv_cache_bytes(subject, 512, 264) + 4.5 * GIB
        assert 8.6 < plain / GIB < 11
        member = 2 * 28 * (2 * 3072 + 2 * 1792 + 3 * 10_496)
        masters = 4 * 28 * (2 * 1536 * 1536 + 2 * 1536 * 256 + 3 * 1536 * 8960)
        assert population_bytes(subject, plan.population(1)) == masters + 64 * member
        beside = gpu_bytes(subject, plan.population(1), 512, 264) - gpu_bytes(subject, plan.EAGER, 512, 264)
        assert beside == population_bytes(subject, plan.population(1))


def test_a_shape_may_be_that_of_a_model_on_disk(tmp_path: Path) -> None:
    config = {**SHAPES["qwen2.5-0.5b"], "num_hidden_layers": 1, "auto_map": {"AutoConfig": "evil.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for where in (tmp_path, tmp_path / "config.json"):
        found = shape_config(str(where))
        assert found["num_hidden_layers"] == 1
        assert "auto_map" not in found  # it names code


def test_a_shape_that_is_none_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"--random-weights llama-9t: neither one of smollm2-135m, qwen2.5-0.5b"):
        shape_config("llama-9t")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="does not hold a JSON object"):
        shape_config(str(tmp_path))
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"]}')
    with pytest.raises(ModelError, match="BertModel"):
        shape_config(str(tmp_path))
    (tmp_path / "config.json").write_text('{"architectures": ["NewForCausalLM"], "model_type": "new"}')
    with pytest.raises(ModelError, match="has no vocab_size"):
        shape_config(str(tmp_path))
    (tmp_path / "config.json").write_text(
        '{"architectures": ["NewForCausalLM"], "model_type": "new", "vocab_size": 320}'
    )
    with (
        pytest.raises(ModelError, match="transformers makes no model of it"),
        of_shape(str(tmp_path), EngineConfig(dtype="bfloat16"), 0.01, 1, 4),
    ):
        pass
