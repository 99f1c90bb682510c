"""A GGUF file -> an ordinary Hugging Face directory: bfloat16 safetensors, tokenizer, chat template, generation config.

Runs in a separate process, `python -m eggroll_llm.models.gguf_expand GGUF DIRECTORY`, so that the caller neither
imports torch before the engine has set its environment nor keeps the converter's memory. Weights pass through memory a
few rows at a time.

What would change the arithmetic is translated or rejected, never ignored: an unknown setting, a tensor too many or too
few, another shape. Departures of llama.cpp's format from that of transformers:

    rows of Llama's q and k   rotary pairs (2i, 2i + 1) of a head instead of (i, i + d/2): back
    rope_freqs                Llama 3.1's scaling as factors of the frequencies: back to the settings they come from
    padded vocabulary         tokens that the original's tokenizer has not: rows stay, names go
"""

import json
import logging
import math
import sys
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eggroll_llm.errors import ModelError, UserError
from eggroll_llm.models import gguf_tokenizer
from eggroll_llm.models.gguf_file import Header, check_header, read_header
from eggroll_llm.system.terminal import inert

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    **{f"attn_{one}": f"self_attn.{one}_proj" for one in "qkv"},
    **{f"attn_{one}_norm": f"self_attn.{one}_norm" for one in "qk"},
    "attn_output": "self_attn.o_proj",
    **{f"ffn_{one}": f"mlp.{one}_proj" for one in ("gate", "up", "down")},
}
"""Name in a GGUF, without block and suffix -> in transformers, without layer and suffix."""
_OF_A_LAYER = tuple(
    name for name in _NAMES if name.startswith(("attn_", "ffn_")) and name not in ("attn_q_norm", "attn_k_norm")
)
"""Those that every layer has, whatever the architecture."""
_ROPE_FACTORS = "rope_freqs.weight"

_SETTINGS = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
"""Metadata that must be there -> its name in config.json."""
_OPTIONAL = (
    *("attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.dimension_count"),
    *("rope.freq_base", "rope.scaling.type", "vocab_size"),
)
_REAL = ("attention.layer_norm_rms_epsilon", "rope.freq_base")
"""Metadata that need not be whole numbers."""
_CLASSES = {"llama": "LlamaConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config"}

Rows = np.ndarray[Any, np.dtype[np.float32]]
_CHUNK = 1 << 22  # values that are expanded at once


def expand(path: Path, directory: Path) -> None:
    """Write the model of the GGUF file at `path` into `directory`, which is created.

    Raises ModelError for a file that is damaged or means something not translated here, OSError from writing.
    """
    from transformers import GenerationConfig

    header = read_header(path)
    check_header(header)
    _check_vocabulary(header)
    family = gguf_tokenizer.family_of(header.metadata, path)
    config = model_config(header)
    tensors = _tensors(header, config)
    directory.mkdir()
    _write_weights(header, tensors, directory / "model.safetensors")
    config.save_pretrained(directory)
    generation = GenerationConfig.from_model_config(config)
    generation.eos_token_id = gguf_tokenizer.ends(header.metadata, family)
    generation.save_pretrained(directory)
    gguf_tokenizer.write_tokenizer(header.metadata, path, directory, config.max_position_embeddings)


