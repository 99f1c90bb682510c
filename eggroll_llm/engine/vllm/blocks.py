"""The population's arithmetic on a GPU: member terms, on the way through norms and activations where a model is known.

A decoder block of Llama, Mistral, Qwen2 or Qwen3 in vLLM is

    input norm -> qkv -> rotary, attention -> o -> norm -> gate and up -> activation -> down -> next block's norm

Each linear layer needs h = B^T x of its input, and A h added to its output. The norms and the activation do both
(`kernels/norms_triton.py`): they make h for the layer after them and finish the output of the layer before them. That
leaves two launches a block that a plain model does not have, A h for qkv and h for o, instead of eight. What one module
makes for another travels in `_Carried`, so that h which nobody made is a KeyError and not a wrong answer.

Where ranks have parts of the layers, o and down sum their outputs over the ranks before the norm sees them. So their
terms are added before that sum, to which every rank brings A h of its part of x, by two launches more a block.

Every other model gets the two launches per layer, and its norms and activations stay as vLLM has them.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm

from eggroll_llm.engine.vllm.layers import Layer, decoder_blocks
from eggroll_llm.kernels.member_term_triton import expand, shrink
from eggroll_llm.kernels.norms_triton import Factors, rms_norm, silu_and_mul


def install(model: torch.nn.Module, layers: Sequence[Layer], slot_T: Tensor) -> None:
    """Make every layer of `layers` compute with its members' terms; `slot_T` is the slot of each token."""
    linears = {id(layer.module): _Linear(layer, slot_T) for layer in layers}
    blocks = _blocks(model, linears)
    for block in blocks:
        block.install()
    fused = {linear for block in blocks for linear in block.linears}
    for linear in linears.values():
        if linear not in fused:
            linear.module.apply = linear.with_term


class _Linear:
    """A linear layer and where its members' factors are."""

    def __init__(self, layer: Layer, slot_T: Tensor) -> None:
        self.module = layer.module
        (B_SCRI,), (A_SV,) = layer.module.lora_a_stacked, layer.module.lora_b_stacked
        self.factors = Factors(A_SV, B_SCRI, slot_T, tuple(layer.sizes))

    def plain(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return x W^T + bias."""
        base_layer = self.module.base_layer
        y: Tensor = base_layer.quant_method.apply(base_layer, x, bias)
        return y

    def shrink(self, x: Tensor) -> Tensor:
        """Return h_TCR for x [..., I]."""
        return shrink(x.reshape(-1, x.shape[-1]).contiguous(), self.factors.B_SCRI, self.factors.slot_T)

    def expand(self, y: Tensor, h_TCR: Tensor) -> None:
        """Add the term to y [..., O], contiguous, in place."""
        factors = self.factors
        expand(y.view(-1, y.shape[-1]), h_TCR, factors.A_SV, factors.slot_T, factors.slices)

    def with_term(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return x W^T + bias + A_s (B_s^T x), x being [T, I] or, from the Transformers backend, [1, T, I]."""
        y = self.plain(x, bias)
        self.expand(y, self.shrink(x))
        return y


_Carried = dict[_Linear, Tensor]
"""h of a linear layer's input, from the module that made it to the one that uses it."""


class _Block:
    """A decoder block whose norms and activation take part in the terms of its linear layers."""

    def __init__(self, block: Any, linears: Mapping[int, _Linear], carried: _Carried) -> None:
        self.norms = block.input_layernorm, block.post_attention_layernorm
        self.activation = block.mlp.act_fn
        modules = block.self_attn.qkv_proj, block.self_attn.o_proj, block.mlp.gate_up_proj, block.mlp.down_proj
        self.qkv, self.o, self.gate_up, self.down = self.linears = [linears[id(module)] for module in modules]
        self.carried = carried
        self.before: _Linear | None = None
        """The last linear layer of the block before, if this one's norm adds its term."""
        self.summed = is_summed(self.down)

    def install(self) -> None:
        """Replace the forward of its modules, on the instances."""
        first, second = self.norms
        first._forward_method = _norm(first, self.carried, self.before, self.qkv)
        second._forward_method = _norm(second, self.carried, None if self.summed else self.o, self.gate_up)
        self.activation._forward_method = self._activate
        self.qkv.module.apply = partial(self._finish, self.qkv)
        self.o.module.apply = self.o.with_term if self.summed else self._o
        self.gate_up.module.apply = self.gate_up.plain
        self.down.module.apply = partial(self._finish, self.down) if self.summed else self.down.plain

    def _o(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        self.carried[self.o] = self.o.shrink(x)
        return self.o.plain(x, bias)

    def _finish(self, linear: _Linear, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = linear.plain(x, bias)
        linear.expand(y, self.carried.pop(linear))
        return y

    def _activate(self, y: Tensor) -> Tensor:
        x, h_TCR = silu_and_mul(y, (self.gate_up.factors, self.carried.pop(self.gate_up)), self.down.factors)
        assert h_TCR is not None
        self.carried[self.down] = h_TCR
        return x


def is_summed(linear: _Linear) -> bool:
    """Return whether ranks have parts of a layer's in features, over which vLLM sums what they compute."""
    return bool(linear.module.tp_size > 1)


def _norm(module: Any, carried: _Carried, before: _Linear | None, after: _Linear | None) -> Callable[..., Any]:
    def forward(y: Tensor, residual: Tensor | None = None) -> Any:
        term = None if before is None else (before.factors, carried.pop(before))
        x, h_TCR = rms_norm(
            y, residual, module.weight, module.variance_epsilon, term, None if after is None else after.factors
        )
        if after is not None and h_TCR is not None:
            carried[after] = h_TCR
        return x if residual is None else (x, residual)

    return forward


def _blocks(model: torch.nn.Module, linears: Mapping[int, _Linear]) -> list[_Block]:
    """Return the perturbed blocks of a known model, each knowing the one before it; else none.

    The norm after the last of them finishes its output.
    """
    body: Any = getattr(model, "model", None)
    decoders = decoder_blocks(model)
    carried: _Carried = {}
    if not decoders:
        return []
    norms = [norm for block in decoders for norm in (block.input_layernorm, block.post_attention_layernorm)]
    for norm in (*norms, body.norm):
        if type(norm) is not RMSNorm or not norm.has_weight or norm.variance_size_override is not None:
            return []
    if any(type(block.mlp.act_fn) is not SiluAndMul for block in decoders):
        return []
    perturbed = [i for i, block in enumerate(decoders) if id(block.mlp.down_proj) in linears]
    blocks = [_Block(decoders[i], linears, carried) for i in perturbed]
    for block, after in pairwise(blocks):
        after.before = None if block.summed else block.down
    last = blocks[-1]
    norm = decoders[perturbed[-1] + 1].input_layernorm if perturbed[-1] + 1 < len(decoders) else body.norm
    norm._forward_method = _norm(norm, carried, None if last.summed else last.down, None)
    return blocks
