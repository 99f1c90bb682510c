"""A GGUF is the model that it was made from, to its tensors, logits, tokens and ends of an answer, or is rejected."""

import contextlib
import json
import math
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf_files import quantised, write_gguf
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Tokenizer

from eggroll_llm.errors import ModelError
from eggroll_llm.models import gguf_expand, gguf_file
from eggroll_llm.models.called import called
from eggroll_llm.models.files import check_model, model_identity
from eggroll_llm.models.gguf_expand import expand, model_config
from eggroll_llm.models.gguf_file import StoredTensor, read_header
from eggroll_llm.models.resolve import resolve_model

TinyModel = Callable[..., Path]

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
BASE = {"rope_type": "default", "rope_theta": 2e6}
ORIGINALS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, tied": ("llama", {}),
    "llama, biases": ("llama", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
    "llama 3": ("llama", {"rope_parameters": LLAMA3, "head_dim": 64}),
    "qwen2, untied": ("qwen2", {"rope_parameters": BASE}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 64, "rms_norm_eps": 1e-5, "rope_parameters": BASE}),
}


AS_QWEN3 = {
    f"qwen3__{key}": value
    for key, value in {
        "embedding_length": 128,
        "feed_forward_length": 256,
        "block_count": 2,
        "context_length": 512,
        "attention__head_count": 4,
        "attention__head_count_kv": 2,
        "attention__layer_norm_rms_epsilon": 1e-6,
    }.items()
}
"""The tiny Llama's settings."""


def expanded(path: Path) -> Path:
    directory = path.with_suffix("")
    expand(path, directory)
    return directory


