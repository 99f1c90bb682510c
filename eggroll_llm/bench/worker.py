"""The process of one benchmark variant: reads JSON lines, answers with figures. Started by `eggroll_llm.bench.run`."""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

from eggroll_llm.bench.variants import Workload, start_variant


def main() -> None:
    """Start the variant that the first line describes, then measure once for every further line."""
    job = json.loads(sys.stdin.readline())
    workloads = {name: Workload(**work) for name, work in job["workloads"].items()}
    start = time.perf_counter()
    variant = start_variant(job)
    _answer({"start_seconds": time.perf_counter() - start})
    for line in sys.stdin:
        message = json.loads(line)
        work = workloads[message["workload"]]
        times = variant.run(work, message["repeat"])
        prompt, new = sum(map(len, work.prompts)), sum(work.new_tokens)
        tokens = prompt + new if times.tokens is None else times.tokens
        _answer(
            {
                **{f"{name}_seconds": value for name, value in dataclasses.asdict(times).items() if name != "tokens"},
                "tokens_per_second": tokens / times.sample,
                "generated_per_second": tokens / times.sample * new / (prompt + new),
                "resident_gib": resident_gib(),
            }
        )


def resident_gib() -> float:
    """Memory of this process that is in use now."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 2**20


def _answer(values: dict[str, Any]) -> None:
    print(f"answer {json.dumps(values)}", flush=True)


if __name__ == "__main__":
    main()
