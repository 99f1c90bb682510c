"""GGUF files of tiny models, as llama.cpp's convert_hf_to_gguf.py writes them: its names, order of rows and factors."""

import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors.torch import load_file

FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "Q5_1": 9, "Q4_0": 2, "BF16": 32}


def write_gguf(model: Path, path: Path, kind: str = "F32", *, pre: str = "smollm", **metadata: Any) -> Path:
    """Write the model of a directory into the file at `path`, matrices in the quantisation `kind`; return `path`.

    `metadata` replaces keys, with "__" for each dot; None leaves a key out.
    """
    config = json.loads((model / "config.json").read_text())
    writer = GGUFWriter(None, config["model_type"])
    for key, value in (_settings(config) | _vocabulary(model, pre) | _unescaped(metadata)).items():
        _add(writer, key, value)
    if "general.file_type" not in _unescaped(metadata):
        writer.add_file_type(FILE_TYPES[kind])
    names = gguf.get_tensor_name_map(
        {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}[config["model_type"]], config["num_hidden_layers"]
    )
    for name, tensor in load_file(model / "model.safetensors").items():
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None
        values = _reordered(name, tensor.float().numpy(), config)
        its_kind = GGMLQuantizationType["F32" if tensor.ndim == 1 else kind]
        writer.add_tensor(stored, gguf.quantize(values, its_kind), raw_dtype=its_kind)
    if (rope := config["rope_parameters"])["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", np.array(_factors(rope, config["head_dim"]), np.float32))
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    kind = config["model_type"]
    head = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    settings = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.freq_base": float(config["rope_parameters"]["rope_theta"]),
        **({"rope.dimension_count": head, "vocab_size": config["vocab_size"]} if kind == "llama" else {}),
        **({"attention.key_length": head, "attention.value_length": head} if kind == "qwen3" else {}),
    }
    return {f"{kind}.{key}": value for key, value in settings.items()}


def _vocabulary(model: Path, pre: str) -> dict[str, Any]:
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = {**tokenizer["model"]["vocab"], **{each["content"]: each["id"] for each in tokenizer["added_tokens"]}}
    special = {each["id"] for each in tokenizer["added_tokens"]}
    return {
        "general.type": "model",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": sorted(vocabulary, key=vocabulary.__getitem__),
        "tokenizer.ggml.token_type": [3 if id in special else 1 for id in sorted(vocabulary.values())],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in tokenizer["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": vocabulary["<|im_start|>"],
        "tokenizer.ggml.eos_token_id": vocabulary["<|im_end|>"],
        "tokenizer.ggml.padding_token_id": vocabulary["<|endoftext|>"],
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": (model / "chat_template.jinja").read_text(),
    }


def _unescaped(metadata: dict[str, Any]) -> dict[str, Any]:
    return {key.replace("__", "."): value for key, value in metadata.items()}


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    match value:
        case None:
            pass
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def _reordered(name: str, values: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """Put the rows of Llama's q and k in the order of llama.cpp's rotary embedding."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
    if config["model_type"] != "llama" or not heads:
        return values
    return values.reshape(config[heads], 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def _factors(rope: dict[str, Any], head: int) -> list[float]:
    """Llama 3.1's scaling, as a loop over frequencies."""
    found = []
    for i in range(0, head, 2):
        wave = 2 * math.pi * rope["rope_theta"] ** (i / head)
        context = rope["original_max_position_embeddings"]
        if wave < context / rope["high_freq_factor"]:
            found.append(1.0)
        elif wave > context / rope["low_freq_factor"]:
            found.append(rope["factor"])
        else:
            smooth = (context / wave - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
            found.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return found


def quantised(values: torch.Tensor, kind: str) -> torch.Tensor:
    """Return what is left of bfloat16 values after the quantisation."""
    blocks = gguf.quantize(values.float().numpy(), GGMLQuantizationType[kind])
    return torch.from_numpy(gguf.dequantize(blocks, GGMLQuantizationType[kind]).copy()).bfloat16()
