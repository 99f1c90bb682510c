"""Layers of a module as members of the population compute them: row n of a batch with the weights of its member.

    linear       y_n = W x_n + b + A_s (B_s^T x_n) + b'_s
    embedding    y_n = W[x_n] + A_s[x_n] B_s^T
    norm         y_n = norm(x_n) (w + w'_s) + b + b'_s

s being the slot of the row's member, A_s with its sign and sigma / sqrt(r), and vectors w', b' the sums of the columns
of their A. The term of a linear layer is computed by the kernel that the LLM engine uses. In full rank, E is a vector
of as many values as W has, kept once for both twins, and y_n = W x_n + E_k (+-x_n).

Shapes: N row of a batch, T token (row times whatever lies between it and the features), S slot, K antithetic pair
(member when not antithetic), R rank, O out features, I in features, V value of a row of factors.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - as everybody calls it
from torch import Tensor, nn

from eggroll_llm.errors import PopulationError
from eggroll_llm.es.noise import NoiseSpec
from eggroll_llm.kernels.member_term import add_term
from eggroll_llm.kernels.noise import RowLayout, served_rows


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer with trained parameters."""

    name: str
    """Its name in the module; empty when it is the module."""
    module: nn.Module
    trained: Mapping[str, str]
    """Attribute, "weight" or "bias", -> name of the parameter."""


