"""How master weights are kept between updates: as float32, or split between the served bfloat16 and 16 bits more.

The upper half of a float32 is a bfloat16. Read the lower half as a signed number L, and the upper half is rounded:

    L = (bits + 2^15) mod 2^16 - 2^15,    U = (bits - L) / 2^16,    bits = 2^16 U + L

U, read as a bfloat16, is the master rounded to nearest, halves away from zero. So the served weight and two bytes more
are the float32 master, bit for bit, without a copy of its own. Departure from Split-SGD (Kalamkar et al., arXiv
2005.04680): there the upper half is cut off, which would serve weights that are too small.

Offloaded, what is not served stays in the host's memory and passes through the device one weight at a time. Where
masters are kept changes no bits; how they are kept changes how halves are rounded, about one served weight in 2^17.

Shapes: O out features, I in features.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

CHUNK_BYTES = 1 << 30


class HostMemory:
    """Memory of the host, page-locked where a GPU copies from it, in chunks that tensors share.

    torch rounds a page-locked allocation up to a power of two, which for a tensor each could double the memory.
    """

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._chunks: list[tuple[Tensor, int]] = []

    def empty_like(self, tensor: Tensor) -> Tensor:
        """Return memory for a tensor of this shape and format."""
        size = -(-tensor.nbytes // 64) * 64
        for i, (chunk, used) in enumerate(self._chunks):  # noqa: B007 - the first that has room, else the new one
            if used + size <= len(chunk):
                break
        else:
            i, used = len(self._chunks), 0
            bytes_ = max(CHUNK_BYTES, 1 << (size - 1).bit_length())
            chunk = torch.empty(bytes_, dtype=torch.uint8, pin_memory=self._pinned)
            self._chunks.append((chunk, 0))
        self._chunks[i] = chunk, used + size
        return chunk[used : used + tensor.nbytes].view(tensor.dtype).view(tensor.shape)


def split(master: Tensor, upper: Tensor, lower: Tensor) -> None:
    """Write a float32 master into its halves, bfloat16 and int16. The master is used up: its memory is worked in."""
    bits = master.view(torch.int32)
    low = bits.to(torch.int16)
    lower.copy_(low)
    upper.view(torch.int16).copy_(bits.sub_(low).bitwise_right_shift_(16))


def join(upper: Tensor, lower: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the float32 master of two halves, in `out` where it is given."""
    master = torch.empty(upper.shape, device=upper.device) if out is None else out
    bits = master.view(torch.int32)
    bits.copy_(upper.view(torch.int16)).bitwise_left_shift_(16).add_(lower.to(bits.device))
    return master


class Storage(Protocol):
    """Masters between updates."""

    rounds_to_even: bool
    """The served weight is torch's rounding of the master, so that a fold may write it."""

    def take(self, name: str, work: Tensor) -> Tensor:
        """Return a master to be changed, float32 on its device: itself, or a copy in the flat buffer `work`."""
        ...

    def put(self, name: str, master: Tensor) -> None:
        """Keep what `take` returned and what was made of it; it must not be used any more."""
        ...

    def served(self, name: str) -> Tensor:
        """Return the weight as it is served; it may be what is kept: leave it alone."""
        ...

    def rows(self, every: int) -> list[Tensor]:
        """Return a flat float32 copy of every n-th row of each master."""
        ...

    def whole(self, name: str) -> Tensor:
        """Return a master, float32: what is kept, or where there is no such, a copy in the host's memory."""
        ...


class WholeMasters:
    """Float32 copies of the weights, of which the rounding is served."""

    rounds_to_even = True

    def __init__(
        self, weights: Mapping[str, Tensor], device: torch.device, served_dtype: torch.dtype, host: HostMemory | None
    ) -> None:
        """Copy the weights to the device, or into the host's memory."""
        self._served_dtype, self._offloaded = served_dtype, host is not None
        self._masters = {}
        for name, weight in weights.items():
            master = weight.detach().to("cpu" if host else device, torch.float32, copy=True).contiguous()
            self._masters[name] = host.empty_like(master).copy_(master) if host else master

    def take(self, name: str, work: Tensor) -> Tensor:
        master = self._masters[name]
        return in_buffer(work, master).copy_(master, non_blocking=True) if self._offloaded else master

    def put(self, name: str, master: Tensor) -> None:
        if master is not self._masters[name]:
            self._masters[name].copy_(master)

    def served(self, name: str) -> Tensor:
        return self._masters[name].to(self._served_dtype)

    def rows(self, every: int) -> list[Tensor]:
        return [master[::every].flatten().clone() for master in self._masters.values()]

    def whole(self, name: str) -> Tensor:
        return self._masters[name]


class SplitMasters:
    """The served weights themselves, and the lower halves of their masters."""

    rounds_to_even = False

    def __init__(self, weights: Mapping[str, Tensor], device: torch.device, host: HostMemory | None) -> None:
        """Take over the weights, bfloat16, those on the device as they are: an update changes them in place."""
        self._upper = {name: weight.detach().to(device) for name, weight in weights.items()}
        self._lower = {}
        for name, weight in self._upper.items():
            lower = torch.zeros(weight.shape, dtype=torch.int16, device="cpu" if host else weight.device)
            self._lower[name] = host.empty_like(lower).zero_() if host else lower

    def take(self, name: str, work: Tensor) -> Tensor:
        return join(self._upper[name], self._lower[name], in_buffer(work, self._upper[name]))

    def put(self, name: str, master: Tensor) -> None:
        split(master, self._upper[name], self._lower[name])

    def served(self, name: str) -> Tensor:
        return self._upper[name]

    def rows(self, every: int) -> list[Tensor]:
        return [join(upper[::every], self._lower[name][::every]).flatten() for name, upper in self._upper.items()]

    def whole(self, name: str) -> Tensor:
        return join(self._upper[name], self._lower[name]).cpu()


def in_buffer(buffer: Tensor, like: Tensor) -> Tensor:
    """Return the front of a flat buffer in the shape of a tensor."""
    return buffer[: like.numel()].view(like.shape)
