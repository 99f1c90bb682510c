"""Everything that touches vLLM, and the only place that imports it.

Importing this package sets vLLM's environment, which must happen before vLLM is imported, and imports nothing heavy.
Variables that the user has set are left alone.
"""

import os

from eggroll_llm.system.hardware import cores, serves_on_cpu

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in-process: an update is a method call, and all cores stay usable
    "VLLM_CPU_ATTN_SPLIT_KV": "0",  # attention does not cut a context in pieces to spread the load
    "VLLM_LOGGING_LEVEL": "ERROR",  # its warnings are about choices made here on purpose
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the worker extension knows the adapter manager of the first one
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # greedy or seeded requests never use it; vLLM would import it at the start
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a rank forked after torch has computed on the CPU may hang
    "VLLM_NO_USAGE_STATS": "1",
}
if serves_on_cpu():
    _ENVIRONMENT["OMP_NUM_THREADS"] = str(cores())
for _name, _value in _ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)
