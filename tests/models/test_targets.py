"""Which tensors of a checkpoint are trained: read from the headers of the files."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kinds import KINDS, MIXTURES
from safetensors.torch import save_file

from eggroll_llm.errors import ConfigError, ModelError
from eggroll_llm.models.targets import check_layers, check_rank, left_out, trained_parameters

# Of a tiny model: 128 hidden, 256 intermediate, 4 heads of 32, 2 key-value heads.
OF_A_LAYER = {
    "self_attn.q_proj": (128, 128),
    "self_attn.k_proj": (64, 128),
    "self_attn.v_proj": (64, 128),
    "self_attn.o_proj": (128, 128),
    "mlp.gate_proj": (256, 128),
    "mlp.up_proj": (256, 128),
    "mlp.down_proj": (128, 256),
}


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_linear_layers_of_the_blocks_and_nothing_else(tiny_model: Callable[[str], Path], kind: str) -> None:
    """No embedding, head, norm or bias."""
    found = trained_parameters(tiny_model(kind))
    assert len(found) == len({name for name, _, _ in found})
    assert {name: (out, inside) for name, out, inside in found} == {
        f"model.layers.{layer}.{name}.weight": shape for layer in (0, 1) for name, shape in OF_A_LAYER.items()
    }


def test_of_a_mixture_attention_is_trained_and_the_rest_is_named(tiny_model: Callable[[str], Path]) -> None:
    """Block 0 of the tiny Qwen3-MoE has no experts. Of dense models there is nothing to name."""
    found = {name for name, _, _ in trained_parameters(tiny_model("qwen3moe"))}
    assert found == {
        f"model.layers.{layer}.{name}.weight" for layer in (0, 1) for name in OF_A_LAYER if layer == 0 or "attn" in name
    }
    for kind in KINDS:
        said = left_out(tiny_model(kind))
        assert [line.split(",")[:2] for line in said] == [
            ["Not trained: mlp.experts", " mlp.gate of the decoder blocks"]
        ] * (kind in MIXTURES)


def test_layers_are_a_range_of_blocks_with_both_ends(tiny_model: Callable[[str], Path]) -> None:
    model_dir = tiny_model("llama")
    every = trained_parameters(model_dir)
    assert trained_parameters(model_dir, (0, 1)) == every
    first, second = trained_parameters(model_dir, (0, 0)), trained_parameters(model_dir, (1, 1))
    assert {name.split(".")[2] for name, _, _ in first} == {"0"}
    assert sorted(first + second) == sorted(every)
    check_layers(model_dir, (1, 1))
    with pytest.raises(ConfigError, match=r"es.layers = \[1, 2\]: the model's decoder blocks have the numbers 0 to 1"):
        check_layers(model_dir, (1, 2))


def test_a_model_without_linear_layers_of_a_known_name_is_refused(tmp_path: Path) -> None:
    tensors = {
        "h.0.attn.c_attn.weight": torch.zeros(4, 4),
        "h.0.q_proj.bias": torch.zeros(4),
        "h.0.up_proj.weight": torch.zeros(4),  # no matrix
        "q_proj_norm.weight": torch.zeros(4, 4),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="nothing to train: use a Llama- or Qwen-shaped model") as info:
        trained_parameters(tmp_path)
    assert str(info.value).startswith(f"{tmp_path}: no linear layer is named qkv_proj or q_proj")


def test_a_rank_above_that_of_a_weight_is_refused(tmp_path: Path) -> None:
    tensors = {"model.layers.0.k_proj.weight": torch.zeros(5, 8), "model.layers.0.up_proj.weight": torch.zeros(16, 8)}
    save_file(tensors, tmp_path / "model.safetensors")
    check_rank(tmp_path, "es.rank", 5)
    with pytest.raises(ConfigError) as info:
        check_rank(tmp_path, "es.rank", 6)
    assert str(info.value) == (
        "es.rank = 6: 'model.layers.0.k_proj.weight' of the model is 5 x 8; its rank is at most 5: set es.rank to that "
        "or less"
    )
