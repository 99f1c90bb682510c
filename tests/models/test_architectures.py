"""Which architectures are trained, and what is refused before an engine starts."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
from kinds import KINDS, MIXTURES
from safetensors.torch import load_file, save_file

from eggroll_llm.config.compare import frozen_hash
from eggroll_llm.config.schema import EngineConfig, GrpoConfig, RunConfig, SamplingConfig
from eggroll_llm.errors import ConfigError, ModelError
from eggroll_llm.es.settings import EsSettings
from eggroll_llm.models import architectures
from eggroll_llm.models.architectures import CPU_HEAD_SIZES, TESTED, check_tested, experts_used, head_size
from eggroll_llm.models.files import check_model, read_config, tensor_shapes
from eggroll_llm.training.prepare import prepare

TASK = """
class Words:
    def problems(self, split):
        return [{"word": f"{split} {n}"} for n in range(4)]
    def prompt(self, problem):
        return problem["word"]
    def score(self, completion, problem):
        return 0.0
"""
# What is known not to work, whatever the user insists on: changes of config.json, and what is said of them.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "gpt2": ({"architectures": ["GPT2LMHeadModel"]}, r"'GPT2LMHeadModel' cannot be trained here: it must be .* named"),
    "images": ({"architectures": ["Gemma3ForConditionalGeneration"]}, "cannot be trained here: it must be a text-only"),
    "qwen2-moe": ({"architectures": ["Qwen2MoeForCausalLM"], "num_experts": 8}, r"num_experts = 8: a mixture of exper"),
    "mixtral": ({"architectures": ["MixtralForCausalLM"], "num_local_experts": 4}, r"num_local_experts = 4: a mixture"),
    "deepseek": ({"n_routed_experts": 64}, "n_routed_experts = 64: a mixture of experts"),
    "head_dim": (
        {"head_dim": 16},
        "attention heads of size 16, but vLLM on a CPU supports only 32, 64, .*: use",
    ),
    "heads": (
        {"head_dim": None, "num_attention_heads": 8},
        "attention heads of size 16, but vLLM on a CPU supports only 32",
    ),
    "odd": ({"head_dim": 48}, "attention heads of size 48"),
}


@pytest.fixture
def model(tiny_model: Callable[[str], Path], tmp_path: Path) -> Path:
    (tmp_path / "words.py").write_text(TASK)
    return Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architectures, "serves_on_cpu", lambda: True)


def change(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def config(model: Path, *, insist: bool = False) -> RunConfig:
    return RunConfig(
        model=str(model),
        task="words.py:Words",
        steps=2,
        sampling=SamplingConfig(max_tokens=20),
        es=EsSettings(population=4, sigma=0.01, learning_rate=0.01),
        engine=EngineConfig(allow_untested_architecture=insist),
    )


@pytest.mark.parametrize(
    ("changes", "ranks", "said"),
    [
        ({}, 3, "has 4 attention heads, 2 of them .* set it to 2"),
        ({}, 8, "so many devices cannot share equally: set it to 4"),
        ({"num_attention_heads": 12, "num_key_value_heads": 3}, 2, "cannot share equally: set it to 1"),
        ({"intermediate_size": 254}, 4, "254 intermediate features .* set it to 2"),
        ({"architectures": ["Phi3ForCausalLM"]}, 2, "Phi3ForCausalLM, whose layers cannot be cut here: set it to 1"),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, 2, "Qwen3MoeForCausalLM, whose layers cannot be cut here"),
        ({"architectures": ["Olmo2ForCausalLM"]}, 2, "one of LlamaForCausalLM, .*, Gemma3ForCausalLM$"),
    ],
)
def test_what_devices_cannot_share_is_refused_before_the_engine(
    model: Path, tmp_path: Path, changes: dict[str, object], ranks: int, said: str
) -> None:
    change(model, **changes)
    run = config(model)
    run = dataclasses.replace(run, engine=dataclasses.replace(run.engine, tensor_parallel=ranks))
    with pytest.raises(ConfigError, match=rf"^engine\.tensor_parallel = {ranks}: .*{said}"):
        prepare(run, tmp_path)


@pytest.mark.parametrize("ranks", [2, 4])
def test_heads_may_have_copies(model: Path, ranks: int) -> None:
    """Two heads of k and v for four devices."""
    architectures.check_tensor_parallel(read_config(model), ranks, model)


@pytest.mark.parametrize("insist", [False, True])
@pytest.mark.parametrize(("changes", "said"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_work_is_refused_before_the_engine(
    model: Path, tmp_path: Path, changes: dict[str, Any], said: str, insist: bool
) -> None:
    change(model, **changes)
    with pytest.raises(ModelError, match=said) as caught:
        prepare(config(model, insist=insist), tmp_path)
    assert str(caught.value).startswith(f"{model}/config.json: ")
    assert "resume" not in str(caught.value)


def test_experts_are_found_by_the_names_of_their_tensors(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.experts.3.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].clone()
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(ModelError, match=r"tensor model\.layers\.0\.mlp\.experts\.3\.up_proj\.weight: a mixture of"):
        check_model(model)


@pytest.mark.parametrize("dense", [0, 1, None, "8", True])
def test_a_model_with_one_expert_or_none_is_dense(model: Path, dense: object) -> None:
    change(model, num_local_experts=dense)
    check_model(model)


def test_an_architecture_that_is_not_tested_needs_a_setting(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And a run whose configuration was written before there was one has the same hash."""
    prepared = prepare(config(model), tmp_path)
    change(model, architectures=["StableLmForCausalLM"])
    with pytest.raises(ModelError) as caught:
        prepare(config(model), tmp_path)
    assert str(caught.value) == (
        f"{model}: architecture StableLmForCausalLM is not one of those that are tested "
        f"({', '.join(TESTED)}): use one of them, or set engine.allow_untested_architecture = true to try it"
    )
    assert caplog.text == ""
    insisted = prepare(config(model, insist=True), tmp_path)
    assert "architecture StableLmForCausalLM is not tested: members and exported weights may be wrong" in caplog.text
    assert frozen_hash(insisted.config) == frozen_hash(prepared.config)
    assert insisted.config == dataclasses.replace(
        prepared.config, engine=dataclasses.replace(prepared.config.engine, allow_untested_architecture=True)
    )


