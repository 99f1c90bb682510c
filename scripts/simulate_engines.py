"""How the speed of a step grows with the number of engines, simulated.

    python scripts/simulate_engines.py [--engines N ...]
    python scripts/simulate_engines.py --update              # from how many engines on is the update a tenth of a step?
    python scripts/simulate_engines.py --copies              # what would copies of the last requests gain?

Requests are shared out by the product's own rule (`engine.shares`). An engine decodes up to `SEQUENCES` requests at
once, each forward pass as long as its batch makes it; answers have lognormal lengths, cut at the limit. What every
engine does for the whole population (noise, update) and what the driver does (scoring, after sampling) is added.
Prints a Markdown table of efficiencies: tokens per second and engine, in units of one engine alone. With
`--scored-meanwhile` scoring takes no time of its own, as if it were done while engines sample.
"""

import argparse
import heapq
import math
import random
from collections import deque
from dataclasses import dataclass

from eggroll_llm.engine.pool import AHEAD
from eggroll_llm.engine.shares import Shares

SEQUENCES = 256
ROUND_TRIP = 0.0014  # seconds, of a message by Ray and its answer


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds, unless a unit is named."""

    prompts: int
    tokens: int
    """Of an answer, on average."""
    limit: int
    spread: float
    """Standard deviation of the logarithm of an answer's length."""
    decode: float
    """A forward pass, however many sequences it has."""
    decode_each: float
    """A sequence in it."""
    prefill: float
    """A prompt."""
    pair: float
    """Noise and update of an antithetic pair."""
    update: float
    """The rest of an update."""
    score: float
    """A completion."""
    exchange: float = 0.0
    """Of the weights that each engine of a machine has updated, when an update is split among them."""


CASES = {
    "Countdown, 135M, one CPU thread each (measured)": Costs(
        prompts=8, tokens=7, limit=12, spread=0.3, decode=0.006, decode_each=0.0008, prefill=0.026, pair=0.0046,
        update=0.2, score=42e-6,
    ),
    "7B on one H100 each (assumed)": Costs(
        prompts=16, tokens=512, limit=1024, spread=0.6, decode=0.008, decode_each=20e-6, prefill=0.004, pair=0.00405,
        update=0.04, score=60e-6,
    ),
    "7B, noise and update by fused kernels (assumed)": Costs(
        prompts=16, tokens=512, limit=1024, spread=0.6, decode=0.008, decode_each=20e-6, prefill=0.004, pair=0.0003,
        update=0.04, score=60e-6,
    ),
}  # fmt: skip


def on_an_h100(billions: float, decode: float, decode_each: float, exchange: float) -> Costs:
    """Return assumed costs for a model with fused kernels; what depends on its size is in proportion to it."""
    return Costs(
        prompts=16, tokens=512, limit=1024, spread=0.6, decode=decode, decode_each=decode_each,
        prefill=0.004 * billions / 7, pair=0.0003 * billions / 7, update=0.04 * billions / 7, score=60e-6,
        exchange=exchange,
    )  # fmt: skip


SIZES = {
    "0.5B": on_an_h100(0.5, decode=0.003, decode_each=6e-6, exchange=0.007),
    "1.5B": on_an_h100(1.5, decode=0.004, decode_each=10e-6, exchange=0.02),
    "7B": on_an_h100(7, decode=0.008, decode_each=20e-6, exchange=0.1),
}
MEMBERS = 64
"""For each engine."""
NODE = 8
"""Engines of a machine, among which an update can be split."""


class Engine:
    """Requests that are decoded and that wait, and how far decoding has come."""

    def __init__(self) -> None:
        self.decoded = 0  # tokens, since the start
        self.running: list[tuple[int, int]] = []  # where it ends, request
        self.waiting: deque[int] = deque()

    def requests(self) -> list[int]:
        """Return those that are not answered yet."""
        return [*self.waiting, *(request for _, request in self.running)]

    def next_answers(self, lengths: list[int], costs: Costs) -> tuple[float, list[int]]:
        """Decode until a request ends; return the seconds that took, and the requests that ended."""
        seconds = 0.0
        while self.waiting and len(self.running) < SEQUENCES:
            request = self.waiting.popleft()
            heapq.heappush(self.running, (self.decoded + lengths[request], request))
            seconds += costs.prefill
        passes = self.running[0][0] - self.decoded
        seconds += passes * (costs.decode + costs.decode_each * len(self.running))
        self.decoded += passes
        ended = []
        while self.running and self.running[0][0] <= self.decoded:
            ended.append(heapq.heappop(self.running)[1])
        return seconds, ended


