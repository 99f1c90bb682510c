"""Which variants are measured, on how much work, and which of them are alive together."""

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from eggroll_llm.errors import UserError
from eggroll_llm.es.settings import MOST_RANK

Device = Literal["cpu", "cuda"]
WAVES = {"even": 1, "mixed": 4}  # prompts of a workload / prompts decoded at once
MIXED_LENGTHS = 64  # different ones, if there are as many prompts


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much each variant is asked."""

    num_prompts: int
    """Decoded at once: all of the workload "even", a quarter of "mixed"."""
    output_len: int
    """New tokens of each prompt in "even"; in "mixed" the most, and a quarter of it the least."""
    temperature: float = 0.0
    """Of sampling; 0 is greedy."""

    def lengths(self, workload: str) -> list[int]:
        """Return the new tokens of every prompt."""
        count, least = WAVES[workload] * self.num_prompts, max(1, self.output_len // 4)
        if workload == "even":
            return [self.output_len] * count
        kinds = min(count, MIXED_LENGTHS)
        lengths = [least + i % kinds * (self.output_len - least) // (kinds - 1) for i in range(count)]
        random.Random(0).shuffle(lengths)
        return lengths


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way of serving the same requests."""

    name: str
    """As in the table."""
    kind: Literal["plain", "shipped", "population", "stock", "files", "swap"]
    """What runs: `bench.plain` if shipped, else what `bench.ours` starts."""
    rank: int = 0
    """Rank of the perturbations; 0 is none, or full."""
    slots: int = 0
    """Resident members."""
    population: int = 0
    """Members, dealt out to the prompts in turn."""
    compiled: bool = False
    """Through torch.compile on CPU, with CUDA graphs too elsewhere."""

    @property
    def phased(self) -> bool:
        """Whether prefill and decode are timed apart; the others are too slow to be worth it."""
        return self.kind not in ("files", "swap")


EAGER = Variant(name="plain, eager", kind="plain")
COMPILED = Variant(name="plain, compiled", kind="plain", compiled=True)
SHIPPED = Variant(name="plain, as shipped", kind="shipped", compiled=True)
REFERENCES: dict[Device, tuple[Variant, ...]] = {"cpu": (EAGER, COMPILED), "cuda": (EAGER, COMPILED, SHIPPED)}
"""What the others are compared with. On a CPU vLLM ships with a process for each socket, which changes nothing here."""


def population(rank: int, members: int = 64, *, slots: int = 0, compiled: bool = False, note: str = "") -> Variant:
    """Our engine with a name that says what differs."""
    slots = slots or members
    parts = [f"population of {members}, rank {rank}"]
    parts += [f"{slots} slots"] * (slots != members) + [note] * bool(note)
    name = ", ".join(parts)
    return Variant(name=name, kind="population", rank=rank, slots=slots, population=members, compiled=compiled)


def stock(*, compiled: bool = False) -> Variant:
    """Our placing of members with vLLM's adapter arithmetic."""
    name = "vLLM's LoRA, fed in memory"
    return Variant(name=name, kind="stock", rank=1, slots=64, population=64, compiled=compiled)


FILES = Variant(name="vLLM's LoRA, files in a RAM disk", kind="files", rank=1, slots=64, population=64)
SWAP = Variant(name="all weights swapped, one member at a time", kind="swap", population=64)

Group = tuple[str, tuple[Variant, ...]]
"""A workload, and the variants that are measured on it together."""
GROUPS: dict[Device, tuple[Group, ...]] = {
    "cpu": (
        ("even", (population(1), population(8), population(1, compiled=True, note="compiled"))),
        ("even", (population(2), population(4), population(16))),
        ("even", (population(1, 16), population(1, 128))),
        ("even", (stock(), FILES, SWAP)),
        ("mixed", (population(1, note="mixed lengths"), population(1, 256, slots=64, note="mixed lengths"))),
    ),
    "cuda": (
        (
            "even",
            (
                population(1, compiled=True),
                population(8, compiled=True),
                population(1, 256, compiled=True),
                stock(compiled=True),
            ),
        ),
    ),
}


def chosen_groups(
    device: Device, wanted: str = "", ranks: Sequence[int] = (), members: Sequence[int] = (), slots: int = 0
) -> list[Group]:
    """Return the groups to measure: those of the device, or one with a population of each rank and size.

    Raises UserError when no name has `wanted` in it, and for sizes that are not possible.
    """
    groups: Iterable[Group] = GROUPS[device]
    if ranks or members:
        _check_sizes(ranks, members)
        sizes, compiled = [(m, r) for m in members or (64,) for r in ranks or (1,)], device == "cuda"
        groups = [("even", tuple(population(r, m, slots=min(slots or m, m), compiled=compiled) for m, r in sizes))]
    chosen = [(work, tuple(v for v in variants if wanted in v.name)) for work, variants in groups]
    if not any(variants for _, variants in chosen):
        names = "\n  ".join(variant.name for _, variants in groups for variant in variants)
        raise UserError(f"--variants {wanted!r} is in none of these names:\n  {names}")
    return [group for group in chosen if group[1]]


def _check_sizes(ranks: Sequence[int], members: Sequence[int]) -> None:
    """Raise UserError for populations that no engine could serve, or that would be measured twice."""
    if odd := [number for number in members if number % 2]:
        raise UserError(f"--members {odd[0]}: must be even, as members come in pairs")
    if high := [rank for rank in ranks if rank > MOST_RANK]:
        raise UserError(f"--ranks {high[0]}: the kernels take ranks up to {MOST_RANK}")
    for flag, numbers in (("--ranks", ranks), ("--members", members)):
        if len(set(numbers)) < len(numbers):
            raise UserError(f"{flag} {','.join(map(str, numbers))}: names one twice")


def check_shares(size: Size, group: Group) -> None:
    """Every member has to answer as many prompts, or a population would be smaller than it is called."""
    workload, variants = group
    count = WAVES[workload] * size.num_prompts
    for variant in variants:
        if variant.population and count % variant.population:
            multiple = variant.population // math.gcd(variant.population, WAVES[workload])
            raise UserError(
                f"--num-prompts {size.num_prompts}: {count} prompts do not divide among the members of "
                f"{variant.name!r}: use a multiple of {multiple}, or leave it out with --variants"
            )


def waves(
    groups: Iterable[Group],
    references: Sequence[Variant],
    size_of: Callable[[Variant], float] = lambda variant: 0,
    capacity: float = math.inf,
) -> list[Group]:
    """Return what is alive together, one wave after the other: a group beside the references, as far as both fit.

    Where a variant does not fit beside all references, they take turns like the others. What does not fit alone has a
    wave of its own, in which it says so.
    """
    result = []
    for workload, variants in groups:
        beside, waiting = [*references], [*variants]
        if max(map(size_of, variants)) + sum(map(size_of, references)) > capacity:
            beside, waiting = [], [*references, *variants]
        while waiting:
            wave = [*beside, waiting.pop(0)]
            while waiting and sum(map(size_of, [*wave, waiting[0]])) <= capacity:
                wave.append(waiting.pop(0))
            result.append((workload, tuple(wave)))
    return result
