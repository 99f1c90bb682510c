"""Stands in for the process of a benchmark variant: no vLLM, figures that the variant's name says, a diary of times.

A name is "NAME speed=200 fails=2 hangs=2 starts=no": tokens per second, the repeat in which the process ends or hangs,
and whether it starts.
"""

import json
import os
import sys
import time


def main() -> None:
    job = json.loads(sys.stdin.readline())
    says = dict(word.split("=") for word in job["name"].split() if "=" in word)

    def note(what: str, begin: float) -> None:
        with open(os.environ["BENCH_DIARY"], "a") as diary:
            diary.write(json.dumps([job["name"].split()[0], what, begin, time.monotonic()]) + "\n")

    begin = time.monotonic()
    time.sleep(0.1)
    if "starts" in says:
        sys.exit("out of memory")
    print("a remark of vLLM's")
    note("start", begin)
    about = {"device": "stub", "start_seconds": 0.1, "threads": os.environ.get("OMP_NUM_THREADS")}
    print("answer", json.dumps(about), flush=True)
    for line in sys.stdin:
        message, begin = json.loads(line), time.monotonic()
        time.sleep(600 if str(message["repeat"]) == says.get("hangs") else 0.01)
        if str(message["repeat"]) == says.get("fails"):
            sys.exit("the GPU is lost")
        note("measure", begin)
        answer = {"tokens_per_second": float(says.get("speed", 100)), "generated_per_second": 50.0, "memory_gib": 1.0}
        print("answer", json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
