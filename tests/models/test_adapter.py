"""Adapters out: peft computes with base + truncated change, and errors are what is lost. Adapters in: peft's merge."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from eggroll_llm.cli.main import main
from eggroll_llm.errors import ModelError
from eggroll_llm.models.adapter import low_rank as low_rank_module
from eggroll_llm.models.adapter.card import adapter_card
from eggroll_llm.models.adapter.kept import Kept, Layer
from eggroll_llm.models.adapter.low_rank import low_rank
from eggroll_llm.models.adapter.write import write_adapter
from eggroll_llm.models.export import export_model
from eggroll_llm.models.files import model_identity
from eggroll_llm.models.resolve import resolve_model, settled_name
from eggroll_llm.models.targets import trained_parameters
from eggroll_llm.records.weights import write_provenance

TinyModel = Callable[[str], Path]
RANK = 4
IDS = torch.tensor([[5, 17, 230, 42, 99, 3, 3, 150]])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EGGROLL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def changed(
    base: Path, directory: Path, *, rank: int | None = None, norms: bool = False, layers: tuple[int, ...] = ()
) -> dict[str, torch.Tensor]:
    """Write a model whose layers changed, by matrices of a rank; return the tensors that did."""
    generator = torch.Generator().manual_seed(2)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    before = load_file(base / "model.safetensors")
    trained = {}
    for name, out, inside in trained_parameters(base, layers):
        change = random(out, inside) if rank is None else random(out, rank) @ random(rank, inside)
        trained[name] = before[name].float() + 0.02 * change
    if norms:
        trained["model.norm.weight"] = before["model.norm.weight"].float() + 0.02
    export_model(base, directory, trained, torch.float32)
    return trained


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def load(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


@pytest.mark.parametrize("kind", ["qwen2", "phi3"])
def test_peft_computes_with_base_plus_truncated_change(tiny_model: TinyModel, tmp_path: Path, kind: str) -> None:
    """Qwen2 has biases and layers of several shapes; of Phi-3, peft's layers are fused as the checkpoint's are.

    Of Phi-3, only one of two blocks was trained.
    """
    base, out = tiny_model(kind), tmp_path / "adapter"
    trained = changed(base, tmp_path / "trained", layers=(1, 1) if kind == "phi3" else ())
    out.mkdir()
    kept = write_adapter(base, tmp_path / "trained", out, rank=RANK, base_name=str(base))
    assert {path.name for path in out.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}

    dense, before, energies = load(base), load_file(base / "model.safetensors"), []
    parameters = dict(dense.named_parameters())
    for layer in kept.layers:
        if layer.name not in trained:
            assert layer.change == layer.lost == 0
            continue
        change = (trained[layer.name] - before[layer.name].float()).double()
        U, S, Vh = torch.linalg.svd(change, full_matrices=False)
        nearest = U[:, :RANK] * S[:RANK] @ Vh[:RANK]
        parameters[layer.name].data += nearest.float()
        energies.append(S.square())
        assert layer.change == pytest.approx(change.norm().item(), rel=1e-5)
        assert layer.error == pytest.approx(math.sqrt((S[RANK:] ** 2).sum() / (S**2).sum()), rel=1e-5)
    assert [layer.name for layer in kept.layers] == [name for name, _, _ in trained_parameters(base)]
    assert len(load_file(out / "adapter_model.safetensors")) == 2 * len(trained) == 2 * len(energies)
    total = sum(energy.sum().item() for energy in energies)
    lost = [sum(energy[rank:].sum().item() for energy in energies) for rank in range(129)]
    assert kept.error == pytest.approx(math.sqrt(lost[RANK] / total), rel=1e-5)
    assert kept.needed == {
        share: next(rank for rank in range(129) if lost[rank] <= (1 - share) * total) for share in (0.5, 0.9)
    }

    found = logits(PeftModel.from_pretrained(load(base), out))
    assert torch.allclose(found, logits(dense), atol=2e-4)
    assert not torch.allclose(found, logits(load(base)), atol=0.05)


def test_an_adapter_of_more_than_a_layer_s_rank_keeps_all_of_it(tiny_model: TinyModel, tmp_path: Path) -> None:
    """The keys of Qwen2 have 64 rows: beyond, what they lack is zeros."""
    base, out = tiny_model("qwen2"), tmp_path / "adapter"
    changed(base, tmp_path / "trained")
    out.mkdir()
    kept = write_adapter(base, tmp_path / "trained", out, rank=128, base_name=str(base))
    assert kept.error < 1e-3
    trained = logits(load(tmp_path / "trained"))
    assert torch.allclose(logits(PeftModel.from_pretrained(load(base), out)), trained, atol=2e-4)


def test_a_card_names_no_other_base_than_the_adapter_s(tmp_path: Path) -> None:
    """A run began from a step of another: the model on the hub lacks what that had learned."""
    run = tmp_path / "first"
    run.mkdir()
    (run / "journal.jsonl").write_text("")
    (run / "config.toml").write_text('model = "Qwen/Qwen2.5-0.5B"\n')
    layer = Layer(name="model.layers.0.self_attn.q_proj.weight", change=1.0, lost=0.0)
    kept = Kept(rank=1, layers=(layer,), left_out={}, needed={})
    texts = [
        adapter_card(kept, base_model=model, identity="0" * 16, trained="x")
        for model in ("Qwen/Qwen2.5-0.5B", f"{run}@20")
    ]
    assert ["Qwen/Qwen2.5-0.5B is the base model" in text for text in texts] == [True, False]
    assert "BASE is the base model" in texts[1]
    assert [ModelCard(text).data.base_model for text in texts] == ["Qwen/Qwen2.5-0.5B", None]


def test_a_change_of_low_rank_goes_out_and_comes_back(tiny_model: TinyModel, tmp_path: Path, cache: Path) -> None:
    base, out = tiny_model("llama"), tmp_path / "adapter"
    trained = changed(base, tmp_path / "trained", rank=3)
    write_provenance(tmp_path / "trained", step=7, base_model=model_identity(base))
    assert main(["export", str(tmp_path / "trained"), str(out), "--adapter", str(RANK), "--base", str(base)]) == 0
    merged = resolve_model(str(out))
    assert merged.parent == cache
    for name, tensor in load_file(merged / "model.safetensors").items():
        # Rounded once, to the dtype of the base.
        assert tensor.dtype == torch.bfloat16
        if name in trained:
            assert torch.allclose(tensor.float(), trained[name], rtol=2**-8, atol=1e-5)
    assert settled_name(str(out)) == settled_name(f"{out}@{base}") == f"{out}@{base}"
    made = merged.stat().st_ctime_ns
    assert resolve_model(f"{out}@{base}") == merged
    assert merged.stat().st_ctime_ns == made

    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == "peft"
    assert "**Warning:**" not in card.text
    assert f"`{model_identity(base)}`" in card.text
    assert len(re.findall(r"^\| [01]( \| 0\.000){7} \|$", card.text, re.MULTILINE)) == 2


def test_what_is_lost_is_said(tiny_model: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny_model("llama")
    changed(base, tmp_path / "trained", norms=True)
    arguments = ["export", str(tmp_path / "trained"), str(tmp_path / "out"), "--adapter", "1", "--base", str(base)]
    assert main(arguments) == 0
    said, card = capsys.readouterr().out, (tmp_path / "out" / "README.md").read_text()
    share = float(re.search(r"kept: ([\d.]+)% of the change", said)[1])  # type: ignore[index]
    assert share < 20
    for text in (said, card):
        assert re.search(rf"rank 1 keeps {share}% of the change; 50% of it needs rank \d+ and 90% of it needs", text)
        assert "model.norm.weight" in text
    assert main(arguments) == 2
    assert "exists already" in capsys.readouterr().err


def test_shares_are_of_all_weights() -> None:
    layers = (Layer(name="a.0.q_proj.weight", change=3.0, lost=1.0), Layer(name="a.1.q_proj.weight", change=0, lost=0))
    kept = Kept(rank=1, layers=layers, left_out={"norm.weight": 4.0}, needed={})
    assert kept.share == pytest.approx(8 / 25)
    assert kept.share_left_out == pytest.approx(16 / 25)
    assert layers[1].error == 0
    assert kept.lines()[1] == "relative error of a layer: q_proj 0.333 to 0.333"


def test_large_matrices_are_approximated_at_random(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(90, 60, generator=torch.Generator().manual_seed(0))
    exact = low_rank(matrix, 5)
    monkeypatch.setattr(low_rank_module, "EXACT_UP_TO", 59)
    state = torch.get_rng_state()
    found = low_rank(matrix, 5)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.squares is None
    assert exact.lost <= found.lost * (1 + 1e-6)
    assert found.lost < exact.lost * 1.01
    assert found.lost == pytest.approx((matrix - found.B_OR @ found.A_RI).norm().item())
    assert (found.B_OR.shape, found.A_RI.shape) == ((90, 5), (5, 60))
    nothing = low_rank(torch.zeros(6, 4), 2)
    assert nothing.lost == nothing.B_OR.abs().sum() == nothing.A_RI.abs().sum() == 0


@pytest.fixture
def adapter(tiny_model: TinyModel, tmp_path: Path) -> Path:
    """An adapter as peft writes it, with the tokenizer that it was trained with."""
    return write_with_peft(tiny_model("llama"), tmp_path / "adapter")


def write_with_peft(base: Path, directory: Path, **options: Any) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        targets = ["q_proj", "down_proj"]
        config = LoraConfig(r=RANK, lora_alpha=12, target_modules=targets, init_lora_weights=False, **options)
        get_peft_model(load(base), config).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("use_rslora", [False, True])
def test_an_adapter_is_merged_as_peft_merges_it(tiny_model: TinyModel, tmp_path: Path, use_rslora: bool) -> None:
    base = tiny_model("llama")
    adapter = write_with_peft(base, tmp_path / "adapter", use_rslora=use_rslora)
    wanted = PeftModel.from_pretrained(load(base), adapter).merge_and_unload().state_dict()
    before = load_file(base / "model.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{{ 'as trained' }}"
    tokenizer.save_pretrained(adapter)

    merged = resolve_model(str(adapter))
    for name, tensor in load_file(merged / "model.safetensors").items():
        if re.search(r"q_proj|down_proj", name):
            assert torch.allclose(tensor.float(), wanted[name], rtol=2**-8, atol=1e-6)
            assert not torch.equal(tensor, before[name])
        else:
            assert torch.equal(tensor, before[name])
    assert AutoTokenizer.from_pretrained(merged).chat_template == "{{ 'as trained' }}"


def test_a_base_is_named_after_an_at(adapter: Path, tiny_model: TinyModel, tmp_path: Path, cache: Path) -> None:
    base = tiny_model("llama")
    found = resolve_model(str(adapter))
    edit(adapter, base_model_name_or_path=None)
    for resolve in (resolve_model, settled_name):
        with pytest.raises(ModelError, match=rf"names no base model: name it after an @, as in {adapter}@BASE"):
            resolve(str(adapter))
    again = resolve_model(f"{adapter}@{base}")
    assert load_file(again / "model.safetensors").keys() == load_file(found / "model.safetensors").keys()
    edit(adapter, base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(
        ModelError, match=rf"its base: model '.*gone' is neither .*, or name the base after an @: {adapter}@"
    ):
        resolve_model(str(adapter))
    with pytest.raises(ModelError, match="is an adapter itself"):
        resolve_model(f"{adapter}@{adapter}")
    # A directory whose own name has an @ is not divided.
    odd = shutil.copytree(base, tmp_path / "adapter@v2")
    assert resolve_model(str(odd)) == odd
    assert settled_name(str(odd)) == str(odd)


def test_an_adapter_on_the_hub(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(adapter))
    assert resolve_model("me/adapter") == resolve_model(str(adapter))


def test_an_adapter_of_another_architecture(adapter: Path, tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(ModelError, match=r"down_proj\.weight is 128 x 256 in the adapter and 128 x 64 in the"):
        resolve_model(f"{adapter}@{tiny_model('llama', intermediate_size=64)}")
    with pytest.raises(ModelError, match=r"q_proj\.weight is 128 x 128 in the adapter and not there in the model"):
        resolve_model(f"{adapter}@{tiny_model('phi3')}")


def edit(adapter: Path, **changes: object) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type = 'IA3', not \"LORA\": merge it into its base with peft"),
        ({"use_dora": True}, "use_dora = True is not supported"),
        ({"bias": "all"}, "bias = 'all' is not supported"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save = \['lm_head'\] is not supported"),
        ({"alpha_pattern": {"q_proj": 3}}, r"alpha_pattern = .* is not supported"),
        ({"invented_in": 2030}, "invented_in = 2030 is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' may have changed the base model"),
        ({"r": 8}, r"has no two factors of rank r = 8"),
        ({"r": 0}, r"r = 0 and lora_alpha = 12 give no scale"),
        ({"lora_alpha": None}, r"lora_alpha = None give no scale"),
        ({"lora_alpha": 10**400}, r"lora_alpha = 10{39} give no scale"),
        ({"r": 10**400, "use_rslora": True}, r"r = 10{39} and lora_alpha = 12 give no scale"),
    ],
)
def test_adapters_that_are_not_plain_lora(adapter: Path, changes: dict[str, object], said: str) -> None:
    edit(adapter, **changes)
    with pytest.raises(ModelError, match=said):
        resolve_model(str(adapter))


def test_damaged_adapters(adapter: Path, tiny_model: TinyModel, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)

    def refused(said: str) -> None:
        with pytest.raises(ModelError, match=said):
            resolve_model(str(adapter))

    first = next(iter(tensors))
    save_file(tensors | {first: tensors[first] * math.nan}, weights)
    refused("is not finite once merged")
    assert [path for path in cache.iterdir() if path.is_dir()] == []
    save_file(tensors | {"base_model.model.lm_head.weight": torch.zeros(2, 2)}, weights)
    refused(r"base_model\.model\.lm_head\.weight is no factor of a linear layer")
    weights.write_bytes(weights.read_bytes()[:-1])
    refused("is damaged")
    weights.rename(adapter / "adapter_model.bin")
    refused("has no adapter_model.safetensors")
    save_file(tensors, weights)
    shutil.copy(tiny_model("llama") / "model.safetensors", adapter)
    refused(r"holds an adapter and other weights \(model.safetensors\)")
    (adapter / "model.safetensors").unlink()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("eggroll_llm.models.adapter.merge.export_model", full)
    refused("cannot be written to .*No space left on device.*: make room there or name another place")
    assert [path for path in cache.iterdir() if path.is_dir()] == []


CONVERTER = """
import json, pathlib, sys
import beside
if "q8_0" in sys.argv:
    print("INFO: so far so good", "NotImplementedError: unknown model", sep="\\n", file=sys.stderr)
    sys.exit(1)
