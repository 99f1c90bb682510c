"""vLLM without anything of ours: as the environment configures it, in this process or in its own.

Importing this sets no variable, so that vLLM runs as it ships: the engine in a process of its own, asynchronous
scheduling, and the model runner of its choice. `bench.ours` sets ours first, and the engine is in this process.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from vllm import EngineArgs, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.llm_engine import LLMEngine

from eggroll_llm.bench.workload import Times, Workload
from eggroll_llm.system.hardware import GIB


class Plain:
    """An engine that answers a workload. `more` are arguments of vLLM."""

    def __init__(self, job: dict[str, Any], **more: Any) -> None:
        self.job = job
        extension = {"worker_extension_cls": f"{__name__}.MemoryExtension"}
        self._llm = LLMEngine.from_engine_args(
            EngineArgs(
                model=job["model_dir"],
                dtype=getattr(torch, job["engine"]["dtype"]),
                max_model_len=job["context"],
                max_num_seqs=job["engine"]["max_sequences"],
                enforce_eager=not job["compiled"],
                enable_prefix_caching=False,
                disable_log_stats=True,
                use_tqdm_on_load=False,
                seed=0,
                **job["vllm_args"],
                **(extension | more),
            ),
            usage_context=UsageContext.LLM_CLASS,  # the defaults of offline batches
        )

    def run(self, work: Workload, repeat: int) -> Times:
        """Answer all prompts with the one model."""
        return Times(sample=self._generate(work, [None] * len(work.prompts)))

    def _generate(self, work: Workload, adapters: Sequence[LoRARequest | None]) -> float:
        start = time.perf_counter()
        for i, (prompt, new_tokens, adapter) in enumerate(zip(work.prompts, work.new_tokens, adapters, strict=True)):
            prompt_ids: Any = {"prompt_token_ids": list(prompt)}
            params = sampling_params(new_tokens, work.temperature)
            self._llm.add_request(f"{i}", prompt_ids, params, lora_request=adapter)
        while self._llm.has_unfinished_requests():
            self._llm.step()
        return time.perf_counter() - start

    def score(self, work: Workload) -> float | None:
        """Return nothing: there are no members."""
        return None

    def memory_gib(self) -> float:
        """Return the memory of the process that the model is in."""
        (memory,) = self._llm.collective_rpc("bench_memory_gib")
        return float(memory)

    def about(self) -> dict[str, Any]:
        """Return how this engine runs."""
        return about(self._llm)

    def close(self) -> None:
        """Shut vLLM down."""
        self._llm.engine_core.shutdown()


class MemoryExtension:
    """A method added to vLLM's worker, which may be in another process."""

    def bench_memory_gib(self) -> float:
        """Return the memory of this process."""
        return memory_gib()


def memory_gib() -> float:
    """Return this process's peak of allocated GPU memory; without a GPU what is resident now."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 2**20


def about(llm: LLMEngine) -> dict[str, Any]:
    """Return how vLLM runs: what it has chosen, not what it was asked for."""
    return {
        "device": current_platform.get_device_name(),
        "multiprocess": not hasattr(llm.engine_core, "engine_core"),
        "async_scheduling": llm.vllm_config.scheduler_config.async_scheduling,
        "second_model_runner": llm.vllm_config.use_v2_model_runner,
        "cudagraph_mode": str(llm.vllm_config.compilation_config.cudagraph_mode),
    }


def sampling_params(new_tokens: int, temperature: float) -> SamplingParams:
    """Return parameters for exactly this many tokens."""
    return SamplingParams(
        temperature=temperature,
        max_tokens=new_tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
