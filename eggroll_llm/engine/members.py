"""Which member lives in which slot, and the factors that are written there.

vLLM's scheduler decides which members take part in a forward pass (at most as many as there are slots). `place` then
gives each newcomer a slot that no running member uses and writes its A and B into it: noise is regenerated or taken
from the step's bank, nothing is read from disk, and a population larger than the slots needs no barrier.

Shapes: S slot, M member, K pair, C slice, R rank, O out features of all slices, I in features.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from eggroll_llm.engine.layers import Layer, parameter_shapes
from eggroll_llm.engine.native_noise import served_factors_of
from eggroll_llm.noise import NoiseSpec, Shape

BANK_BYTES = 512 << 20  # factors of a whole population are kept for the step when they fit in this

Factors = dict[str, tuple[Tensor, Tensor]]


class FactorBank:
    """Factors by pair: kept for the whole step when they fit `BANK_BYTES`, else regenerated, to the same bits."""

    def __init__(self, layers: Sequence[Layer], dtype: torch.dtype, device: torch.device) -> None:
        self.shapes = parameter_shapes(layers)
        self.dtype, self.device = dtype, device
        self._noise: NoiseSpec | None = None
        self._pairs = 0
        self._kept: Factors | None = None

    def begin(self, noise: NoiseSpec, pairs: int) -> None:
        """Take the noise of a step; nothing is generated when it is the noise already held."""
        if (noise, pairs) == (self._noise, self._pairs):
            return
        self._noise, self._pairs, self._kept = noise, pairs, None
        width = sum(out + inside for _, out, inside in self.shapes)
        if pairs * width * noise.rank * self.dtype.itemsize <= BANK_BYTES:
            self._kept = served_factors_of(noise, torch.arange(pairs), self.shapes, self.dtype, self.device)

    def of(self, pairs_K: Tensor) -> Factors:
        """Return A_KOR and B_KIR of pairs of this step, by parameter name."""
        assert self._noise is not None, "begin() comes before the first member"
        return self.factors_of(self._noise, pairs_K, self.shapes, self.dtype, self.device)

    def factors_of(
        self,
        noise: NoiseSpec,
        pairs_K: Tensor,
        shapes: Sequence[Shape],
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> Factors:
        """Stand in for `served_factors_of`, answering from what is kept when that is what is asked for."""
        if self._kept is None or noise != self._noise or int(pairs_K.max()) >= self._pairs or dtype != self.dtype:
            return served_factors_of(noise, pairs_K, shapes, dtype, device)
        first = int(pairs_K[0])
        if torch.equal(pairs_K, torch.arange(first, first + len(pairs_K))):
            rows_K: Tensor | slice = slice(first, first + len(pairs_K))  # a view; an index makes a copy
        else:
            rows_K = pairs_K.to(self.device)
        return {name: (self._kept[name][0][rows_K], self._kept[name][1][rows_K]) for name, _, _ in shapes}


class MemberSlots:
    """Slots of the adapted layers and the members in them."""

    def __init__(self, layers: Sequence[Layer], bank: FactorBank, slots: int, rank: int) -> None:
        self.layers, self.bank, self.rank = layers, bank, rank
        self.antithetic = True
        self.member_in: list[int | None] = [None] * slots
        if bank.device.type == "cpu":
            self._use_compact_buffers()

    def begin(self, *, antithetic: bool) -> None:
        """Empty the slots for another population."""
        self.antithetic = antithetic
        self.member_in = [None] * len(self.member_in)

    def place(self, members: Collection[int]) -> bool:
        """Make every given member resident, in slots that none of the others needs; return whether anything moved."""
        newcomers = sorted(set(members).difference(self.member_in))
        if not newcomers:
            return False
        free = [slot for slot, member in enumerate(self.member_in) if member not in members]
        slots = free[: len(newcomers)]
        self._write(slots, newcomers)
        for slot, member in zip(slots, newcomers, strict=True):
            self.member_in[slot] = member
        return True

    def _write(self, slots: list[int], members: list[int]) -> None:
        per_pair = 2 if self.antithetic else 1
        pairs_K, row_M = torch.unique(torch.tensor(members) // per_pair, return_inverse=True)
        sign_M = torch.tensor([-1.0 if self.antithetic and member % 2 else 1.0 for member in members])
        sign_M = sign_M.to(self.bank.device, self.bank.dtype)
        factors = self.bank.of(pairs_K)
        for layer in self.layers:
            for c, (parameter, begin, end) in enumerate(layer.slices()):
                A_KOR, B_KIR = factors[parameter]
                self._write_slice(layer, c, begin, end, slots, A_KOR[row_M] * sign_M[:, None, None], B_KIR[row_M])

    def _write_slice(
        self, layer: Layer, c: int, begin: int, end: int, slots: list[int], A_MOR: Tensor, B_MIR: Tensor
    ) -> None:
        if self.bank.device.type == "cpu":
            layer.module.lora_a_stacked[0][slots, c] = B_MIR.transpose(1, 2)
            layer.module.lora_b_stacked[0][slots, :, begin:end] = A_MOR.transpose(1, 2)
        else:  # vLLM's own kernels and buffers: [S, 1, padded rank, I] and [S, 1, O of the slice, padded rank]
            layer.module.lora_a_stacked[c][slots, 0, : self.rank] = B_MIR.transpose(1, 2)
            layer.module.lora_b_stacked[c][slots, 0, :, : self.rank] = A_MOR

    def _use_compact_buffers(self) -> None:
        """Replace vLLM's buffers, which pad the rank, by B_SCRI and A_SRO at the exact rank (for `member_term`)."""
        slots = len(self.member_in)
        for layer in self.layers:
            B_SCRI = torch.zeros(slots, len(layer.sizes), self.rank, layer.in_features, dtype=self.bank.dtype)
            A_SRO = torch.zeros(slots, self.rank, sum(layer.sizes), dtype=self.bank.dtype)
            layer.module.lora_a_stacked, layer.module.lora_b_stacked = (B_SCRI,), (A_SRO,)