pathlib.Path(sys.argv[sys.argv.index("--outfile") + 1]).write_text(json.dumps(sys.argv[1:]))
"""


def test_gguf_by_the_converter_of_llama_cpp(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, out = tiny_model("llama"), tmp_path / "out.gguf"
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)

    def export(*words: object) -> int:
        return main(["export", str(base), *map(str, words)])

    assert export(out, "--gguf", "bf16") == 2
    assert re.search(r"git clone .*--converter llama.cpp/convert_hf_to_gguf.py", capsys.readouterr().err)
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    (folder / "convert_hf_to_gguf.py").write_text(CONVERTER)
    (folder / "beside.py").write_text("")
    monkeypatch.setenv("LLAMA_CPP_DIR", str(folder))
    assert export(out, "--gguf", "q8_0") == 2
    assert "could not convert" in (said := capsys.readouterr().err)
    assert said.endswith("NotImplementedError: unknown model\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama.cpp"]
    assert export(out, "--gguf", "bf16") == 0
    directory, *words = json.loads(out.read_text())
    assert Path(directory) == base
    assert (words[0], Path(words[1]).name, words[2:]) == ("--outfile", "out.gguf", ["--outtype", "bf16"])
    monkeypatch.delenv("LLAMA_CPP_DIR")
    assert export(tmp_path / "b.gguf", "--gguf", "f16", "--converter", folder) == 0
    assert export(tmp_path / "b", "--gguf", "f16", "--converter", folder) == 2
    assert "name a file that ends in .gguf" in capsys.readouterr().err


def test_exports_that_cannot_be(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, out = tiny_model("llama"), tmp_path / "out"

    def refused(*words: object, model: Path = base, to: Path = out) -> str:
        assert main(["export", str(model), str(to), *map(str, words)]) == 2
        assert not to.exists()
        return capsys.readouterr().err

    assert "one of the arguments --adapter --gguf is required" in refused()
    assert "with --base MODEL" in refused("--adapter", 2)
    assert "--adapter 129: an adapter of rank 128 keeps all of these weights" in refused(
        "--adapter", 129, "--base", base
    )
    assert "there is no change to export" in refused("--adapter", 2, "--base", base)
    assert "was not trained from" in refused("--adapter", 2, "--base", tiny_model("qwen2"))
    assert "is not a run directory" in refused("--adapter", 2, "--at", "best")
    assert "nowhere does not exist" in refused("--adapter", 2, to=tmp_path / "nowhere" / "out")
    assert "a GGUF file is made of the model alone" in refused("--gguf", "f16", "--base", base, to=tmp_path / "m.gguf")
    assert "an adapter is made without llama.cpp" in refused("--adapter", 2, "--base", base, "--converter", tmp_path)
    changed(base, tmp_path / "trained")
    write_provenance(tmp_path / "trained", step=7, base_model="ab" * 8)
    of_another = refused("--adapter", 2, "--base", base, model=tmp_path / "trained")
    assert f"was trained from base model {'ab' * 8}, but" in of_another
    (tmp_path / "trained" / "eggroll.json").unlink()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    assert "No space left on device" in refused("--adapter", 2, "--base", base, model=tmp_path / "trained")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trained"]
