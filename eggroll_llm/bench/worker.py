"""The process of one benchmark variant: reads JSON lines, answers with figures. Started by `eggroll_llm.bench.run`."""

import json
import os
import sys
import time
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from eggroll_llm.bench.workload import Workload

if TYPE_CHECKING:
    from eggroll_llm.bench.ours import Runner


def main() -> None:
    """Start the variant that the first line describes, then measure once for every further line."""
    job = json.loads(sys.stdin.readline())
    workloads = {name: Workload(**work) for name, work in job["workloads"].items()}
    begin = time.perf_counter()
    runner = start(job)
    _answer({"start_seconds": time.perf_counter() - begin, **runner.about()})
    for line in sys.stdin:
        message = json.loads(line)
        _answer(measure(runner, workloads[message["workload"]], message["repeat"], phased=message["phased"]))
    runner.close()


def start(job: dict[str, Any]) -> "Runner":
    """Start a variant in the environment it is about: ours, or none for vLLM as it ships."""
    if job["kind"] == "shipped":
        if find_spec("flashinfer") is None:  # without which its sampler, on by default, does not load
            os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
        from eggroll_llm.bench.plain import Plain

        return Plain(job)
    import eggroll_llm.engine.vllm  # noqa: F401 - its variables come before vLLM
    from eggroll_llm.bench import ours

    return ours.start(job)


def measure(runner: "Runner", work: Workload, repeat: int, *, phased: bool) -> dict[str, Any]:
    """Answer the workload once and return seconds, rates and memory.

    `phased` answers it again with one token each. That is the prefill, and all beyond it is decoding. Then members
    score.
    """
    times = runner.run(work, 2 * repeat)
    prompt, new = sum(map(len, work.prompts)), sum(work.new_tokens)
    tokens = prompt + new if times.tokens is None else times.tokens
    rest = (times.noise or 0.0) + (times.update or 0.0) + (times.serve or 0.0)
    step = times.sample + rest - (times.noise or 0.0) * times.noise_in_sample
    answer = {
        **{f"{name}_seconds": getattr(times, name) for name in ("sample", "noise", "update", "serve")},
        "tokens_per_second": tokens / times.sample,
        "generated_per_second": tokens / times.sample * new / (prompt + new),
        "rest_of_step": None if times.update is None else rest / step,
    }
    if phased:
        prefill = runner.run(work.first_token(), 2 * repeat + 1).sample
        decode, steps = times.sample - prefill, max(work.new_tokens) - 1
        answer |= {"prefill_seconds": prefill, "prefill_tokens_per_second": prompt / prefill}
        if (scored := runner.score(work)) is not None:
            answer |= {"scored_tokens_per_second": scored}
        if steps and decode > 0:  # which noise can turn around where there is next to nothing to decode
            answer |= {
                "decode_tokens_per_second": (new - len(work.prompts)) / decode,
                "decode_step_seconds": decode / steps,
            }
    return answer | {"memory_gib": runner.memory_gib()}


def _answer(values: dict[str, Any]) -> None:
    print(f"answer {json.dumps(values)}", flush=True)


if __name__ == "__main__":
    main()
