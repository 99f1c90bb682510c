"""What is said when vLLM does not start: the setting or the model that it is about."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eggroll_llm.config.schema import EngineConfig
from eggroll_llm.engine.vllm import failures
from eggroll_llm.engine.watchdog import EXIT_STATUS
from eggroll_llm.errors import ConfigError, EngineError, ModelError, UserError
from eggroll_llm.models.architectures import TESTED

pytestmark = pytest.mark.vllm

CONFIG = EngineConfig(kv_cache_gib=0.5, max_sequences=8, max_model_len=4096)
CACHE_TOO_SMALL = (
    "To serve at least one request with the model's max seq len (4096), (1.5 GiB KV cache is needed, which is larger "
    "than the available KV cache memory (0.5 GiB). Try increasing `gpu_memory_utilization`"
)
MEMORY_TOO_SMALL = (
    "Available memory on node 0 (0.31/4.0 GiB) on kv cache allocation is less than requested memory for kv (0.5 GiB). "
    "Decrease --kv-cache-memory-bytes"
)


@pytest.mark.parametrize(
    ("on_cpu", "error", "kind", "said"),
    [
        (
            True,
            CACHE_TOO_SMALL,
            ConfigError,
            "engine.kv_cache_gib = 0.5: a sequence of 4096 tokens .* needs 1.51 GiB of",
        ),
        (False, CACHE_TOO_SMALL, ConfigError, "engine.gpu_memory_utilization = 0.85: .* needs 1.51 GiB of"),
        (
            True,
            MEMORY_TOO_SMALL,
            ConfigError,
            "engine.kv_cache_gib = 0.5: 0.31 GiB are available .* lower engine.kv_ca",
        ),
        (
            False,
            "No available memory for the cache blocks. Try",
            ConfigError,
            "engine.gpu_memory_utilization = 0.85: lea",
        ),
        (
            True,
            "LlamaForCausalLM does not support LoRA yet.",
            ModelError,
            "does not serve architecture LlamaForCausalLM",
        ),
        (True, "what nobody\nhas seen", EngineError, "failed in starting: ValueError: what nobody has seen"),
    ],
)
def test_what_stops_vllm_is_told_with_the_settings_to_change(
    on_cpu: bool,
    error: str,
    kind: type[UserError],
    said: str,
    tiny_model: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(failures, "serves_on_cpu", lambda: on_cpu)
    found = failures.start_error(ValueError(error), tiny_model("llama"), CONFIG)
    assert type(found) is kind
    assert re.search(said, str(found))
    assert str(found).isprintable()


@pytest.mark.parametrize(
    ("capability", "quantization", "said"),
    [
        ((7, 5), "none", "^Card, of compute capability 7.5, has no bfloat16"),
        ((8, 0), "fp8", '^engine.quantization = "fp8": Card, of compute capability 8.0, does not multiply FP8'),
        ((8, 9), "fp8", "failed in starting: ValueError: as it says"),
    ],
)
def test_what_a_gpu_cannot_multiply_is_told(
    capability: tuple[int, int],
    quantization: Any,
    said: str,
    tiny_model: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(failures, "serves_on_cpu", lambda: False)
    for name, value in (("is_available", True), ("get_device_capability", capability), ("get_device_name", "Card")):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda value=value: value)
    config = dataclasses.replace(CONFIG, quantization=quantization)
    found = failures.start_error(ValueError("as it says"), tiny_model("llama"), config)
    assert re.search(said, str(found))


STARTS = """
import pathlib, sys, time
from vllm.v1.engine.llm_engine import LLMEngine
from eggroll_llm.config.schema import EngineConfig
from eggroll_llm.engine.vllm.engine import VllmEngine
from eggroll_llm.errors import UserError
from eggroll_llm.es.settings import EsSettings

def start(model, kv_cache_gib, timeout_seconds=600.0):
    config = EngineConfig(
        dtype="float32", kv_cache_gib=kv_cache_gib, slots=2, max_sequences=4, max_model_len=128,
        timeout_seconds=timeout_seconds,
    )
    try:
        VllmEngine(pathlib.Path(model), config, EsSettings())
    except UserError as error:
        print(type(error).__name__, type(error.__cause__).__name__, error, sep="|", flush=True)

known, unknown, good = sys.argv[1:]
start(known, 0.05)
start(unknown, 0.05)
start(good, 1e-4)
LLMEngine.from_engine_args = lambda args: time.sleep(600)
start(good, 0.05, timeout_seconds=1.0)
"""


@pytest.mark.slow
def test_what_a_start_that_fails_says(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """In a process of its own, which the last one ends: it hangs."""
    models = []
    for name, changes in (("known", {}), ("unknown", {"model_type": "foo"})):
        model = shutil.copytree(tiny_model("llama"), tmp_path / name)
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"architectures": ["FooForCausalLM"]} | changes))
        models.append(model)
    command = [sys.executable, "-c", STARTS, *map(str, models), str(tiny_model("llama"))]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    *said, cache = [line.split("|") for line in outcome.stdout.splitlines() if line.count("|") == 2]
    for model, (kind, _, message) in zip(models, said, strict=True):
        assert kind == "ModelError"
        assert message == (
            f"{model}: vLLM does not serve architecture FooForCausalLM with adapters: use one of " + ", ".join(TESTED)
        )
    assert cache == [
        "ConfigError",
        "ValueError",
        "engine.kv_cache_gib = 0.0001: a sequence of 128 tokens (engine.max_model_len) needs 0.01 GiB of key-value "
        "cache: raise engine.kv_cache_gib, or lower engine.max_model_len or sampling.max_tokens",
    ]
    assert outcome.returncode == EXIT_STATUS
    assert "error: the inference engine made no progress for engine.timeout_seconds = 1 seconds" in outcome.stderr