def model_config(header: Header) -> "PretrainedConfig":
    """Return the configuration that transformers has for the model. Raises ModelError."""
    import transformers

    kind, tensors = header.architecture, header.tensors
    prefix = f"{kind}."
    settings = {key.removeprefix(prefix): value for key, value in header.metadata.items() if key.startswith(prefix)}
    if unknown := settings.keys() - _SETTINGS.keys() - set(_OPTIONAL):
        raise ModelError(f"{header.path}: the setting {inert(prefix + min(unknown))} is unknown here: use the original")
    if wrong := [
        prefix + key
        for key in {*_SETTINGS, *settings} - {"rope.scaling.type"}
        if type(settings.get(key)) not in ((int, float) if key in _REAL else (int,)) or not settings[key] > 0
    ]:
        raise ModelError(f"{header.path}: the setting {min(wrong)} is missing or no number: download it again")
    names = (f"blk.{layer}.{name}.weight" for layer in range(settings["block_count"]) for name in _OF_A_LAYER)
    if missing := next((name for name in names if name not in tensors), ""):  # before so many layers are made
        raise ModelError(f"{header.path} is damaged (it has no tensor {missing}): download it again")
    heads, hidden = settings["attention.head_count"], settings["embedding_length"]
    size = settings.get("attention.key_length") or settings.get("rope.dimension_count") or hidden // heads
    sizes = {settings.get(key, size) for key in ("attention.value_length", "rope.dimension_count")}
    if sizes != {size} or (kind == "qwen2" and size * heads != hidden):
        raise ModelError(f"{header.path}: attention heads of several sizes are not known here: use the original")
    config: PretrainedConfig = getattr(transformers, _CLASSES[kind])(
        **{ours: settings[key] for key, ours in _SETTINGS.items()},
        **gguf_tokenizer.special_ids(header.metadata),
        **({} if kind == "qwen2" else {"head_dim": size, "attention_bias": "blk.0.attn_q.bias" in tensors}),
        **({"mlp_bias": "blk.0.ffn_up.bias" in tensors} if kind == "llama" else {}),
        architectures=[f"{_CLASSES[kind].removesuffix('Config')}ForCausalLM"],
        dtype="bfloat16",
        num_key_value_heads=settings.get("attention.head_count_kv", heads),
        rope_parameters=_rope(header, settings, size),
        tie_word_embeddings="output.weight" not in tensors,
        vocab_size=tensors["token_embd.weight"].shape[0],
    )
    return config


def _check_vocabulary(header: Header) -> None:
    """Raise ModelError when the vocabulary is incomplete, or is not that of the embeddings."""
    tokens, merges, kinds = (header.metadata.get(f"tokenizer.ggml.{key}") for key in ("tokens", "merges", "token_type"))
    embeddings = header.tensors.get("token_embd.weight")
    if not (isinstance(tokens, list) and isinstance(merges, list) and isinstance(kinds, array) and embeddings):
        raise ModelError(f"{header.path} lacks embeddings, tokens or merges: use the GGUF of a whole language model")
    if not len(tokens) == len(kinds) == embeddings.shape[0]:
        raise ModelError(
            f"{header.path} is damaged ({len(tokens)} tokens, {len(kinds)} types of tokens, "
            f"{embeddings.shape[0]} embeddings): download it again"
        )


def _rope(header: Header, settings: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Return the settings of the rotary embedding."""
    base = float(settings.get("rope.freq_base", 10_000.0))
    scaling = settings.get("rope.scaling.type", "none")
    if scaling != "none":
        raise ModelError(f"{header.path}: rotary scaling {inert(str(scaling))!r} is not known here: use the original")
    if _ROPE_FACTORS not in header.tensors:
        return {"rope_type": "default", "rope_theta": base}
    if header.tensors[_ROPE_FACTORS].shape != (size // 2,):  # before they are read
        raise _not_llama3(header)
    factors = np.concatenate(list(_rows(header, _ROPE_FACTORS))).ravel()
    llama3 = {
        "rope_type": "llama3",
        "rope_theta": base,
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    if not np.allclose(factors, llama3_factors(llama3, size), rtol=1e-3):
        raise _not_llama3(header)
    return llama3


def _not_llama3(header: Header) -> ModelError:
    return ModelError(f"{header.path}: {_ROPE_FACTORS} are not those of Llama 3: use the original")


def llama3_factors(rope: Mapping[str, Any], size: int) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """Return by what Llama 3.1's scaling divides each frequency of a head, as a GGUF stores it (size / 2)."""
    length = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, size, 2) / size)  # of a wave, in tokens
    turns = rope["original_max_position_embeddings"] / length
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return np.asarray(1 / ((1 - smooth) / factor + smooth))