@pytest.fixture(scope="module")
def small(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file that is read only."""
    return write_gguf(tiny_model("llama"), tmp_path_factory.mktemp("gguf") / "small-f32.gguf")


@pytest.mark.parametrize("name", ORIGINALS)
def test_the_model_is_the_original(tiny_model: TinyModel, tmp_path: Path, name: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(gguf_expand, "_CHUNK", 1000)  # several rows at a time, the last fewer
    kind, changes = ORIGINALS[name]
    original = tiny_model(kind, **changes)
    converted = expanded(write_gguf(original, tmp_path / "model.gguf"))
    assert check_model(converted) == check_model(original)
    ours, theirs = (load_file(directory / "model.safetensors") for directory in (converted, original))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == torch.bfloat16 for name in theirs)
    tokens = torch.arange(0, 300, 3)[None]
    logits, expected = (
        AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(tokens).logits
        for directory in (converted, original)
    )
    # llama.cpp keeps the epsilon of the norms in float32, in which it is added: the logits have the same bits.
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q5_1", "Q4_0"])
def test_every_value_is_what_the_quantisation_left(tiny_model: TinyModel, tmp_path: Path, kind: str) -> None:
    original = load_file(tiny_model("llama") / "model.safetensors")
    converted = load_file(expanded(write_gguf(tiny_model("llama"), tmp_path / "m.gguf", kind)) / "model.safetensors")
    for name, tensor in original.items():
        expected = quantised(tensor, kind) if tensor.ndim > 1 else tensor
        assert torch.equal(converted[name], expected), name


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
@given(text=st.text(max_size=40) | st.text("a1 \n\r'sé\u0301,<|im_end|>", max_size=40))
def test_qwen_tokens_are_those_of_the_original(qwen: dict[str, tuple[Any, Any]], kind: str, text: str) -> None:
    ours, original = qwen[kind]
    assert ours(text)["input_ids"] == original(text)["input_ids"]


@pytest.fixture(scope="module")
def qwen(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any]]:
    """For each architecture the tokenizer of a GGUF, and Qwen's own class with the same vocabulary."""
    found = {}
    for kind in ("qwen2", "qwen3"):
        model = tiny_model(kind)
        path = write_gguf(model, tmp_path_factory.mktemp(kind) / "model.gguf", pre="qwen2")
        stored = json.loads((model / "tokenizer.json").read_text())
        original = Qwen2Tokenizer(
            vocab=stored["model"]["vocab"],
            merges=[tuple(pair) for pair in stored["model"]["merges"]],
            additional_special_tokens=[each["content"] for each in stored["added_tokens"]],
        )
        found[kind] = (AutoTokenizer.from_pretrained(expanded(path)), original)
    return found


def test_special_tokens_and_ends_of_qwen(qwen: dict[str, tuple[Any, Any]]) -> None:
    tokenizer = qwen["qwen2"][0]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (None, "<|im_end|>", "<|endoftext|>")
    generation = json.loads(Path(tokenizer.name_or_path, "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat == "<|im_start|>user\nHi<|im_end|>\n"


def test_a_base_model_has_one_end(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = write_gguf(tiny_model("qwen2"), tmp_path / "m.gguf", pre="qwen2", tokenizer__ggml__eos_token_id=0)
    assert json.loads((expanded(path) / "generation_config.json").read_text())["eos_token_id"] == 0


def test_llama_3_cuts_numbers_by_three_and_begins_with_bos(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama")
    stored = read_header(write_gguf(model, tmp_path / "a.gguf")).metadata
    tokens, merges = (stored[f"tokenizer.ggml.{key}"] for key in ("tokens", "merges"))
    word = next(token for token in reversed(tokens) if token.isascii() and token.isalpha())
    path = write_gguf(
        model,
        tmp_path / "m.gguf",
        pre="llama-bpe",
        tokenizer__ggml__add_bos_token=None,
        tokenizer__ggml__merges=[merge for merge in merges if merge.replace(" ", "") != word],
    )
    tokenizer = AutoTokenizer.from_pretrained(expanded(path))
    assert tokenizer(word, add_special_tokens=False)["input_ids"] == [tokens.index(word)]  # although no merge makes it
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("It's 12345 = x\n\n")
    assert [piece.replace("Ġ", " ") for piece, _ in pieces] == ["It", "'s", " ", "123", "45", " =", " x", "ĊĊ"]
    assert tokenizer("42")["input_ids"][0] == tokenizer.bos_token_id
    assert tokenizer("42", add_special_tokens=False)["input_ids"][0] != tokenizer.bos_token_id


def test_padding_of_the_vocabulary_is_no_token(tiny_model: TinyModel, tmp_path: Path) -> None:
    """llama.cpp names the rows of the embeddings that no token has; a user-defined token is whole, but not special."""
    model = tiny_model("qwen2")
    stored = read_header(write_gguf(model, tmp_path / "a.gguf")).metadata
    tokens, kinds, merges = (list(stored[f"tokenizer.ggml.{key}"]) for key in ("tokens", "token_type", "merges"))
    path = write_gguf(
        model,
        tmp_path / "m.gguf",
        pre="qwen2",
        tokenizer__ggml__tokens=[*tokens[:-2], "<tool>", "[PAD]"],
        tokenizer__ggml__token_type=[*kinds[:-2], 4, 5],
        tokenizer__ggml__merges=[merge for merge in merges if merge.replace(" ", "") not in tokens[-2:]],
    )
    directory = expanded(path)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert len(tokenizer) == len(tokens) - 1
    assert json.loads((directory / "config.json").read_text())["vocab_size"] == len(tokens)
    assert tokenizer("<tool>")["input_ids"] == [len(tokens) - 2]
    assert tokenizer.decode([len(tokens) - 2, *tokenizer("x")["input_ids"]], skip_special_tokens=True) == "<tool>x"


def test_converted_once_and_found_by_content(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EGGROLL_CACHE", str(tmp_path / "cache"))
    path = Path(shutil.copy(small, tmp_path / "a model.gguf"))
    monkeypatch.chdir(tmp_path)
    directory = resolve_model("a model.gguf")
    assert directory.parent == tmp_path / "cache/models"
    written = (directory / "model.safetensors").stat()
    assert resolve_model(str(path)) == directory
    assert (directory / "model.safetensors").stat() == written
    assert [each.name for each in directory.parent.iterdir() if each.is_dir()] == [directory.name]
    identity = model_identity(directory)
    assert model_identity(expanded(path)) == identity  # a run is rebuilt where the cache is another
    content = bytearray(path.read_bytes())
    content[-2] ^= 1  # of a weight, in the bits that bfloat16 keeps
    path.write_bytes(content)
    monkeypatch.setattr("eggroll_llm.models.expanded._convert", expand)  # which it does in another process
    other = resolve_model(str(path))
    assert other != directory
    assert model_identity(other) != identity


def test_what_it_is_called(tiny_model: TinyModel, tmp_path: Path) -> None:
    names = [f"{name}.gguf" for name in ("four", "half", "gone")]
    write_gguf(tiny_model("llama"), tmp_path / names[0], "Q4_0", general__file_type=15)
    write_gguf(tiny_model("llama"), tmp_path / names[1], "F16")
    assert [called(str(tmp_path / name)) for name in names] == [
        "four.gguf, 4-bit (Q4_K_M) GGUF expanded to bfloat16",
        "half.gguf, F16 GGUF in bfloat16",
        "gone.gguf, GGUF expanded to bfloat16",
    ]
    (tmp_path / "directory.gguf").mkdir()
    assert called(str(tmp_path / "directory.gguf")) == "directory.gguf"


def test_names_of_quantisations_are_those_of_the_format() -> None:
    theirs = {each.value: each.name.removeprefix("MOSTLY_").removeprefix("ALL_") for each in gguf.LlamaFileType}
    ours = dict(enumerate(gguf_file._FILE_TYPES))
    assert ours == {number: theirs.get(number, "") for number in ours}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (
            {"general__architecture": "gemma3"},
            "'gemma3': a GGUF can be a model here if",
        ),
        ({"general__type": "adapter"}, "has general.type 'adapter' and architecture 'llama'"),
        ({"split__count": 3}, "one of several parts of a model: merge them with `llama-gguf-split --merge"),
    ],
)
def test_a_gguf_of_something_else(
    tiny_model: TinyModel, tmp_path: Path, metadata: dict[str, Any], message: str
) -> None:
    path = write_gguf(tiny_model("llama"), tmp_path / "m.gguf", **metadata)
    with pytest.raises(ModelError, match=message) as caught:
        resolve_model(str(path))
    assert str(path) in str(caught.value)


def test_a_part_that_says_so_by_its_name(small: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="one of several parts"):
        resolve_model(str(shutil.copy(small, tmp_path / "m-00002-of-00003.gguf")))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"tokenizer__ggml__model": "llama"}, "of type 'llama' with pre-tokenizer 'smollm'; known are 'gpt2' with"),
        ({"tokenizer__ggml__pre": "tekken"}, "pre-tokenizer 'tekken'"),
        ({"llama__rope__scaling__type": "yarn"}, "rotary scaling 'yarn' is not known here"),
        ({"llama__expert_count": 8}, r"the setting llama\.expert_count is unknown here"),
        ({"llama__attention__sliding_window": 8}, r"the setting llama\.attention\.sliding_window is unknown here"),
        ({"llama__block_count": None}, r"the setting llama\.block_count is missing or no number"),
        ({"llama__embedding_length": "large"}, r"the setting llama\.embedding_length is missing or no number"),
        ({"llama__attention__key_length": 64}, "attention heads of several sizes"),
        ({"llama__block_count": 2.0}, r"the setting llama\.block_count is missing or no number"),
        ({"llama__block_count": 2**31}, r"is damaged \(it has no tensor blk\.2\.attn_norm\.weight\)"),
        (
            {"general__architecture": "qwen3", **AS_QWEN3},
            r"has no tensor for model\.layers\.0\.[a-z_]+\.k_norm",
        ),
        ({"llama__block_count": 1}, r"has the tensor blk\.1\.[a-z_]+\.weight, unknown here"),
        ({"llama__feed_forward_length": 128}, r"is damaged \(blk\.0\.ffn_[a-z]+\.weight has shape"),
        ({"tokenizer__ggml__tokens": ["a", "b"]}, r"is damaged \(2 tokens, \d+ types of tokens, \d+ embeddings\)"),
        ({"tokenizer__ggml__merges": ["no such"]}, "its merges do not fit its tokens"),
    ],
)
def test_what_is_not_understood_is_not_ignored(
    tiny_model: TinyModel, tmp_path: Path, metadata: dict[str, Any], message: str
) -> None:
    path = write_gguf(tiny_model("llama"), tmp_path / "m.gguf", **metadata)
    with pytest.raises(ModelError, match=message) as caught:
        expand(path, tmp_path / "out")
    assert str(caught.value).startswith(str(path))


