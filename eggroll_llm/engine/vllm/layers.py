"""The linear layers that a population perturbs, and what they are called in the Hugging Face checkpoint.

vLLM fuses parameters: `qkv_proj` holds the rows of q_proj, k_proj, v_proj, `gate_up_proj` those of gate_proj, up_proj.
Noise, masters and checkpoints are per Hugging Face parameter, so a fused layer has several slices.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eggroll_llm.errors import ModelError
from eggroll_llm.es.noise import Shape


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A linear layer as vLLM serves it, wrapped for adapters."""

    name: str
    """Module path in vLLM's model."""
    module: Any
    """vLLM's adapter wrapper; its `base_layer` holds the weight."""
    parameters: tuple[str, ...]
    """Hugging Face parameter name of each slice, in row order."""
    sizes: tuple[int, ...]
    """Out features of each slice."""
    in_features: int
    """In features, common to all slices."""

    def slices(self) -> Iterator[tuple[str, int, int]]:
        """Yield (parameter, first row, row after the last) of each slice."""
        row = 0
        for parameter, size in zip(self.parameters, self.sizes, strict=True):
            yield parameter, row, row + size
            row += size


def find_layers(modules: Mapping[str, Any], packed: Mapping[str, Sequence[str]]) -> list[Layer]:
    """Describe vLLM's adapted modules. Raises ModelError when one is not a plain linear layer."""
    layers = []
    for name, module in modules.items():
        parent, _, leaf = name.rpartition(".")
        parts = packed.get(leaf) or [leaf]
        if len(parts) != len(module.output_slices) or getattr(module, "tp_size", 1) != 1:
            raise ModelError(
                f"layer {name!r} ({type(module).__name__}) is split in a way this engine does not know: "
                "use a Llama- or Qwen-shaped model on one device"
            )
        layers.append(
            Layer(
                name=name,
                module=module,
                parameters=tuple(f"{parent}.{part}.weight" for part in parts),
                sizes=tuple(module.output_slices),
                in_features=module.input_size,
            )
        )
    return layers


def parameter_shapes(layers: Sequence[Layer]) -> list[Shape]:
    """Return (parameter, out features, in features) of every slice, in layer order."""
    return [
        (parameter, size, layer.in_features)
        for layer in layers
        for parameter, size in zip(layer.parameters, layer.sizes, strict=True)
    ]