def _tensors(header: Header, config: "PretrainedConfig") -> dict[str, str]:
    """Return name in transformers -> name in the file, of exactly the tensors that the model has. Raises ModelError."""
    import torch
    from transformers import AutoModelForCausalLM

    found = {_translated(name): name for name in header.tensors if name != _ROPE_FACTORS}
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
    if config.tie_word_embeddings:
        del wanted["lm_head.weight"]
    for name in sorted(wanted.keys() ^ found.keys()):
        what = f"has no tensor for {name}" if name in wanted else f"has the tensor {inert(found[name])}, unknown here"
        raise ModelError(f"{header.path} {what}: use the GGUF of a dense {header.architecture} model, or the original")
    size = 0
    for name, stored in found.items():
        if header.tensors[stored].shape != wanted[name]:
            raise ModelError(
                f"{header.path} is damaged ({stored} has shape {header.tensors[stored].shape} instead of "
                f"{wanted[name]}): download it again"
            )
        size += wanted[name][0] * _row_bytes(header, stored)
    if size > (length := header.path.stat().st_size):  # tensors that share bytes would fill the disk
        raise ModelError(f"{header.path} is damaged (its tensors take {size} bytes of {length}): download it again")
    return found


def _translated(name: str) -> str:
    """Return the name in transformers; for a tensor that is not known, its own."""
    parts = name.split(".")
    match parts:
        case [module, suffix] if module in _NAMES:
            return f"{_NAMES[module]}.{suffix}"
        case ["blk", layer, module, suffix] if module in _NAMES:
            return f"model.layers.{layer}.{_NAMES[module]}.{suffix}"
    return name


def _write_weights(header: Header, tensors: Mapping[str, str], path: Path) -> None:
    """Write a safetensors file as its library would, without holding its tensors."""
    import torch

    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(tensors):
        shape = header.tensors[tensors[name]].shape
        start, end = end, end + 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (start, end)}
    head = json.dumps(entries, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for name in sorted(tensors):
            for values in _rows(header, tensors[name], _row_order(header, tensors[name])):
                file.write(torch.from_numpy(values).bfloat16().view(torch.int16).numpy().data)


def _row_order(header: Header, name: str) -> "np.ndarray[Any, np.dtype[np.int64]] | None":
    """Return which row of the file each row of the tensor is, where llama.cpp has put them in another order."""
    key = {"attn_q": "head_count", "attn_k": "head_count_kv"}.get(name.split(".")[-2])
    if header.architecture != "llama" or key is None:
        return None
    settings = header.metadata
    heads = settings.get(f"llama.attention.{key}", settings["llama.attention.head_count"])
    rows_HPI = np.arange(header.tensors[name].shape[0]).reshape(heads, -1, 2)  # head, rotary pair, which of the pair
    return rows_HPI.swapaxes(1, 2).ravel()


def _rows(header: Header, name: str, order: "np.ndarray[Any, np.dtype[np.int64]] | None" = None) -> Iterator[Rows]:
    """Yield the rows of a tensor in float32, in this order, some at a time; a vector's rows are its values."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    stored = header.tensors[name]
    rows, width = stored.shape[0], math.prod(stored.shape[1:])
    content = np.memmap(header.path, np.uint8, "r", stored.offset, (rows, _row_bytes(header, name)))
    step = max(1, _CHUNK // width)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        blocks = np.array(content[part if order is None else order[part]])
        try:
            yield dequantize(blocks, GGMLQuantizationType(stored.kind))
        except NotImplementedError as error:
            raise _not_expanded(header, name) from error


def _row_bytes(header: Header, name: str) -> int:
    """Return the size of a row of a tensor. Raises ModelError where it is not known, or beyond the end of the file."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    stored = header.tensors[name]
    rows, width = stored.shape[0], math.prod(stored.shape[1:])
    try:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(stored.kind)]
    except (ValueError, KeyError) as error:
        raise _not_expanded(header, name) from error
    if width % block:
        raise _not_expanded(header, name)
    row_bytes, length = width // block * size, header.path.stat().st_size
    if stored.offset + rows * row_bytes > length:
        raise ModelError(
            f"{header.path} is damaged (tensor {inert(name)} lies beyond its {length} bytes): download it again"
        )
    return row_bytes


def _not_expanded(header: Header, name: str) -> ModelError:
    return ModelError(
        f"{header.path}: tensor {inert(name)} of shape {header.tensors[name].shape} has ggml type "
        f"{header.tensors[name].kind}, which cannot be expanded: use another quantisation, such as Q4_K_M or Q8_0"
    )


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    try:
        expand(Path(sys.argv[1]), Path(sys.argv[2]))
    except UserError as error:
        sys.exit(str(error))