def test_no_layer_is_made_before_all_have_their_tensors(small: Path) -> None:
    header = read_header(small)
    norm = header.tensors["blk.0.attn_norm.weight"]
    tensors = header.tensors | {f"blk.{layer}.attn_norm.weight": norm for layer in (2, 2**31 - 1)}
    claimed = replace(header, tensors=tensors, metadata=header.metadata | {"llama.block_count": 2**31})
    with pytest.raises(ModelError, match=r"is damaged \(it has no tensor blk\.2\.ffn_norm\.weight\)"):
        model_config(claimed)


def test_rope_factors_of_another_shape_are_not_read(small: Path) -> None:
    header = read_header(small)
    factors = StoredTensor(shape=(2**40,), kind=0, offset=0)
    with pytest.raises(ModelError, match=r"rope_freqs\.weight are not those of Llama 3"):
        model_config(replace(header, tensors=header.tensors | {"rope_freqs.weight": factors}))


def test_tensors_that_share_bytes_are_not_expanded(small: Path, tmp_path: Path) -> None:
    content, tensors = bytearray(small.read_bytes()), read_header(small).tensors
    for name, stored in tensors.items():
        entry = content.index(struct.pack("<Q", len(name)) + name.encode())
        offset = entry + 8 + len(name) + 4 + 8 * len(stored.shape) + 4
        content[offset : offset + 8] = bytes(8)
    start = min(stored.offset for stored in tensors.values())
    largest = max(4 * math.prod(stored.shape) for stored in tensors.values())
    path = tmp_path / "m.gguf"
    path.write_bytes(content[: start + largest])
    with pytest.raises(ModelError, match=r"is damaged \(its tensors take \d+ bytes of \d+\): download it again"):
        expand(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_type_that_the_package_cannot_expand(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = write_gguf(tiny_model("llama"), tmp_path / "m.gguf")
    content = path.read_bytes()
    entry = content.index(b"blk.0.ffn_down.weight") + len(b"blk.0.ffn_down.weight") + 4 + 16  # behind its dimensions
    assert content[entry : entry + 4] == struct.pack("<I", 0)
    for kind in (24, 28, 999):  # I8, F64, and none
        longer = bytes(len(content))  # F64 takes twice the room
        path.write_bytes(content[:entry] + struct.pack("<I", kind) + content[entry + 4 :] + longer)
        with pytest.raises(
            ModelError, match=rf"ffn_down.* has ggml type {kind}, which cannot be expanded: use another"
        ):
            expand(path, tmp_path / f"out-{kind}")


def test_the_converters_message_is_the_users(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EGGROLL_CACHE", str(tmp_path / "cache"))
    path = write_gguf(tiny_model("llama"), tmp_path / "cut.gguf")
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(ModelError) as caught:
        resolve_model(str(path))
    assert str(caught.value).startswith(f"{path} is damaged (tensor ")
    assert str(caught.value).endswith(" bytes): download it again")
    assert not [each for each in (tmp_path / "cache/models").iterdir() if each.is_dir()]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html>", r"is not a GGUF file, it begins with b'<!DO': download it again"),
        (b"", r"is not a GGUF file, it begins with b''"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "is a GGUF of version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is a GGUF of version 50331648"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "ends within its header: 1152921504606846976 keys"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "ends within its header: 1152921504606846976 tensors"),
        (b"GGUF" + struct.pack("<IQQQcIIQ", 3, 0, 1, 1, b"a", 9, 0, 2**50), "1125899906842624 numbers of at least 1"),
        (b"GGUF" + struct.pack("<IQQQcIIQ", 3, 0, 1, 1, b"a", 9, 8, 2**50), "1125899906842624 strings of at least 8"),
        (b"GGUF" + struct.pack("<IQQQcIIQ", 3, 0, 1, 1, b"a", 9, 9, 1), "a value has type 9"),
    ],
)
def test_files_that_are_no_gguf(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        resolve_model(str(path))
    assert str(path) in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"absent\.gguf cannot be read \(No such file or directory\): correct `model`"):
        resolve_model(str(tmp_path / "absent.gguf"))


@given(cut=st.integers(0, 2**16), flips=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), max_size=3))
def test_no_damage_of_a_header_is_more_than_a_model_error(
    small: Path, tmp_path_factory: pytest.TempPathFactory, cut: int, flips: list[tuple[int, int]]
) -> None:
    tensors = read_header(small).tensors
    damaged = bytearray(small.read_bytes()[: min(tensor.offset for tensor in tensors.values()) + 32])
    for place, value in flips:
        damaged[place % len(damaged)] = value
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(damaged[: cut % (2 * len(damaged))])  # one time in two whole
    with contextlib.suppress(ModelError):
        assert len(read_header(path).tensors) <= len(tensors)


