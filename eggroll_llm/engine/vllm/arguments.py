"""What vLLM is started with."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from vllm import EngineArgs
from vllm.platforms import current_platform

from eggroll_llm.config.schema import EngineConfig
from eggroll_llm.engine.memory import batch_tokens
from eggroll_llm.engine.vllm.sampler import ThoughtBudget
from eggroll_llm.errors import ConfigError
from eggroll_llm.es.settings import MOST_RANK, EsSettings
from eggroll_llm.models.targets import TARGET_MODULES, block_of, trained_parameters
from eggroll_llm.system.hardware import GIB, resolve_dtype

VLLM_RANKS = (1, 8, 16, 32, MOST_RANK)  # sizes that vLLM allows for its adapter buffers, up to what our kernel can
CPU_BLOCK = 32  # tokens per block of the KV cache; vLLM's default of 128 shares no prefix of a short prompt
POPULATION = "eggroll"
"""Key of vLLM's `additional_config` under which the arguments of the worker's `Population` are."""


def engine_args(
    model_dir: Path,
    config: EngineConfig,
    es: EsSettings | None,
    *,
    prefix_caching: bool,
    stock: bool,
    logprobs: bool,
    thinking: bool,
) -> EngineArgs:
    """Return the arguments of an engine, as `VllmEngine` takes them. Raises ConfigError for what it cannot do here."""
    on_cpu = current_platform.is_cpu()
    if stock and config.dtype == "float32" and not on_cpu:
        raise ConfigError('engine.dtype = "float32": vLLM\'s own adapters on a GPU compute in bfloat16 only')
    if config.compile and not on_cpu:
        raise ConfigError("engine.compile = true is for CPUs; leave it out, as CUDA graphs do without torch.compile")
    if not on_cpu and config.tensor_parallel > torch.cuda.device_count():
        raise ConfigError(
            f"engine.tensor_parallel = {config.tensor_parallel}: there are {torch.cuda.device_count()} GPUs: lower it"
        )
    graphs = not (stock or on_cpu or config.enforce_eager)
    dtype = getattr(torch, resolve_dtype(config.dtype))
    rank = es.rank if es else 1
    population = {
        "es": dataclasses.asdict(es) if es else None,
        "offload": config.offload_masters,
        "compiled": config.compile,
        "stock": stock,
    }
    args = EngineArgs(
        model=str(model_dir),
        dtype=dtype,
        quantization="fp8_per_channel" if config.quantization == "fp8" else None,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_sequences,
        max_num_batched_tokens=batch_tokens(config.max_model_len, on_cpu=on_cpu),
        enable_prefix_caching=prefix_caching,
        enforce_eager=on_cpu or config.enforce_eager,
        tensor_parallel_size=config.tensor_parallel,
        distributed_executor_backend="mp" if config.tensor_parallel > 1 else None,
        enable_lora=True,
        max_loras=config.slots,
        # Memory that vLLM takes for its own arithmetic, and that ours gives back unused.
        max_lora_rank=next(allowed for allowed in VLLM_RANKS if allowed >= rank) if stock else VLLM_RANKS[0],
        lora_target_modules=_adapted(model_dir, es.layers if es else ()),
        lora_dtype=dtype,
        worker_extension_cls="eggroll_llm.engine.vllm.worker.EsWorkerExtension",
        additional_config={POPULATION: population},
        logits_processors=[ThoughtBudget] if thinking else None,
        max_logprobs=-1,
        disable_log_stats=True,
        use_tqdm_on_load=False,
        trust_remote_code=False,
        seed=0,
        **({"compilation_config": decode_graphs(config.max_sequences)} if graphs else {}),
        **memory_args(config),
    )
    if logprobs:  # those of the distribution that is sampled from
        args.logprobs_mode = "processed_logprobs"
    return args


def _adapted(model_dir: Path, layers: Sequence[int]) -> list[str]:
    """Return what vLLM wraps for adapters: modules by the ends of their names, or the whole names of some blocks'."""
    if not layers:
        return list(TARGET_MODULES)
    parents = {name.rsplit(".", 2)[0] for name, _, _ in trained_parameters(model_dir, layers)}
    return [f"{parent}.{module}" for parent in sorted(parents, key=block_of) for module in TARGET_MODULES]


def decode_graphs(max_sequences: int) -> dict[str, Any]:
    """Return vLLM's compilation settings: every step that only decodes is one CUDA graph, and nothing is compiled.

    A batch is padded to the next size of 1, 2, 4, then steps of 8 up to 64 sequences, of 16 up to 256 and of 32 beyond.
    Capturing takes seconds and compiling minutes; what the compiler would fuse, `blocks` does.
    """
    steps = (range(8, 64, 8), range(64, 256, 16), range(256, max_sequences, 32))
    sizes = [size for size in (1, 2, 4, *(size for step in steps for size in step)) if size < max_sequences]
    return {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [*sizes, max_sequences]}


def memory_args(config: EngineConfig) -> dict[str, Any]:
    """Return the arguments of vLLM that settle the key-value cache on this device."""
    if current_platform.is_cpu():
        return {"kv_cache_memory_bytes": int(config.kv_cache_gib * GIB), "block_size": CPU_BLOCK}
    return {"gpu_memory_utilization": config.gpu_memory_utilization}
