"""The linear layers that a population perturbs, and what they are called in the Hugging Face checkpoint.

vLLM fuses parameters: `qkv_proj` holds the rows of q_proj, k_proj, v_proj, `gate_up_proj` those of gate_proj, up_proj.
Noise, masters and checkpoints are per Hugging Face parameter, so a fused layer has several slices.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.lora.layers import ReplicatedLinearWithLoRA, RowParallelLinearWithLoRA
from vllm.model_executor.models.llama import LlamaDecoderLayer
from vllm.model_executor.models.mistral import MistralDecoderLayer
from vllm.model_executor.models.qwen2 import Qwen2DecoderLayer
from vllm.model_executor.models.qwen3 import Qwen3DecoderLayer

from eggroll_llm.engine.vllm.ranks import Part
from eggroll_llm.errors import ModelError
from eggroll_llm.es.noise import Shape

_BLOCKS = (LlamaDecoderLayer, MistralDecoderLayer, Qwen2DecoderLayer, Qwen3DecoderLayer)
"""Decoder blocks, without subclasses, called with positions, hidden states and residual; `blocks` has their modules."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A linear layer as vLLM serves it, wrapped for adapters."""

    name: str
    """Module path in vLLM's model."""
    module: Any
    """vLLM's adapter wrapper; its `base_layer` holds the weight."""
    parameters: tuple[str, ...]
    """Hugging Face parameter name of each slice, in row order."""
    parts: tuple[Part, ...]
    """What of each parameter is here."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Return the out features of each slice here."""
        return tuple(part.size[0] for part in self.parts)

    @property
    def in_features(self) -> int:
        """Return the in features here, common to all slices."""
        return self.parts[0].size[1]

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
        names = packed.get(leaf) or [leaf]
        fused = len(getattr(module.base_layer, "output_sizes", names)) if module.tp_size > 1 else len(names)
        if len(names) != len(module.output_slices) or len(names) != fused:
            raise ModelError(
                f"layer {name!r} ({type(module).__name__}) is split in a way this engine does not know: "
                "use a Llama- or Qwen-shaped model on one device"
            )
        layers.append(
            Layer(
                name=name,
                module=module,
                parameters=tuple(f"{parent}.{part}.weight" for part in names),
                parts=tuple(_part(module, c, size) for c, size in enumerate(module.output_slices)),
            )
        )
    return layers


def decoder_blocks(model: Any) -> list[Any]:
    """Return the decoder blocks of a model when all are of a kind that is known here, else none."""
    blocks = list(getattr(getattr(model, "model", None), "layers", ()))
    # Some of Mistral's have a condition between norm and MLP.
    known = all(type(block) in _BLOCKS and getattr(block, "ada_rms_norm_t_cond", None) is None for block in blocks)
    return blocks if known else []


def _part(module: Any, c: int, out: int) -> Part:
    """Return what of slice c of a module is on this rank, with so many rows."""
    ranks, rank, inside = module.tp_size, module.tp_rank, module.input_size
    if ranks == 1 or isinstance(module, ReplicatedLinearWithLoRA):
        return Part(shape=(out, inside))
    if isinstance(module, RowParallelLinearWithLoRA):
        return Part(shape=(out, inside * ranks), axis=1, index=rank, parts=ranks)
    # Heads of k and v, slices 1 and 2, have copies where there are fewer than ranks.
    copies = getattr(module.base_layer, "num_kv_head_replicas", 1) if c else 1
    return Part(shape=(out * (ranks // copies), inside), index=rank // copies, parts=ranks // copies)


def parameter_parts(layers: Sequence[Layer]) -> dict[str, Part]:
    """Return what is here of every parameter, in layer order."""
    return {name: part for layer in layers for name, part in zip(layer.parameters, layer.parts, strict=True)}


def parameter_shapes(layers: Sequence[Layer]) -> list[Shape]:
    """Return (parameter, out features, in features) of what is here of every parameter, in layer order."""
    return [(name, *part.size) for name, part in parameter_parts(layers).items()]
