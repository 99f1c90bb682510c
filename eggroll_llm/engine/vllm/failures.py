"""What vLLM raises -> one sentence with the setting, the model or the memory that it is about."""

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from vllm import ModelRegistry

from eggroll_llm.config.schema import EngineConfig
from eggroll_llm.engine.watchdog import Watchdog
from eggroll_llm.errors import ConfigError, EngineError, ModelError, UserError
from eggroll_llm.es.estimate import NonFiniteUpdate
from eggroll_llm.models.architectures import TESTED
from eggroll_llm.models.files import architecture_of
from eggroll_llm.system.hardware import CUDA_BFLOAT16, CUDA_FP8, serves_on_cpu
from eggroll_llm.system.invocation import command
from eggroll_llm.system.terminal import inert

REFUSALS = (UserError, NonFiniteUpdate)
"""What a call of a population raises with nothing changed."""
NOTICED = 1.0
"""Seconds in which a rank that ends is certain to be seen."""
LIMIT = 300  # characters of vLLM's own text, of which the beginning says what is wrong
_CACHE_NEEDED = re.compile(r"\(([\d.]+) GiB KV cache is needed")
_CACHE_AVAILABLE = re.compile(r"\(([\d.]+)/[\d.]+ GiB\) on kv cache allocation is less")


@dataclass(frozen=True)
class Refused:
    """A refusal on its way from a worker to the engine: of what is raised, vLLM may keep the text only."""

    error: Exception


@contextmanager
def calling(what: str, llm: Any, watchdog: Watchdog) -> Iterator[None]:
    """A call of vLLM, watched. Raises EngineError for what vLLM raises."""
    try:
        with watchdog:
            yield
    except REFUSALS:
        raise
    except Exception as error:
        raise _rank_error(what, llm) or call_error(what, error) from error


def _rank_error(what: str, llm: Any) -> EngineError | None:
    """Return the error that a call failed with because a rank of the engine has ended; None where none has."""
    workers = getattr(getattr(llm, "model_executor", None), "workers", ())
    if not wait([worker.proc.sentinel for worker in workers], NOTICED if workers else 0):
        return None
    return EngineError(
        f"the inference engine failed in {what}: a rank of the engine ended, one of {len(workers)} processes: it was "
        "killed, ran out of memory, or printed why"
    )


def call_error(what: str, error: Exception) -> EngineError:
    """Say that the engine failed in `what`."""
    remedy = f"Check the installation with: {command('doctor')}"
    if isinstance(error, MemoryError) or "memory" in str(error).lower():
        remedy = f"If memory ran out, lower engine.max_sequences, engine.slots or {_cache_key()}."
    return EngineError(f"the inference engine failed in {what}: {_described(error)}. {remedy}")


def start_error(error: Exception, model_dir: Path, config: EngineConfig) -> UserError:
    """Say why the engine does not start on a model."""
    text = _one_line(error)
    key = _cache_key()
    value = getattr(config, key.removeprefix("engine."))
    if found := _CACHE_NEEDED.search(text):
        return ConfigError(
            f"{key} = {value:g}: a sequence of {config.max_model_len} tokens (engine.max_model_len) needs "
            f"{float(found[1]) + 0.01:.2f} GiB of key-value cache: raise {key}, or lower engine.max_model_len or "
            "sampling.max_tokens"  # with 0.01 more, as vLLM rounds
        )
    if "No available memory for the cache blocks" in text:
        return ConfigError(f"{key} = {value:g}: leaves no memory for the key-value cache: raise it")
    if found := _CACHE_AVAILABLE.search(text):
        return ConfigError(
            f"{key} = {value:g}: {found[1]} GiB are available when the model is loaded: lower {key} to less than that"
        )
    if not serves_on_cpu() and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        if capability < CUDA_BFLOAT16:
            return ConfigError(
                f"{_gpu(capability)} has no bfloat16, in which models are served here: use one of 8.0 or more"
            )
        if config.quantization == "fp8" and capability < CUDA_FP8:
            return ConfigError(
                f'engine.quantization = "fp8": {_gpu(capability)} does not multiply FP8: set it to "none"'
            )
    architecture = architecture_of(model_dir)
    if architecture not in ModelRegistry.get_supported_archs() or "does not support LoRA" in text:
        return ModelError(
            f"{model_dir}: vLLM does not serve architecture {inert(architecture)} with adapters: use one of "
            f"{', '.join(TESTED)}"
        )
    return EngineError(f"{model_dir}: {call_error('starting', error)}")


def _gpu(capability: tuple[int, int]) -> str:
    return f"{torch.cuda.get_device_name()}, of compute capability {capability[0]}.{capability[1]},"


def _cache_key() -> str:
    """Return the setting that the size of the key-value cache depends on."""
    return "engine.kv_cache_gib" if serves_on_cpu() else "engine.gpu_memory_utilization"


def _described(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {inert(_one_line(error), LIMIT)}{place}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
