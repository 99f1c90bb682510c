"""The change of weights of a trained model -> a LoRA adapter as PEFT stores it, and how much of the change it keeps.

    D = W_trained - W_base for each trained layer, in float32;    s B A = D_rank with s = 1

W_base is rounded to the dtype of the trained weights first, because that is what training began from. Layers are those
of the checkpoint, which are the ones that PEFT knows: q_proj, k_proj and v_proj, or Phi-3's qkv_proj.
"""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from eggroll_llm.errors import ModelError
from eggroll_llm.models.adapter.kept import SHARES, Kept, Layer
from eggroll_llm.models.adapter.peft_format import CONFIG, WEIGHTS, key_of
from eggroll_llm.models.files import tensor_shapes, weight_files
from eggroll_llm.models.targets import block_of, trained_parameters

if TYPE_CHECKING:
    from torch import Tensor


def write_adapter(
    base_dir: Path,
    trained_dir: Path,
    directory: Path,
    *,
    rank: int,
    base_name: str,
    on_layer: Callable[[int, int], None] = lambda done, total: None,
) -> Kept:
    """Write the adapter of a rank, for PEFT's `base_name`, into a directory that exists; return what it keeps.

    Raises ModelError when the two are not of the same architecture, or no layer changed.
    """
    import torch
    from safetensors.torch import save_file

    from eggroll_llm.models.adapter.low_rank import low_rank

    shapes = tensor_shapes(base_dir)
    _check_same(shapes, tensor_shapes(trained_dir), base_dir, trained_dir)
    names = [name for name, _, _ in trained_parameters(base_dir)]
    factors: dict[str, Tensor] = {}
    layers, squares, exact = [], torch.zeros(max(min(shapes[name]) for name in names), dtype=torch.float64), True
    with ExitStack() as files:
        before, after = (_tensors(folder, files) for folder in (base_dir, trained_dir))
        left_out = {}
        for name in shapes.keys() - set(names):
            if norm := _change(before[name](name), after[name](name)).norm().item():
                left_out[name] = norm
        for done, name in enumerate(names, start=1):
            change = _change(before[name](name), after[name](name))
            found = low_rank(change, rank)
            factors[key_of(name, "A")], factors[key_of(name, "B")] = found.A_RI, found.B_OR
            layers.append(Layer(name=name, change=change.norm().item(), lost=found.lost))
            if found.squares is None:
                exact = False
            else:
                squares[: len(found.squares)] += found.squares
            on_layer(done, len(names))
    blocks = {block_of(layer.name) for layer in layers}
    changed = sorted({block_of(layer.name) for layer in layers if layer.change})
    if not changed:
        raise ModelError(f"{trained_dir} has the linear layers of its base {base_dir}: there is no change to export")
    total = math.hypot(*(layer.change for layer in layers), *left_out.values()) ** 2
    factors = {key: factor for key, factor in factors.items() if block_of(key) in changed}
    config = {
        **{"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name, "inference_mode": True},
        **{"r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False},
        "target_modules": sorted({layer.module for layer in layers}),
        "layers_to_transform": changed if len(changed) < len(blocks) else None,
    }
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(factors, directory / WEIGHTS, metadata={"format": "pt"})
    shutil.copymode(directory / CONFIG, directory / WEIGHTS)  # safetensors lets nobody else read it
    return Kept(
        rank=rank,
        layers=tuple(layers),
        left_out=dict(sorted(left_out.items())),
        needed=_ranks_needed(squares.cumsum(0) / total) if exact else {},
    )


def _change(before: "Tensor", after: "Tensor") -> "Tensor":
    return after.float() - before.to(after.dtype).float()


def _ranks_needed(share_by_rank: "Tensor") -> dict[float, int]:
    return {share: 1 + int((share_by_rank < share).sum()) for share in SHARES if share_by_rank[-1] >= share}


def _tensors(directory: Path, files: ExitStack) -> dict[str, Callable[[str], "Tensor"]]:
    """Return what reads a tensor, by its name."""
    from safetensors import safe_open

    opened = [files.enter_context(safe_open(file, framework="pt")) for file in weight_files(directory)]
    return {name: file.get_tensor for file in opened for name in file.keys()}  # noqa: SIM118


def _check_same(
    base: Mapping[str, tuple[int, ...]], trained: Mapping[str, tuple[int, ...]], base_dir: Path, trained_dir: Path
) -> None:
    if different := sorted(name for name in base.keys() | trained.keys() if base.get(name) != trained.get(name)):
        raise ModelError(
            f"{trained_dir} was not trained from {base_dir}: {len(different)} tensors are not the same in name or "
            f"shape, first {different[0]!r}: name the model that it was trained from with --base"
        )
