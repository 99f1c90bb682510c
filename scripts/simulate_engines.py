"""How the speed of a step grows with the number of engines, simulated.

    python scripts/simulate_engines.py [--engines N ...]

Requests are shared out by the product's own rule (`engine.shares`). An engine decodes up to `SEQUENCES` requests at
once, each forward pass as long as its batch makes it; answers have lognormal lengths, cut at the limit. What every
engine does for the whole population (noise, update) and what the driver does (scoring, after sampling) is added.
Prints a Markdown table of efficiencies: tokens per second and engine, in units of one engine alone.
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


CASES = {
    "demo, 135M, one CPU thread each (measured)": Costs(
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


class Engine:
    """Requests that are decoded and that wait, and how far decoding has come."""

    def __init__(self) -> None:
        self.decoded = 0  # tokens, since the start
        self.running: list[tuple[int, int]] = []  # where it ends, request
        self.waiting: deque[int] = deque()

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


def sampling_seconds(engines: int, lengths: list[int], costs: Costs) -> float:
    """Return the time until the last answer is there."""
    prompts = costs.prompts
    groups = [range(i, i + prompts) for i in range(0, len(lengths), prompts)]
    shares: Shares[int] = Shares(groups, int(AHEAD * SEQUENCES))
    all_engines = [Engine() for _ in range(engines)]
    for i, engine in enumerate(all_engines):
        engine.waiting += shares.take(i, engines)
    events = [(0.0, i) for i, engine in enumerate(all_engines) if engine.waiting]
    now = 0.0
    while events:
        now, i = heapq.heappop(events)
        engine = all_engines[i]
        if not engine.waiting and not engine.running:
            continue
        seconds, ended = engine.next_answers(lengths, costs)
        for request in ended:
            shares.answered(i, request)
        engine.waiting += shares.take(i, engines)
        heapq.heappush(events, (now + seconds, i))
    return now + ROUND_TRIP


def tokens_per_second(engines: int, members: int, costs: Costs) -> float:
    """Return the speed of a whole step."""
    draw, middle = random.Random(0), math.log(costs.tokens) - costs.spread**2 / 2
    lengths = [
        max(1, min(costs.limit, int(draw.lognormvariate(middle, costs.spread)))) for _ in range(members * costs.prompts)
    ]
    rest = members // 2 * costs.pair + costs.update + len(lengths) * costs.score
    return sum(lengths) / (sampling_seconds(engines, lengths, costs) + rest)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=int, nargs="+", default=[8, 64, 512])
    engines = parser.parse_args().engines
    print("| costs | members |", " | ".join(map(str, engines)), "|")
    print("|---|---|" + "---|" * len(engines))
    for name, costs in CASES.items():
        for each, in_all in ((64, 0), (0, 4096)):
            alone = tokens_per_second(1, each or in_all, costs)
            found = [tokens_per_second(n, each * n or in_all, costs) / n / alone for n in engines]
            members = f"{each} for each engine" if each else f"{in_all} in all"
            print(f"| {name} | {members} |", " | ".join(f"{share:.2f}" for share in found), "|", flush=True)


if __name__ == "__main__":
    main()
