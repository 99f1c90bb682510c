"""Which weights are trained: the linear layers of the decoder blocks. All others stay frozen."""

from pathlib import Path

from eggroll_llm.errors import ConfigError, ModelError
from eggroll_llm.es.noise import Shape
from eggroll_llm.models.files import tensor_shapes

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


def is_trained(name: str) -> bool:
    """Return whether a tensor of this name is the weight of a trained layer."""
    return name.endswith(".weight") and name.split(".")[-2] in TARGET_MODULES


def trained_parameters(model_dir: Path) -> list[Shape]:
    """Return (name, out features, in features) of every trained tensor of a checkpoint.

    Raises ModelError when there is none.
    """
    shapes = [
        (name, shape[0], shape[1])
        for name, shape in tensor_shapes(model_dir).items()
        if is_trained(name) and len(shape) == 2
    ]
    if not shapes:
        raise ModelError(
            f"{model_dir}: no linear layer is named {' or '.join(TARGET_MODULES)}, so there is nothing to "
            "train: use a Llama- or Qwen-shaped model"
        )
    return shapes


def check_rank(model_dir: Path, key: str, rank: int) -> None:
    """Raise ConfigError for a rank, set by `key`, above that of a trained weight; ModelError when none is trained."""
    name, out, inside = min(trained_parameters(model_dir), key=lambda shape: min(shape[1:]))
    if rank > min(out, inside):
        raise ConfigError(
            f"{key} = {rank}: {name!r} of the model is {out} x {inside}; its rank is at most {min(out, inside)}: set "
            f"{key} to that or less"
        )
