"""What a model directory must hold to be trained from, and what makes two directories the same model.

The engine must be able to serve it and write updates back: config.json with a causal language model, complete
safetensors, no code of its own. Only the standard library is used, so mistakes are found before anything heavy is
imported. Each raises `ModelError` with a remedy.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eggroll_llm.errors import ModelError
from eggroll_llm.models.architectures import architecture, check_architecture, check_dense
from eggroll_llm.system.files import sha256_of
from eggroll_llm.system.jsonl import parse_json

_UNSTABLE_CONFIG_KEYS = (
    "_name_or_path",
    "_model_name_or_path",
    "transformers_version",
)  # saving again changes them


def check_model(directory: Path) -> str:
    """Return the architecture that config.json names, after checking that the directory can be trained from.

    Raises `ModelError` for a missing or unreadable config.json, remote code, quantized weights, anything but
    a causal language model, and weights that are missing, incomplete or pickled.
    """
    config = read_config(directory)
    where = directory / "config.json"
    if "auto_map" in config:
        raise ModelError(
            f"{where}: 'auto_map' asks to run Python code shipped with the model, which is never allowed: "
            f"use a model whose architecture transformers and vLLM implement"
        )
    if "quantization_config" in config:
        raise ModelError(
            f"{where}: the weights are quantized ('quantization_config') and cannot be updated: use the unquantized "
            'checkpoint, which engine.quantization = "fp8" serves in 8 bits'
        )
    name = check_architecture(config, where)
    for weights in weight_files(directory):
        _check_complete(weights)
    check_dense(config, tensor_shapes(directory), where)
    return name


def architecture_of(directory: Path) -> str:
    """Return the first architecture that config.json names; empty when it names none. Raises `ModelError`."""
    return architecture(read_config(directory))


def context_limit(directory: Path) -> int:
    """Return the longest context in tokens that the model was made for; 2**31 when config.json names none."""
    limit = read_config(directory).get("max_position_embeddings")
    return limit if isinstance(limit, int) else 2**31


def model_identity(directory: Path) -> str:
    """Return 16 hex digits that are equal for equal weights and architecture, wherever the files are.

    SHA-256 of config.json (without the keys that change when it is saved again) and of the name, size and
    content of every weight file. Reads all weights: about a second per gigabyte.
    """
    config = read_config(directory)
    stable = {key: value for key, value in config.items() if key not in _UNSTABLE_CONFIG_KEYS}
    digest = hashlib.sha256(json.dumps(stable, sort_keys=True).encode())
    for weights in weight_files(directory):
        digest.update(f"\n{weights.name} {weights.stat().st_size} {sha256_of(weights)}".encode())
    return digest.hexdigest()[:16]


def read_config(directory: Path) -> dict[str, Any]:
    """Return the config.json of a model's directory. Raises `ModelError`."""
    path = directory / "config.json"
    try:
        config = parse_json(path.read_bytes())
    except FileNotFoundError as error:
        ggufs = sorted(directory.glob("*.gguf"))
        wanted = f"name a file, such as {ggufs[0]}" if ggufs else "name the directory of a Hugging Face model"
        raise ModelError(f"{directory} has no config.json: {wanted}") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read ({error}): restore it from the original model") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} is not a JSON object: restore it from the original model")
    return config


def weight_files(directory: Path) -> list[Path]:
    """Return the safetensors files that hold the weights. Raises `ModelError` when one or all are missing."""
    weights = sorted(directory.glob("*.safetensors"))
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted(set(parse_json(index.read_bytes())["weight_map"].values()))
            if not shards or any(Path(shard).name != shard for shard in shards):
                raise ValueError("it names no files of the directory")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index} is not a safetensors index ({error}): restore it from the original") from error
        if missing := [shard for shard in shards if not os.path.isfile(directory / shard)]:
            raise ModelError(
                f"{directory}: {len(missing)} of {len(shards)} weight files are missing, first {missing[0]}"
            )
        return [directory / shard for shard in shards]
    if weights:
        return weights
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
    if pickled:
        raise ModelError(
            f"{directory} has only pickled weights ({pickled[0]}), which can run code when loaded: "
            f"save the model again with transformers, or use a checkpoint with safetensors"
        )
    raise ModelError(f"{directory} has no *.safetensors: name the directory of a complete Hugging Face model")


def tensor_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every stored tensor by name, read from the headers."""
    return {name: shape for weights in weight_files(directory) for name, shape in _shapes(_read_header(weights)[0])}


def header_shapes(weights: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a safetensors file by name. Raises ModelError for a damaged file."""
    return dict(_shapes(_check_complete(weights)))


def _shapes(header: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    return ((name, tuple(entry["shape"])) for name, entry in header.items() if name != "__metadata__")


def _check_complete(weights: Path) -> dict[str, Any]:
    """Return the header, after comparing the file's size with what it promises: truncated copies are common."""
    size = weights.stat().st_size
    try:
        header, header_size = _read_header(weights)
        tensors = [entry for name, entry in header.items() if name != "__metadata__"]
        if any(type(size) is not int or size < 0 for entry in tensors for size in entry["shape"]):
            raise ValueError("a tensor has an invalid shape")
        expected = 8 + header_size + max((entry["data_offsets"][1] for entry in tensors), default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(f"{weights} is not a safetensors file ({error}): copy or download it again") from error
    if size != expected or not tensors:
        raise ModelError(
            f"{weights} is damaged: {size} bytes, but its header promises {expected}: copy or download it again"
        )
    return header


def _read_header(weights: Path) -> tuple[dict[str, Any], int]:
    size = weights.stat().st_size
    with weights.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        return (parse_json(file.read(header_size)) if header_size <= size else {}), header_size
