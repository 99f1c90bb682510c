"""What is said when vLLM does not start: the setting or the model that it is about."""

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

CONFIG = EngineConfig(kv_cache_gib=0.5)
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
    found = failures.start_error(ValueError(error), tiny_model("llama"), CONFIG, 4096)
    assert type(found) is kind
    assert re.search(said, str(found))
    assert str(found).isprintable()


START = """
import pathlib, sys
from eggroll_llm.config.schema import EngineConfig
from eggroll_llm.engine.vllm.engine import VllmEngine
from eggroll_llm.errors import UserError
try:
    VllmEngine(
        pathlib.Path(sys.argv[1]),
        EngineConfig(dtype="float32", kv_cache_gib=float(sys.argv[2]), max_sequences=4),
        slots=2,
        rank=1,
        max_model_len=128,
    )
except UserError as error:
    print(type(error).__name__, type(error.__cause__).__name__, error, sep="|")
"""


def start(model: Path, kv_cache_gib: float) -> list[str]:
    """In a process of its own: what a start that failed leaves behind would be in the way of the next engine."""
    command = [sys.executable, "-c", START, str(model), str(kv_cache_gib)]
    outcome = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    return outcome.stdout.splitlines()[-1].split("|")


@pytest.mark.slow
def test_a_cache_that_holds_no_sequence_names_the_settings(tiny_model: Callable[[str], Path]) -> None:
    kind, cause, message = start(tiny_model("llama"), 1e-4)
    assert (kind, cause) == ("ConfigError", "ValueError")
    assert message == (
        "engine.kv_cache_gib = 0.0001: a sequence of 128 tokens (engine.max_model_len) needs 0.01 GiB of key-value "
        "cache: raise engine.kv_cache_gib, or lower engine.max_model_len or sampling.max_tokens"
    )


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"model_type": "foo"}], ids=["known-type", "unknown-type"])
def test_an_architecture_that_vllm_does_not_know_is_refused(
    tiny_model: Callable[[str], Path], tmp_path: Path, changes: dict[str, Any]
) -> None:
    model = shutil.copytree(tiny_model("llama"), tmp_path / "foo")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["FooForCausalLM"]} | changes))
    kind, _, message = start(model, 0.05)
    assert kind == "ModelError"
    assert message == (
        f"{model}: vLLM does not serve architecture FooForCausalLM with adapters: use one of " + ", ".join(TESTED)
    )


HANGS = START.replace(
    "try:",
    """
import time
from vllm.v1.engine.llm_engine import LLMEngine
LLMEngine.from_engine_args = lambda args: time.sleep(600)
try:""",
).replace("max_sequences=4", "max_sequences=4, timeout_seconds=1.0")


@pytest.mark.vllm
def test_a_start_that_hangs_ends_the_process(tiny_model: Callable[[str], Path]) -> None:
    command = [sys.executable, "-c", HANGS, str(tiny_model("llama")), "0.05"]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert outcome.returncode == EXIT_STATUS
    assert "error: the inference engine made no progress for engine.timeout_seconds = 1 seconds" in outcome.stderr