@pytest.mark.parametrize(
    ("kind", "why"),
    [(kind, "which vLLM patches in") for kind in ("smollm3", "olmo2", "olmo3")]
    + [(kind, "whose experts the") for kind in MIXTURES],
)
def test_grpo_does_not_train_what_the_engine_cannot_take_over(
    tiny_model: Callable[[str], Path], model: Path, tmp_path: Path, kind: str, why: str
) -> None:
    sampling = SamplingConfig(max_tokens=20, samples_per_prompt=2, temperature=1.0)
    grpo = dataclasses.replace(
        config(tiny_model(kind)), method="grpo", grpo=GrpoConfig(learning_rate=1e-3), sampling=sampling
    )
    with pytest.raises(ConfigError, match=rf'^method = "grpo": .*, {why} .*: set method = "es", or'):
        prepare(grpo, tmp_path)
    prepare(dataclasses.replace(grpo, method="es"), tmp_path)
    prepare(dataclasses.replace(grpo, model=str(model)), tmp_path)


def test_a_mixture_of_experts_is_trained_in_its_attention_and_that_is_said(
    tiny_model: Callable[[str], Path], model: Path, tmp_path: Path
) -> None:
    mixture = config(tiny_model("qwen3moe"))
    (note,) = prepare(mixture, tmp_path).notes
    shapes = tensor_shapes(tiny_model("qwen3moe"))
    experts = 4 * 3 * 128 * 64 + 4 * 128
    assert note == (
        f"Not trained: mlp.experts, mlp.gate of the decoder blocks, {experts / sum(map(prod, shapes.values())):.1%} of "
        "all weights."
    )
    assert prepare(config(model), tmp_path).notes == ()
    fp8 = dataclasses.replace(mixture.engine, dtype="bfloat16", quantization="fp8")
    with pytest.raises(ConfigError, match=r'^engine.quantization = "fp8": .*qwen3moe.* is a mixture .*: set it to "no'):
        prepare(dataclasses.replace(mixture, engine=fp8), tmp_path)
    prepare(dataclasses.replace(config(model), engine=fp8), tmp_path)


@pytest.mark.parametrize(
    ("written", "used"),
    [
        ({"num_experts": 128, "num_experts_per_tok": 8}, 1 / 16),
        ({"num_local_experts": 4, "num_experts_per_tok": 8}, 1.0),
        ({"num_experts": "128", "num_experts_per_tok": 8}, 1.0),
        ({}, 1.0),
    ],
)
def test_a_token_passes_through_a_share_of_the_experts(written: dict[str, object], used: float) -> None:
    assert experts_used(written) == used


def test_an_architecture_is_shown_inert(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ModelError, match=r"architecture \\x1b\[2JForCausalLM is not one of those"):
        check_tested("\x1b[2JForCausalLM", tmp_path, allow_untested=False)
    check_tested("\x1b[2JForCausalLM", tmp_path, allow_untested=True)
    assert r"architecture \x1b[2JForCausalLM is not tested" in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_the_size_of_a_head_is_that_of_transformers(
    tiny_model: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    """Where config.json names it, and where its class has a value of its own or takes it from the hidden size."""
    from transformers import AutoConfig

    text = json.loads((tiny_model(kind) / "config.json").read_text())
    assert head_size(text) == 32
    del text["head_dim"]
    (tmp_path / "config.json").write_text(json.dumps(text))
    found = AutoConfig.from_pretrained(tmp_path)
    assert head_size(text) == (getattr(found, "head_dim", None) or found.hidden_size // found.num_attention_heads)


def test_on_a_gpu_other_heads_are_left_to_vllm(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change(model, head_dim=16)
    monkeypatch.setattr(architectures, "serves_on_cpu", lambda: False)
    assert check_model(model) == "LlamaForCausalLM"


@pytest.mark.vllm
def test_the_sizes_of_heads_are_those_of_vllm() -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    import eggroll_llm.engine.vllm  # noqa: F401  sets what vLLM must find when it is imported

    assert list(CPU_HEAD_SIZES) == CPUAttentionBackend.get_supported_head_sizes()


def test_every_architecture_in_the_list_has_a_tiny_model(tiny_model: Callable[[str], Path]) -> None:
    """`tests/engine/test_engine.py` serves each kind."""
    assert [check_model(tiny_model(kind)) for kind in KINDS] == list(TESTED)
    for kind in KINDS:
        check_tested(check_model(tiny_model(kind)), tiny_model(kind), allow_untested=False)
