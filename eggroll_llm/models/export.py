"""Writes a trained model: the base checkpoint with its trained tensors replaced, as a normal Hugging Face directory.

Tensors keep the files they were in. All floating-point tensors are stored in the served dtype, in which the trained
ones are exactly what the engine computed with and the others are what it had loaded.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from eggroll_llm.errors import ModelError
from eggroll_llm.models.files import weight_files

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_NOT_OF_THE_MODEL = ("manifest.json", "eggroll.json")  # a base model may be a checkpoint of another run
_COPIED = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt", "LICENSE*")


def export_model(base_dir: Path, directory: Path, trained: "Mapping[str, Tensor]", dtype: "torch.dtype") -> None:
    """Write the model into `directory`, which is created. Raises ModelError when a trained name is not in the base."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    for pattern in _COPIED:
        for file in set(base_dir.glob(pattern)) - {base_dir / name for name in _NOT_OF_THE_MODEL}:
            shutil.copyfile(file, directory / file.name)
    missing = set(trained)
    for file in weight_files(base_dir):
        with safe_open(file, framework="pt") as base:
            names = base.keys()
            tensors = {name: trained[name] if name in trained else base.get_tensor(name) for name in names}
            metadata = base.metadata()
        missing -= tensors.keys()
        tensors = {
            name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
            for name, tensor in tensors.items()
        }
        save_file(_apart(tensors), directory / file.name, metadata=metadata or {"format": "pt"})
        shutil.copymode(directory / "config.json", directory / file.name)  # safetensors lets nobody else read it
    if missing:
        raise ModelError(f"{base_dir} does not hold {len(missing)} trained tensors, first {sorted(missing)[0]!r}")
    _set_dtype(directory / "config.json", str(dtype).removeprefix("torch."))


def _apart(tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """Return the tensors, each in memory of its own, as safetensors asks: a head may be tied to the embeddings."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        found[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return found


def _set_dtype(path: Path, dtype: str) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    config["dtype"] = dtype
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
