"""A model in training -> its weights under the names of the checkpoint, adapters merged."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_ADAPTED = ".base_layer."  # what peft puts into the name of a weight that has an adapter


def checkpoint_tensors(model: Any) -> "dict[str, Tensor]":
    """Return every weight by name: views of the model's own, but where it has an adapter W + (alpha / r) B A, a copy.

    Merging in place, as peft does it, and taking the adapter out again would leave a rounding error in W every time.
    """
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    tensors = {
        name.replace(_ADAPTED, "."): tensor for name, tensor in inner.state_dict().items() if ".lora_" not in name
    }
    for name, module in inner.named_modules():
        if hasattr(module, "get_delta_weight"):
            for adapter in module.active_adapters:
                tensors[f"{name}.weight"] = tensors[f"{name}.weight"] + module.get_delta_weight(adapter).detach()
    return tensors
