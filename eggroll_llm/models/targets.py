"""Which weights are trained: the linear layers of the decoder blocks, or of some of them. All others stay frozen.

So do the experts of a mixture: vLLM computes all those of a block in one kernel, where members have no factors.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path

from eggroll_llm.errors import ConfigError, ModelError
from eggroll_llm.es.noise import Shape
from eggroll_llm.models.architectures import is_expert
from eggroll_llm.models.files import tensor_shapes
from eggroll_llm.system.terminal import inert

# Names that Llama-shaped models give these layers, and the names under which vLLM fuses them.
TARGET_MODULES = (
    "qkv_proj",
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_up_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)


_BLOCK = re.compile(r"\.(\d+)\.")
_OF_A_BLOCK = re.compile(r"^.*?\.\d+\.(.*?)(\.\d+\..*)?$")
"""Group 1 is the place of a tensor in its block; for one of several experts, that of all."""


def is_trained(name: str, layers: Sequence[int] = ()) -> bool:
    """Return whether a tensor of this name is the weight of a trained layer, in blocks as `es.layers` says."""
    if not name.endswith(".weight") or name.split(".")[-2] not in TARGET_MODULES or is_expert(name):
        return False
    return not layers or layers[0] <= block_of(name) <= layers[-1]


def block_of(name: str) -> int:
    """Return the number of the decoder block that a tensor or module is in, -1 for one that is in none."""
    found = _BLOCK.search(name)
    return int(found[1]) if found else -1


def trained_parameters(model_dir: Path, layers: Sequence[int] = ()) -> list[Shape]:
    """Return (name, out features, in features) of every trained tensor of a checkpoint; `layers` as in `es.layers`.

    Raises ModelError when there is none.
    """
    shapes = [
        (name, shape[0], shape[1])
        for name, shape in tensor_shapes(model_dir).items()
        if is_trained(name, layers) and len(shape) == 2
    ]
    if not shapes:
        raise ModelError(
            f"{model_dir}: no linear layer is named {' or '.join(TARGET_MODULES)}, so there is nothing to "
            "train: use a Llama- or Qwen-shaped model"
        )
    return shapes


def left_out(model_dir: Path) -> tuple[str, ...]:
    """Return a sentence that names the matrices of the decoder blocks that are never trained; nothing where all are."""
    shapes = tensor_shapes(model_dir)
    frozen = [name for name, shape in shapes.items() if len(shape) > 1 and _BLOCK.search(name) and not is_trained(name)]
    if not frozen:
        return ()
    places = sorted({_OF_A_BLOCK.sub(r"\1", name.removesuffix(".weight")) for name in frozen})
    share = sum(math.prod(shapes[name]) for name in frozen) / sum(map(math.prod, shapes.values()))
    return (f"Not trained: {inert(', '.join(places))} of the decoder blocks, {share:.1%} of all weights.",)


def check_layers(model_dir: Path, layers: Sequence[int]) -> None:
    """Raise ConfigError for `es.layers` that the model does not have."""
    if not layers:
        return
    last = max(block_of(name) for name, _, _ in trained_parameters(model_dir))
    if layers[-1] > last:
        raise ConfigError(
            f"es.layers = {list(layers)}: the model's decoder blocks have the numbers 0 to {last}: lower es.layers"
        )


def check_rank(model_dir: Path, key: str, rank: int) -> None:
    """Raise ConfigError for a rank, set by `key`, above that of a trained weight; ModelError when none is trained."""
    name, out, inside = min(trained_parameters(model_dir), key=lambda shape: min(shape[1:]))
    if rank > min(out, inside):
        raise ConfigError(
            f"{key} = {rank}: {name!r} of the model is {out} x {inside}; its rank is at most {min(out, inside)}: set "
            f"{key} to that or less"
        )
