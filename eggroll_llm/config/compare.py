"""Two configurations side by side: what differs, and what may differ when a run resumes."""

import dataclasses
import hashlib
import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from eggroll_llm.config.schema import METHOD_TABLES, GrpoConfig, RunConfig
from eggroll_llm.config.toml import format_value
from eggroll_llm.errors import ConfigError
from eggroll_llm.es.settings import EsSettings

_MAY_CHANGE = ("steps", "minutes", "eval.every", "grpo.gradient_checkpointing")
_ADDED = {
    "chat.system": "",
    "chat.template_file": "",
    "es.masters": "float32",
    "es.fitness_from": "rewards",
    "es.weighting": "ratio",
    "es.layers": (),
    "es.answer_reuse": 1,
    "es.max_drift": 0.0,
    "es.problems": "shared",
    "es.skip_tied": False,
    "grpo.mask_truncated_completions": False,
    "engine.quantization": "none",
    "sampling.top_k": 0,
    "sampling.min_p": 0.0,
    "sampling.repetition_penalty": 1.0,
    "sampling.stop": (),
    "sampling.thinking_token_budget": 0,
}
"""Settings that were added since, with their defaults: the hash of a run that does not use them stays what it was."""
MAY_CHANGE = f"{', '.join(_MAY_CHANGE)}, [log], [checkpoint], [reward], [engine] except dtype and quantization"
"""What `may_change` allows, in words; steps only without a schedule."""


def of_its_method(config: RunConfig) -> RunConfig:
    """Return the configuration with the tables of other methods reset to their defaults."""
    return dataclasses.replace(
        config,
        es=config.es if config.method == "es" else EsSettings(),
        grpo=config.grpo if config.method == "grpo" else GrpoConfig(),
    )


def flat(config: RunConfig) -> dict[str, Any]:
    """Return dotted key -> value of every setting, task options included."""
    return dict(_leaves(dataclasses.asdict(config), ""))


def differences(a: RunConfig, b: RunConfig) -> list[str]:
    """Return dotted keys whose values differ, in the order of the configuration."""
    flat_a, flat_b = flat(a), flat(b)
    # Compared as text: 1, 1.0 and true are equal in Python but are not the same setting.
    return [key for key in flat_a | flat_b if _shown(flat_a, key) != _shown(flat_b, key)]


def outcome_differences(a: RunConfig, b: RunConfig) -> list[str]:
    """Return the settings in which two runs differ and that their outcome depends on; limits and seed are some."""

    def counts(key: str) -> bool:
        return (key in ("steps", "minutes") or not may_change(key)) and applies(key, a) and applies(key, b)

    return [key for key in differences(a, b) if counts(key)]


def may_change(key: str) -> bool:
    """Return whether a resumed run may change a setting: only those that the updates do not depend on.

    The evaluation problems may not change, because accuracies within a run must be comparable. The limits of [reward]
    and [engine] may: they protect the machine and may have been too tight.
    """
    if key.startswith("engine."):
        return key not in ("engine.dtype", "engine.quantization")
    return key in _MAY_CHANGE or key.startswith(("log.", "checkpoint.", "reward."))


def applies(key: str, config: RunConfig) -> bool:
    """Return whether a setting applies to the run; those in the table of another method do not."""
    table = key.partition(".")[0]
    return table not in METHOD_TABLES or table == config.method


def check_resume(saved: RunConfig, now: RunConfig, *, saved_in: str) -> None:
    """Raise ConfigError, showing each difference, when `now` cannot continue the run of `saved` (a file)."""
    keys = [
        key
        for key in differences(saved, now)
        if applies(key, saved) and (not may_change(key) or (key == "steps" and is_scheduled(saved)))
    ]
    if not keys:
        return
    old, new = flat(saved), flat(now)
    shown = "; ".join(f"{key} was {_shown(old, key)} and is now {_shown(new, key)}" for key in keys)
    final = Path(saved_in).parent / "final"
    from_weights = f" from the weights of this one with --model {shlex.quote(str(final))}" if final.is_dir() else ""
    raise ConfigError(
        f"{saved_in}: cannot resume with changed settings: {shown}. Restore them, or start a new run{from_weights}. "
        f"Settings that may change: {MAY_CHANGE}."
    )


def is_scheduled(config: RunConfig) -> bool:
    """Return whether a schedule depends on the number of steps, which then may not change within a run."""
    if config.method == "es":
        return {config.es.sigma_schedule, config.es.learning_rate_schedule} != {"constant"}
    return config.grpo.learning_rate_schedule != "constant"


def frozen_hash(config: RunConfig) -> str:
    """Return the SHA-256 of the settings that may not change within a run."""
    frozen = {
        key: value
        for key, value in flat(config).items()
        if applies(key, config) and not may_change(key) and (key not in _ADDED or value != _ADDED[key])
    }
    return hashlib.sha256(json.dumps(frozen, sort_keys=True, default=str).encode()).hexdigest()


def _leaves(table: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _shown(values: Mapping[str, Any], key: str) -> str:
    return format_value(values[key], key) if key in values else "not set"
