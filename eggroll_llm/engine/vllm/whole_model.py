"""All weights of the served model, written from outside: what a trainer with gradients hands over after its step.

vLLM's own `load_weights` is of no use here: it looks for names that the adapter wrappers have changed, and on CPU for
weights that are packed and gone. So every parameter is found by its name in the Hugging Face checkpoint: the linear
layers are served like after an update of ES (`ServedWeights`), all else is copied in place, and the head, which on CPU
computes with a packed copy even when it is tied to the embeddings, is packed again.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers import utils as vllm_layer_utils
from vllm.v1.sample import sampler as vllm_sampler

from eggroll_llm.engine.vllm.layers import Layer
from eggroll_llm.engine.vllm.weights import ServedWeights
from eggroll_llm.errors import ModelError

HEAD = "lm_head.weight"
_PADDED = (HEAD, "model.embed_tokens.weight")  # of which vLLM has more rows than the checkpoint


class WholeModel:
    """Where each tensor of the checkpoint is served from."""

    def __init__(self, model: Any, layers: Sequence[Layer]) -> None:
        self._model, self._layers = model, layers
        slices = {layer.name: list(layer.slices()) for layer in layers}
        self.rest: dict[str, Tensor] = {}
        """Name in the checkpoint -> what vLLM computes with, but for the weights of the linear layers."""
        for name, parameter in model.named_parameters():
            module, _, kind = name.replace(".base_layer.", ".").rpartition(".")
            if module not in slices:
                self.rest[f"{module}.{kind}"] = parameter
            elif kind != "weight":  # a fused layer's bias has the rows of its slices
                for weight, begin, end in slices[module]:
                    self.rest[f"{weight.removesuffix('weight')}{kind}"] = parameter[begin:end]
        self._shapes = {name: tuple(parameter.shape) for name, parameter in self.rest.items()}
        for layer in layers:
            for name, begin, end in layer.slices():
                self._shapes[name] = (end - begin, layer.in_features)

    def load(self, weights: Mapping[str, Tensor], served: ServedWeights) -> None:
        """Serve these weights. Raises ModelError, with nothing changed, for a name or shape that is not served."""
        linear = {name for layer in self._layers for name in layer.parameters}
        # A tied head is not a parameter of its own, and a checkpoint may hold it all the same.
        found, wanted = weights.keys() - {HEAD}, (linear | self.rest.keys()) - {HEAD}
        if found != wanted or (HEAD in self.rest and HEAD not in weights):
            names = sorted(found ^ wanted) or [HEAD]
            raise ModelError(
                f"{len(names)} tensors are in the trained model or in vLLM's but not in both, first {names[0]!r}: this "
                "architecture cannot be trained with GRPO yet; use a Llama- or Qwen-shaped model"
            )
        for name, shape in self._shapes.items():
            if name in weights and not _fits(weights[name].shape, shape, padded=name in _PADDED):
                raise ModelError(
                    f"{name} has shape {[*weights[name].shape]} in the trained model and {[*shape]} in vLLM's, which "
                    "is of another architecture then: use a Llama- or Qwen-shaped model"
                )
        with torch.inference_mode():
            for layer in self._layers:
                for name in layer.parameters:
                    served.room(name).copy_(weights[name])
                    served.written(name)
            for name, room in self.rest.items():
                # vLLM pads a vocabulary, and on CPU may keep a bias in float32: what is served is the rounded value.
                rounded = weights[name].to(served.dtype)
                room[: len(rounded)].copy_(rounded)
            self._pack_head()

    def _pack_head(self) -> None:
        head = getattr(self._model, "lm_head", None)
        if hasattr(head, "cpu_linear"):
            vllm_layer_utils.dispatch_cpu_unquantized_gemm(head, remove_weight=False)


def _fits(shape: Sequence[int], served: Sequence[int], *, padded: bool) -> bool:
    same_rows = shape[0] <= served[0] if padded else shape[0] == served[0]
    return same_rows and [*shape[1:]] == [*served[1:]]


def count_ranks_uncompiled() -> None:
    """Count the rank of a sampled token, which vLLM returns with its log-probability, without torch.compile.

    That would fall into the first step and take longer than many steps of a small model; and nobody asks for ranks.
    """

    def count(logprobs: Tensor, sampled: Tensor) -> Tensor:
        return (logprobs >= sampled).sum(-1)

    vllm_sampler.batched_count_greater_than = count
