"""Tensor parallelism: what a rank, one device of an engine, holds of each parameter, and the whole of all parts.

vLLM cuts q, k, v, gate and up by rows, o and down by columns; where there are fewer heads of k and v than ranks,
several hold the same rows. Noise, masters, optimizer state and update are those of the part. Their bits are those of
one device, since each entry of an estimate is a sum over pairs of one entry of A times one of B. Whole weights are
gathered one at a time on the first rank, for a checksum, an export or a checkpoint, so none of these depends on the
number of ranks.
"""

import atexit
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from vllm.distributed import get_tp_group

from eggroll_llm.config.schema import EngineConfig
from eggroll_llm.es.noise import Offset
from eggroll_llm.system.hardware import cores, serves_on_cpu
from eggroll_llm.system.processes import end_with_parent


@dataclass(frozen=True, kw_only=True)
class Part:
    """One of several equal parts of a parameter [out features, in features], or all of it."""

    shape: tuple[int, int]
    """Of the whole."""
    axis: int = 0
    """What it is cut along: 0 the rows, 1 the columns."""
    index: int = 0
    """Which part this is."""
    parts: int = 1
    """How many there are."""

    def of(self, whole: Tensor) -> Tensor:
        """Return this part of a whole, itself where there is one. What is not of the whole's shape stays as it is."""
        if self.parts == 1 or whole.shape != self.shape:
            return whole
        return whole.chunk(self.parts, self.axis)[self.index].clone()

    @property
    def size(self) -> tuple[int, int]:
        """Return the out and in features of the part."""
        out, inside = self.shape
        return (out // self.parts, inside) if self.axis == 0 else (out, inside // self.parts)

    @property
    def offset(self) -> Offset:
        """Return where its rows of A and of B begin in the stream of the parameter's noise."""
        first = self.index * self.size[self.axis]
        return (first, self.shape[0]) if self.axis == 0 else (0, self.shape[0] + first)


class Ranks:
    """The ranks of this engine, seen from one of them."""

    def __init__(self, parts: Mapping[str, Part], device: torch.device) -> None:
        self._group = get_tp_group()
        self._parts, self._device, self._size = parts, device, self._group.world_size
        self.is_first = self._group.rank_in_group == 0
        if self._size > 1:  # Ctrl-C reaches the whole group of processes, and the driver still has to save its run
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
            end_with_parent()  # where another rank has ended, one may wait for it for ever, busily
            atexit.register(os._exit, 0)  # nothing is left to do, and taking the interpreter apart takes seconds

    def part(self, name: str, whole: Tensor) -> Tensor:
        """Return what this rank holds of a parameter, or of what is kept for each of its weights."""
        return self._parts[name].of(whole) if name in self._parts else whole

    def whole(self, name: str, mine: Tensor) -> Tensor | None:
        """Return the whole of a parameter on the first rank, None on the others. All ranks must call it."""
        part = self._parts[name]
        if part.parts == 1 or mine.ndim == 0:
            return mine if self.is_first else None
        bytes_ = mine.to(self._device).contiguous().view(torch.uint8)
        gathered = [torch.empty_like(bytes_) for _ in range(self._size)] if self.is_first else None
        first = self._group.ranks[0]
        torch.distributed.gather(bytes_, gathered, dst=first, group=self._group.device_group)
        if gathered is None:
            return None
        copies = self._size // part.parts
        return torch.cat([each.view(mine.dtype) for each in gathered[::copies]], part.axis)


@contextmanager
def environment(config: EngineConfig) -> Iterator[None]:
    """Set what the processes of the ranks inherit while they are started: their share of a CPU's threads."""
    if config.tensor_parallel == 1 or not serves_on_cpu():
        yield
        return
    threads = config.threads or int(os.environ.get("OMP_NUM_THREADS") or cores())
    changed = {
        "OMP_NUM_THREADS": str(max(1, threads // config.tensor_parallel)),
        # vLLM would bind rank i to the cores of NUMA node i, which most machines do not have.
        "VLLM_CPU_OMP_THREADS_BIND": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
    }
    before = {name: os.environ.get(name) for name in changed}
    driver_threads = torch.get_num_threads()
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        torch.set_num_threads(driver_threads)