QWEN_TOKENS = {
    "Hello, world! 123": [9707, 11, 1879, 0, 220, 16, 17, 18],
    "0123456789": [15, 16, 17, 18, 19, 20, 21, 22, 23, 24],
    "2+2=?": [17, 10, 17, 19884],
    "Cafe\u0301": [34, 2577, 963],
    "a    b     c": [64, 262, 293, 257, 272],
    'def main():\n    print("hi")': [750, 1887, 3932, 262, 1173, 445, 6023, 899],
    "<|im_start|>user\nTell me a story<|im_end|>\n": [151644, 872, 198, 40451, 752, 264, 3364, 151645, 198],
    "<|endoftext|>": [151643],
}
"""Ids that others published of Qwen2, 2.5 and 3, from their own tokenizers and from llama.cpp's."""


@pytest.mark.skipif("EGGROLL_TEST_GGUF" not in os.environ, reason="EGGROLL_TEST_GGUF names no Qwen2.5-Instruct")
def test_known_tokens_of_a_real_qwen() -> None:
    directory = resolve_model(os.environ["EGGROLL_TEST_GGUF"])
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert {text: tokenizer(text)["input_ids"] for text in QWEN_TOKENS} == QWEN_TOKENS
    assert json.loads((directory / "generation_config.json").read_text())["eos_token_id"] == [151645, 151643]
    assert (tokenizer.bos_token, tokenizer.pad_token_id, tokenizer.eos_token_id) == (None, 151643, 151645)
    assert json.loads((directory / "config.json").read_text())["vocab_size"] == 151936 > len(tokenizer)
