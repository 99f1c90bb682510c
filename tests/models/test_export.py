"""An exported model is the base with its trained tensors replaced, and nothing else."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from eggroll_llm.errors import ModelError
from eggroll_llm.models.export import export_model
from eggroll_llm.models.files import check_model
from eggroll_llm.models.targets import trained_parameters
from eggroll_llm.records.checkpoint import load_training_state, save_checkpoint, verify_checkpoint

TinyModel = Callable[[str], Path]


def trained_tensors(base: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: (torch.randn(out, inside, generator=generator) * 0.1).to(dtype)
        for name, out, inside in trained_parameters(base)
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_trained_tensors_are_replaced_and_the_others_are_the_same_bits(
    tiny_model: TinyModel, tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    base = tiny_model(kind)
    trained = trained_tensors(base, dtype)
    export_model(base, tmp_path / "out", trained, dtype)
    before, after = (load_file(path / "model.safetensors") for path in (base, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert trained.keys() < before.keys()
    for name, tensor in after.items():
        assert tensor.dtype == dtype
        # bfloat16 to float32 is exact, so that this holds in both.
        assert torch.equal(tensor, trained.get(name, before[name].to(dtype))), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_transformers_loads_it_as_it_is(tiny_model: TinyModel, tmp_path: Path, dtype: torch.dtype) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = tiny_model("llama")
    trained = trained_tensors(base, dtype)
    export_model(base, tmp_path / "out", trained, dtype)
    assert check_model(tmp_path / "out") == "LlamaForCausalLM"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert "torch_dtype" not in config
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == dtype
    parameters = dict(model.named_parameters())
    for name, tensor in trained.items():
        assert torch.equal(parameters[name], tensor), name
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (base, tmp_path / "out")]
    assert len({tuple(tokenizer("Make 9 from 4 and 5")["input_ids"]) for tokenizer in tokenizers}) == 1
    assert tokenizers[0].chat_template == tokenizers[1].chat_template


def test_tensors_keep_the_files_they_were_in(tiny_model: TinyModel, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_model("llama"), tmp_path / "base")
    tensors = load_file(base / "model.safetensors") | {"counter": torch.tensor([3], dtype=torch.int64)}
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[: len(names) // 2], "model-2.safetensors": names[len(names) // 2 :]}
    for file, members in parts.items():
        save_file({name: tensors[name] for name in members}, base / file, metadata={"format": "pt", "made": "by us"})
    (base / "model.safetensors").unlink()
    weight_map = {name: file for file, members in parts.items() for name in members}
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    # What is not of the model stays behind.
    (base / "training_state.st").write_bytes(b"state")
    (base / "optimizer.pt").write_bytes(b"pickle")

    trained = trained_tensors(base, torch.float32)
    export_model(base, tmp_path / "out", trained, torch.float32)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {path.name for path in base.iterdir()} - {"training_state.st", "optimizer.pt"}
    for file, members in parts.items():
        with safe_open(tmp_path / "out" / file, framework="pt") as stored:
            assert sorted(stored.keys()) == members
            assert stored.metadata() == {"format": "pt", "made": "by us"}
    # Integers are no weights: they keep their type.
    assert load_file(tmp_path / "out" / weight_map["counter"])["counter"].dtype == torch.int64


def test_tensors_that_share_memory_are_written_each_by_itself(tiny_model: TinyModel, tmp_path: Path) -> None:
    """A tied head that the checkpoint holds all the same, and that its trainer keeps once."""
    base = shutil.copytree(tiny_model("llama"), tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    name = "model.embed_tokens.weight"
    save_file(
        tensors | {"lm_head.weight": tensors[name].clone()}, base / "model.safetensors", metadata={"format": "pt"}
    )
    trained = dict.fromkeys((name, "lm_head.weight"), torch.full_like(tensors[name], 0.5))
    export_model(base, tmp_path / "out", trained, torch.float32)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(stored[name], stored["lm_head.weight"])
    assert bool((stored[name] == 0.5).all())


def test_a_name_that_the_base_does_not_hold_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    trained = {"model.nowhere.weight": torch.zeros(2, 2), "b.weight": torch.zeros(2, 2)}
    with pytest.raises(ModelError, match=r"does not hold 2 trained tensors, first 'b\.weight'"):
        export_model(tiny_model("llama"), tmp_path / "out", trained, torch.float32)


def test_a_checkpoint_is_a_model_to_whatever_loads_models(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Loaders take every *.safetensors of a directory for weights: the training state is none of them."""
    base = tiny_model("qwen3")
    trained = trained_tensors(base, torch.float32)
    path = save_checkpoint(
        tmp_path / "checkpoints",
        3,
        lambda folder: export_model(base, folder, trained, torch.float32),
        {f"master/{name}": tensor for name, tensor in trained.items()},
        {},
    )
    assert check_model(path) == "Qwen3ForCausalLM"
    assert [file.name for file in path.glob("*.safetensors")] == ["model.safetensors"]
    assert trained_parameters(path) == trained_parameters(base)
    assert load_training_state(verify_checkpoint(path)).keys() == {f"master/{name}" for name in trained}