def sampling_seconds(
    engines: int, lengths: list[int], costs: Costs, *, slow: float = 1.0, copies: bool = False
) -> float:
    """Return the time until the last answer is there.

    The first engine takes `slow` times as long as the others. `copies`: an engine that runs out of work gets, once,
    what the engine with the most of it has left; the first answer counts.
    """
    groups = [range(i, i + costs.prompts) for i in range(0, len(lengths), costs.prompts)]
    shares: Shares[int] = Shares(groups, int(AHEAD * SEQUENCES))
    all_engines = [Engine() for _ in range(engines)]
    unanswered, copied, now = set(range(len(lengths))), set[int](), 0.0
    events: list[tuple[float, int, list[int]]] = [(0.0, i, []) for i in range(engines)]
    while unanswered:
        now, i, ended = heapq.heappop(events)
        engine = all_engines[i]
        for request in ended:
            shares.answered(i, request)
        unanswered.difference_update(ended)
        engine.waiting += shares.take(i, engines)
        if copies and not engine.requests():
            most = max(all_engines, key=lambda other: len(other.requests()))
            left = [request for request in most.requests() if request in unanswered - copied]
            copied.update(left)
            engine.waiting += left
        if engine.requests():
            seconds, ended = engine.next_answers(lengths, costs)
            heapq.heappush(events, (now + seconds * (slow if i == 0 else 1.0), i, ended))
    return now + ROUND_TRIP


def draw_lengths(completions: int, costs: Costs, seed: int = 0) -> list[int]:
    """Return how many tokens each answer has."""
    draw, middle = random.Random(seed), math.log(costs.tokens) - costs.spread**2 / 2
    return [max(1, min(costs.limit, int(draw.lognormvariate(middle, costs.spread)))) for _ in range(completions)]


def update_seconds(engines: int, members: int, costs: Costs, split: bool = False) -> float:
    """Return what noise and update take."""
    if split and engines > 1:
        return (members // 2 * costs.pair + costs.update) / min(NODE, engines) + costs.exchange
    return members // 2 * costs.pair + costs.update


def tokens_per_second(engines: int, members: int, costs: Costs, scored_meanwhile: bool) -> float:
    """Return the speed of a whole step."""
    lengths = draw_lengths(members * costs.prompts, costs)
    rest = update_seconds(engines, members, costs) + (0.0 if scored_meanwhile else len(lengths) * costs.score)
    return sum(lengths) / (sampling_seconds(engines, lengths, costs) + rest)


def print_update() -> None:
    """Print the update's share of a step, whole and split within a machine, and from where on it is a tenth."""
    print("| model | update | 8 | 64 | 512 | a tenth of a step from |")
    print("|---|---|---|---|---|---|")
    for name, costs in SIZES.items():
        lengths = draw_lengths(MEMBERS * costs.prompts, costs)
        sampling = sampling_seconds(
            1, lengths, costs
        )  # of an engine with its own members: about the same beside others
        for split in (False, True):
            seconds = {n: update_seconds(n, MEMBERS * n, costs, split) for n in range(1, 8193)}
            shares = {n: each / (sampling + each) for n, each in seconds.items()}
            first = next((str(n) for n, share in shares.items() if share > 0.1), "more than 8192")
            how = f"split among {NODE}" if split else "by each engine"
            print(f"| {name} | {how} |", *(f"{shares[n]:.1%} |" for n in (8, 64, 512)), f"{first} engines |")


def print_copies() -> None:
    """Print what copies of the last requests gain in sampling."""
    print("| model | engines | one is slower by | time saved by copies |")
    print("|---|---|---|---|")
    for name, costs in SIZES.items():
        for engines in (8, 64):
            lengths = draw_lengths(MEMBERS * engines * costs.prompts, costs)
            for slow in (1.0, 1.5, 3.0):
                plain, copied = (sampling_seconds(engines, lengths, costs, slow=slow, copies=c) for c in (False, True))
                print(f"| {name} | {engines} | {slow:g} | {1 - copied / plain:.1%} |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--scored-meanwhile", action="store_true")
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--copies", action="store_true")
    given = parser.parse_args()
    if given.update or given.copies:
        return print_update() if given.update else print_copies()
    engines = given.engines
    print("| costs | members |", " | ".join(map(str, engines)), "|")
    print("|---|---|" + "---|" * len(engines))
    for name, costs in CASES.items():
        for each, in_all in ((64, 0), (0, 4096)):
            alone = tokens_per_second(1, each or in_all, costs, given.scored_meanwhile)
            found = [
                tokens_per_second(n, each * n or in_all, costs, given.scored_meanwhile) / n / alone for n in engines
            ]
            members = f"{each} for each engine" if each else f"{in_all} in all"
            print(f"| {name} | {members} |", " | ".join(f"{share:.2f}" for share in found), "|", flush=True)


if __name__ == "__main__":
    main()
