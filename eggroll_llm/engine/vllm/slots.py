"""Which member lives in which slot, and the factors that are written there.

vLLM's scheduler decides which members take part in a forward pass (at most as many as there are slots). `place` then
gives each newcomer a slot that no running member uses and writes its A and B into it: noise is regenerated or taken
from the step's bank, nothing is read from disk, and a population larger than the slots needs no barrier. `SlotOfTokens`
says for each token of the pass whose it is.

Shapes: S slot, M member, K pair, C slice, R rank, O out features of all slices, I in features, V value of a row,
T token, Q request.
"""

from collections.abc import Collection, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from eggroll_llm.engine.vllm.layers import Layer, parameter_parts, parameter_shapes
from eggroll_llm.es.noise import KEPT_BYTES, NoiseSpec, Shape
from eggroll_llm.kernels.noise import RowLayout, fill, place, served_factors_of, served_rows

Factors = dict[str, tuple[Tensor, Tensor]]


class FactorBank:
    """Factors by pair: on a CPU kept for the whole step when they fit `KEPT_BYTES`, else regenerated, to the same bits.

    On a GPU nothing is kept: factors are made where they are needed, faster than they could be copied by much.
    """

    def __init__(self, layers: Sequence[Layer], rank: int, dtype: torch.dtype, device: torch.device) -> None:
        self.shapes = parameter_shapes(layers)
        parts = parameter_parts(layers)
        cut = any(part.parts > 1 for part in parts.values())
        self._offset_of = {name: part.offset for name, part in parts.items()} if cut else {}
        self.layout = RowLayout(tuple(self.shapes), rank, tuple(self._offset_of.values()))
        self.dtype, self.device = dtype, device
        self._noise: NoiseSpec | None = None
        self._pairs = 0
        self._rows_KV: Tensor | None = None
        self._kept: Factors | None = None

    def begin(self, noise: NoiseSpec, pairs: int) -> None:
        """Take the noise of a step; nothing is generated when it is the noise already held."""
        if (noise, pairs) == (self._noise, self._pairs):
            return
        self._noise = None  # until all of it is there
        if self.device.type != "cpu" or pairs * self.layout.width * self.dtype.itemsize > KEPT_BYTES:
            self._rows_KV = self._kept = None
        else:
            if self._rows_KV is None or len(self._rows_KV) != pairs:
                self._rows_KV = self._kept = None
                self._rows_KV = torch.empty(pairs, self.layout.width, dtype=self.dtype)
                self._kept = self.layout.factors(self._rows_KV)
            fill(self._rows_KV, noise, torch.arange(pairs), self.layout)
        self._noise, self._pairs = noise, pairs

    def rows_of(self, pairs_M: Tensor) -> Tensor:
        """Return a row for each pair of this step [M, V], on the CPU."""
        if self._rows_KV is not None:
            return self._rows_KV[pairs_M]
        pairs_K, row_M = torch.unique(pairs_M, return_inverse=True)
        return served_rows(self.noise, pairs_K, self.layout, self.dtype)[row_M]

    def of(self, pairs_K: Tensor) -> Factors:
        """Return A_KOR and B_KIR of pairs of this step, by parameter name."""
        return self.factors_of(self.noise, pairs_K, self.shapes, self.dtype, self.device)

    def factors_of(
        self,
        noise: NoiseSpec,
        pairs_K: Tensor,
        shapes: Sequence[Shape],
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> Factors:
        """Stand in for `noise.served_factors_of`, answering from what is kept when that is what is asked for."""
        if self._kept is None or noise != self._noise or int(pairs_K.max()) >= self._pairs or dtype != self.dtype:
            offsets = [self._offset_of[name] for name, _, _ in shapes] if self._offset_of else []
            return served_factors_of(noise, pairs_K, shapes, dtype, device, offsets)
        if torch.equal(pairs_K, torch.arange(self._pairs)):
            return {name: self._kept[name] for name, _, _ in shapes}
        first = int(pairs_K[0])
        if torch.equal(pairs_K, torch.arange(first, first + len(pairs_K))):
            rows_K: Tensor | slice = slice(first, first + len(pairs_K))  # a view; an index makes a copy
        else:
            rows_K = pairs_K
        return {name: (self._kept[name][0][rows_K], self._kept[name][1][rows_K]) for name, _, _ in shapes}

    @property
    def noise(self) -> NoiseSpec:
        """Return the noise of this step."""
        assert self._noise is not None, "begin() comes before the first member"
        return self._noise


class Buffers(Protocol):
    """Where the factors of resident members are."""

    def write(self, slots: list[int], pairs_M: Tensor, negative_M: Tensor) -> None:
        """Put pairs of this step into slots, with A negated where `negative_M` is True."""
        ...


class RowBuffers:
    """Slots as `member_term` reads them: a row of factors each, at the exact rank. The layers have views of it."""

    def __init__(self, layers: Sequence[Layer], bank: FactorBank, slots: int) -> None:
        self._bank, layout = bank, bank.layout
        self._rows_SV = torch.zeros(slots, layout.width, dtype=bank.dtype, device=bank.device)
        starts = layout.starts()
        for layer in layers:
            at_A, at_B = starts[layer.parameters[0]]
            size_A, size_B = layout.rank * sum(layer.sizes), layout.rank * len(layer.sizes) * layer.in_features
            B_SCRI = self._rows_SV[:, at_B : at_B + size_B].unflatten(1, (len(layer.sizes), layout.rank, -1))
            layer.module.lora_a_stacked, layer.module.lora_b_stacked = (
                (B_SCRI,),
                (self._rows_SV[:, at_A : at_A + size_A],),
            )

    def write(self, slots: list[int], pairs_M: Tensor, negative_M: Tensor) -> None:
        """Copy one row for each member."""
        self._rows_SV[slots] = self._bank.rows_of(pairs_M)
        for slot, negative in zip(slots, negative_M.tolist(), strict=True):
            if negative:
                self._rows_SV[slot, : self._bank.layout.a_width].neg_()


class GpuRowBuffers(RowBuffers):
    """The same rows on a GPU, where the kernel of the noise writes a member's factors into its slot."""

    def write(self, slots: list[int], pairs_M: Tensor, negative_M: Tensor) -> None:
        """Make the factors of each member in its row."""
        place(self._rows_SV, torch.tensor(slots), self._bank.noise, pairs_M, negative_M, self._bank.layout)


class PaddedBuffers:
    """vLLM's own buffers, for its own kernels: [S, 1, padded rank, I] and [S, 1, O of the slice, padded rank]."""

    def __init__(self, layers: Sequence[Layer], bank: FactorBank, slots: int) -> None:
        self._layers, self._bank = layers, bank

    def write(self, slots: list[int], pairs_M: Tensor, negative_M: Tensor) -> None:
        """Copy A and B of every slice."""
        rank, device = self._bank.layout.rank, self._bank.device
        pairs_K, row_M = torch.unique(pairs_M, return_inverse=True)
        sign_M = torch.where(negative_M, -1.0, 1.0).to(device, self._bank.dtype)
        factors = self._bank.of(pairs_K)
        for layer in self._layers:
            for c, parameter in enumerate(layer.parameters):
                A_KOR, B_KIR = factors[parameter]
                layer.module.lora_a_stacked[c][slots, 0, :rank] = B_KIR[row_M].transpose(1, 2)
                layer.module.lora_b_stacked[c][slots, 0, :, :rank] = A_KOR[row_M] * sign_M[:, None, None]


class MemberSlots:
    """The members in the slots."""

    def __init__(self, buffers: Buffers, slots: int) -> None:
        self._buffers = buffers
        self.antithetic = True
        self.member_in: list[int | None] = [None] * slots
        self._slot_of_member = np.array([-1], np.int32)
        """Ends with -1, so that index -1, the base model, gives -1."""

    def begin(self, *, antithetic: bool) -> None:
        """Empty the slots for another population."""
        self.antithetic = antithetic
        self.member_in = [None] * len(self.member_in)

    def slots_of(self, member_Q: np.ndarray) -> np.ndarray:
        """Return the slot of each member, int32, -1 for the base model (-1); those without a slot get one."""
        self.place({member for member in np.unique(member_Q).tolist() if member >= 0})
        return self._slot_of_member[member_Q]

    def place(self, members: Collection[int]) -> bool:
        """Make every given member resident, in slots that none of the others needs; return whether anything moved."""
        newcomers = sorted(set(members).difference(self.member_in))
        if not newcomers:
            return False
        free = [slot for slot, member in enumerate(self.member_in) if member not in members]
        slots = free[: len(newcomers)]
        members_M = torch.tensor(newcomers)
        if self.antithetic:
            self._buffers.write(slots, members_M // 2, members_M % 2 == 1)
        else:
            self._buffers.write(slots, members_M, torch.zeros(len(members_M), dtype=torch.bool))
        for slot, member in zip(slots, newcomers, strict=True):
            self.member_in[slot] = member
        resident = {member: slot for slot, member in enumerate(self.member_in) if member is not None}
        self._slot_of_member = np.full(max(resident) + 2, -1, np.int32)
        self._slot_of_member[list(resident)] = list(resident.values())
        return True


class SlotOfTokens:
    """The slot of each token of a forward pass, in memory that captured graphs read."""

    def __init__(self, max_tokens: int, device: torch.device) -> None:
        self.slot_T = torch.full((max_tokens,), -1, dtype=torch.int32, device=device)

    def write(self, slot_Q: np.ndarray, tokens_Q: np.ndarray) -> None:
        """Give request q's slot, -1 for the base model, to its `tokens_Q[q]` tokens; what follows them has none."""
        slots = torch.full(self.slot_T.shape, -1, dtype=torch.int32, pin_memory=self.slot_T.is_cuda)
        slot_T = slot_Q.repeat(tokens_Q)
        slots[: len(slot_T)] = torch.from_numpy(slot_T)
        self.slot_T.copy_(slots, non_blocking=True)  # in the order of the stream: the pass before may still run