class Members:
    """What a batch needs of its members: the slot of each row, and the perturbations in the slots."""

    def __init__(
        self,
        members_N: Tensor,
        noise: NoiseSpec,
        layout: RowLayout,
        full_rank: Mapping[str, torch.Size],
        *,
        antithetic: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Make the noise of the member of each row, int64 on the CPU. `full_rank` has the sizes of such matrices."""
        members_S, slot_N = torch.unique(members_N, return_inverse=True)
        pairs_K, row_S = torch.unique(members_S // 2 if antithetic else members_S, return_inverse=True)
        rows_KV, row_S = served_rows(noise, pairs_K, layout, dtype, device), row_S.to(device)
        sign_S = (1 - 2 * (members_S % 2 if antithetic else torch.zeros_like(members_S))).to(device, dtype)
        self.slot_N = slot_N.to(device, torch.int32)
        self.pair_N, self.sign_N = row_S[self.slot_N], sign_S[self.slot_N]
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}
        """A [S, R * O] and B [S, 1, R, I] of matrices in low rank, as `add_term` takes them."""
        self.vectors: dict[str, Tensor] = {}
        """Perturbations [S, O]."""
        self.matrices: dict[str, Tensor] = {}
        """Perturbations [K, O, I] in full rank, without the sign of a member."""
        starts = layout.starts()
        for name, out, inside in layout.shapes:
            at_A, at_B = starts[name]
            A_KV = rows_KV[:, at_A : at_A + layout.rank * out]
            if name in full_rank:
                self.matrices[name] = A_KV.unflatten(1, full_rank[name])
                continue
            A_SV = A_KV[row_S] * sign_S[:, None]
            if inside:
                B_SV = rows_KV[:, at_B : at_B + layout.rank * inside][row_S]
                self.factors[name] = A_SV, B_SV.unflatten(1, (1, layout.rank, inside))
            else:
                self.vectors[name] = _wide(A_SV).unflatten(1, (layout.rank, out)).sum(1)  # as the update adds them
        self.called: set[str] = set()
        """Layers that have computed."""
        self._slots_of_tokens: dict[int, Tensor] = {}
        self._moved: dict[str, Tensor] = {}

    def tokens(self, layer: Layer, x: Tensor, features: int) -> int:
        """Return how many tokens each row of a layer's input has, whose last `features` dimensions are features.

        Raises PopulationError when its rows are not those of the members.
        """
        self.called.add(layer.name)
        rows = len(self.slot_N)
        if x.ndim <= features or len(x) != rows:
            raise PopulationError(
                f"layer {layer.name!r} got a batch of shape {[*x.shape]} inside ask() of {rows} members: its first "
                "dimension must be theirs, one row each. To give a member several rows, ask for it several times"
            )
        return math.prod(x.shape[1 : x.ndim - features])

    def slots_of_tokens(self, tokens: int) -> Tensor:
        """Return the slot of each token, int32, where each row has so many."""
        if tokens not in self._slots_of_tokens:
            self._slots_of_tokens[tokens] = self.slot_N.repeat_interleave(tokens)
        return self._slots_of_tokens[tokens]

    @cached_property
    def stretches(self) -> list[tuple[slice, slice]]:
        """Return rows and their pairs, in stretches of as many rows to a pair; none where rows are not in order."""
        if bool((self.pair_N.diff() < 0).any()):
            return []
        each_K, result, row, pair = torch.bincount(self.pair_N), [], 0, 0
        values, counts = (found.tolist() for found in torch.unique_consecutive(each_K, return_counts=True))
        for each, pairs in zip(values, counts, strict=True):
            result.append((slice(row, row + each * pairs), slice(pair, pair + pairs)))
            row, pair = row + each * pairs, pair + pairs
        return result

    def vector(self, layer: Layer, attribute: str, like: Tensor) -> Tensor | None:
        """Return a weight or bias of a layer that is a vector, for each row where it is trained; None for none.

        It broadcasts with a batch like `like`, and is in float32 at least: beside a weight of 1, bfloat16 would round
        most of a small perturbation away, and noise alone would move the weight.
        """
        plain: Tensor | None = getattr(layer.module, attribute)
        name = layer.trained.get(attribute)
        if plain is None or name is None:
            return plain
        if name not in self._moved:
            self._moved[name] = (_wide(plain) + _wide(self.vectors[name]).view(-1, *plain.shape))[self.slot_N]
        own = self._moved[name]
        return own.view(len(own), *[1] * (like.ndim - own.ndim), *own.shape[1:])


def _linear(layer: Layer, members: Members, x: Tensor) -> Tensor:
    module: Any = layer.module
    tokens = members.tokens(layer, x, 1)
    y = F.linear(x, module.weight).contiguous()
    name = layer.trained.get("weight", "")
    if name in members.factors:
        A_SV, B_SCRI = members.factors[name]
        x_TI, y_TO = x.reshape(-1, x.shape[-1]).contiguous(), y.view(-1, y.shape[-1])
        add_term(y_TO, x_TI, A_SV, B_SCRI, members.slots_of_tokens(tokens), (y.shape[-1],))
    elif name:
        E_KOI, signed = members.matrices[name], x * members.sign_N.view(-1, *[1] * (x.ndim - 1))
        for rows, pairs in members.stretches or [(slice(None), members.pair_N)]:
            E = E_KOI[pairs]  # once for all rows of a pair, where they lie together
            y[rows].view(len(E), -1, y.shape[-1]).baddbmm_(signed[rows].reshape(len(E), -1, x.shape[-1]), E.mT)
    bias = members.vector(layer, "bias", y)
    return y if bias is None else y.add_(bias)


def _embedding(layer: Layer, members: Members, x: Tensor) -> Tensor:
    module: Any = layer.module
    tokens = members.tokens(layer, x, 0)
    y, name = F.embedding(x, module.weight), layer.trained["weight"]
    if name in members.matrices:
        E_TI = members.matrices[name][members.pair_N.repeat_interleave(tokens), x.flatten()]
        return y.add_((E_TI * members.sign_N.repeat_interleave(tokens)[:, None]).view(y.shape))
    A_SV, B_SCRI = members.factors[name]
    rank = B_SCRI.shape[2]
    slot_T = members.slots_of_tokens(tokens)
    h_NTR = A_SV.unflatten(1, (rank, -1))[slot_T, :, x.flatten()].view(len(x), -1, rank)
    y.view(len(x), -1, y.shape[-1]).baddbmm_(h_NTR, B_SCRI[members.slot_N, 0])
    return y


def _norm(layer: Layer, members: Members, x: Tensor) -> Tensor:
    module: Any = layer.module
    size = module.normalized_shape
    members.tokens(layer, x, len(size))
    if isinstance(module, nn.LayerNorm):
        y, bias = F.layer_norm(_wide(x), size, None, None, module.eps), members.vector(layer, "bias", x)
    else:
        y, bias = F.rms_norm(_wide(x), size, None, module.eps), None
    weight = members.vector(layer, "weight", x)
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(x.dtype)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


FORWARD: dict[type[nn.Module], Callable[[Layer, Members, Tensor], Tensor]] = {
    nn.Linear: _linear,
    nn.Embedding: _embedding,
    nn.LayerNorm: _norm,
    nn.RMSNorm: _norm,
}
"""How members compute each kind of layer."""
MATRICES = (nn.Linear, nn.Embedding)
"""Those whose weight is a matrix, perturbed in low rank."""


def forward_of(layer: Layer, members: Members) -> Callable[[Tensor], Tensor]:
    """Return the forward pass of a layer for the rows of members."""
    return partial(FORWARD[type(layer.module)], layer, members)
