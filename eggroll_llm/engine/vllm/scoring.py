"""The probabilities that members give to completions, by one forward pass over a `TokenTree` for several at once.

vLLM would compute each completion as a request of its own and return a dictionary per token. Here the model is called
directly, eagerly and without a key-value cache: only its attention is exchanged while it scores, and the head sees the
positions that are asked for. What is before the first block that members perturb is computed once for all of them,
where the model is a known one. Knows vLLM 0.32's internals.

Shapes: T token of the tree, M member of a forward pass, H head, G queries' heads per key's head, D features of a head,
Q query, U key, N scored token.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionType

from eggroll_llm.engine.memory import LOGITS_AT_ONCE
from eggroll_llm.engine.token_tree import TokenTree
from eggroll_llm.engine.vllm.layers import decoder_blocks
from eggroll_llm.errors import ModelError
from eggroll_llm.models.targets import block_of


class Scorer:
    """Scores with the weights, the slots and the tokens' slots as they are when it is called."""

    def __init__(self, model: Any, vllm_config: VllmConfig, first_block: int = 0) -> None:
        """Take a loaded model; members differ from `first_block` on."""
        self._model, self._vllm_config = model, vllm_config
        self._own_blocks = decoder_blocks(model)[first_block:] if first_block else []
        self._first_block = first_block if self._own_blocks else 0
        self._layers: dict[str, Any] = {
            name: layer
            for name, layer in vllm_config.compilation_config.static_forward_context.items()
            if isinstance(layer, AttentionLayerBase)
        }

    def check(self, remedy: str = ': use es.fitness_from = "rewards"') -> None:
        """Raise ModelError when the model's attention is of a kind that `_TreeAttention` does not compute."""
        for layer in self._layers.values():
            if kind := _unknown(layer):
                raise ModelError(f"this architecture's attention ({kind}) cannot score completions{remedy}")

    @torch.inference_mode()
    def logprobs(self, tree: TokenTree, members: int, temperature: float) -> Tensor:
        """Return float32 log-probabilities [M, N] of the tree's targets, of `members` copies of the tree in a row.

        Raises ModelError as `check` does, without a remedy.
        """
        self.check(remedy="")
        device = next(self._model.parameters()).device
        blocks = cache(partial(_blocks_on, tree, device))
        layers = {
            name: _TreeAttention(layer, blocks, members if block_of(name) >= self._first_block else 1)
            for name, layer in self._layers.items()
        }
        rows_R, targets = _targets(tree, members, device)
        copies = 1 if self._first_block else members
        token_T, depth_T = (t.repeat(copies).to(device) for t in (tree.token_T, tree.depth_T))
        context = set_forward_context(
            dict.fromkeys(layers), self._vllm_config, num_tokens=len(token_T), slot_mapping={}, skip_compiled=True
        )
        with self._attending(layers), self._parting(members), context, torch.compiler.set_stance("force_eager"):
            hidden = self._model(input_ids=token_T, positions=depth_T, intermediate_tensors=None, inputs_embeds=None)
        hidden_MTD = hidden.view(members, len(tree), -1)
        return self._of_targets(hidden_MTD[:, rows_R].flatten(0, 1), targets, temperature).view(members, -1)

    def _of_targets(self, hidden_RD: Tensor, targets: "_Targets", temperature: float) -> Tensor:
        rows = max(1, LOGITS_AT_ONCE // self._vllm_config.model_config.get_vocab_size())
        starts = range(0, len(hidden_RD), rows)
        bounds = torch.searchsorted(targets.sorted_N, torch.tensor([*starts, len(hidden_RD)])).tolist()
        row_N, target_N = targets.row_N, targets.target_N
        sorted_N = torch.empty(len(row_N), device=hidden_RD.device)
        for start, some in zip(starts, itertools.starmap(slice, itertools.pairwise(bounds)), strict=True):
            logits = self._model.compute_logits(hidden_RD[start : start + rows])
            if logits is None:  # on a rank but the first, whose logits are gathered there
                continue
            logits_RV = logits.float()
            if temperature != 1:
                logits_RV /= temperature
            norm_R, row = logits_RV.logsumexp(-1), row_N[some] - start
            sorted_N[some] = logits_RV[row, target_N[some]] - norm_R[row]
        return torch.empty_like(sorted_N).index_copy_(0, targets.place_N, sorted_N)

    @contextlib.contextmanager
    def _attending(self, layers: dict[str, "_TreeAttention"]) -> Iterator[None]:
        """Let layers attend as said; what vLLM has in their place is put back."""
        served = {name: self._layers[name].impl for name in layers}
        try:
            for name, attention in layers.items():
                self._layers[name].impl = attention
            yield
        finally:
            for name, impl in served.items():
                self._layers[name].impl = impl

    @contextlib.contextmanager
    def _parting(self, members: int) -> Iterator[None]:
        """Repeat the shared hidden states once per member before the first perturbed block."""

        def enter(block: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            position_T, *states_TD = inputs
            return position_T.repeat(members), *(state_TD.repeat(members, 1) for state_TD in states_TD)

        def follow(block: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            position_T, *states_TD = inputs
            return position_T.repeat(members), *states_TD

        with contextlib.ExitStack() as hooks:
            for i, block in enumerate(self._own_blocks):
                hooks.enter_context(block.register_forward_pre_hook(follow if i else enter))
            yield


@dataclass(frozen=True, eq=False)
class _Targets:
    """Tokens to be scored, in the order of the rows that predict them."""

    sorted_N: Tensor
    """Rows, in the memory of the processor, which would wait for a device to read its."""
    row_N: Tensor
    """The same on the device."""
    target_N: Tensor
    """The tokens."""
    place_N: Tensor
    """Where each stands in the tree."""


def _targets(tree: TokenTree, members: int, device: torch.device) -> tuple[Tensor, _Targets]:
    """Return the rows [R] of a tree that predict something, and what those of all members predict.

    Completions that are alike for a while are predicted by the same rows.
    """
    rows_R, row_of_N = torch.unique(tree.row_N, return_inverse=True)
    row_MN = torch.arange(members)[:, None] * len(rows_R) + row_of_N
    sorted_N, place_N = row_MN.flatten().sort()
    target_N = tree.target_N.repeat(members)[place_N]
    row_N, target_N, place_N = (x.to(device) for x in (sorted_N, target_N, place_N))
    return rows_R.to(device), _Targets(sorted_N=sorted_N, row_N=row_N, target_N=target_N, place_N=place_N)


@dataclass(frozen=True, eq=False)
class _Block:
    """A block of queries on the device of its layer."""

    queries: slice
    keys_U: Tensor
    mask_QU: Tensor
    """What the queries see."""


def _blocks_on(tree: TokenTree, device: torch.device, window: int | None) -> list[_Block]:
    return [
        _Block(slice(block.start, block.stop), block.keys_U.to(device), block.mask(window).to(device))
        for block in tree.blocks
    ]


def _unknown(layer: Any) -> str:
    """Return what an attention layer does beyond causal attention within a window; empty when nothing."""
    if type(layer) is not Attention or layer.attn_type != AttentionType.DECODER:
        return type(layer).__name__
    beyond = {
        "keys of another layer": layer.kv_sharing_target_layer_name,
        "quantized queries": layer.query_quant,
        **{name: getattr(layer.impl, name, None) for name in ("alibi_slopes", "logits_soft_cap", "sinks")},
    }
    return next((what for what, value in beyond.items() if isinstance(value, Tensor) or value), "")


class _TreeAttention:
    """Stands in for the implementation of an attention layer: copies of a tree attend, each within itself."""

    def __init__(self, layer: Any, blocks: Callable[[int | None], list[_Block]], members: int) -> None:
        impl = layer.impl
        self._scale, self._groups, self._members = float(impl.scale), impl.num_heads // impl.num_kv_heads, members
        self._blocks = blocks(layer.sliding_window)

    def forward(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, output: Tensor, **kwargs: Any
    ) -> Tensor:
        """Write the attention of query [MT, HG, D] over key and value [MT, H, D] into output [MT, HG, D]."""
        M, H, G = self._members, key.shape[1], self._groups
        # The queries' heads that share a head of the keys become more queries of it.
        query, output_MTHGD = (x.view(M, -1, H, G, x.shape[-1]) for x in (query, output))
        key, value = (x.view(M, -1, H, x.shape[-1]).transpose(1, 2) for x in (key, value))
        for block in self._blocks:
            attended = scaled_dot_product_attention(
                query[:, block.queries].permute(0, 2, 3, 1, 4).flatten(2, 3),
                key[:, :, block.keys_U],
                value[:, :, block.keys_U],
                attn_mask=block.mask_QU.repeat(G, 1),
                scale=self._scale,
            )
            output_MTHGD[:, block.queries] = attended.unflatten(2, (G, -1)).permute(0, 3, 1, 2, 4)
        return output
