"""LoRA adapters as PEFT stores them: adapter_config.json and adapter_model.safetensors.

    W' = W + s B A,    A (rank x in), B (out x rank),    s = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora

Only what this equation says is read. An option that means anything else is rejected by its name, and so is one that
is not known here. Only the standard library is used, so mistakes are found before anything heavy is imported.
"""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eggroll_llm.errors import ModelError
from eggroll_llm.models.files import header_shapes
from eggroll_llm.records.weights import named_with
from eggroll_llm.system.jsonl import parse_json
from eggroll_llm.system.terminal import inert

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_READ = {"peft_type", "base_model_name_or_path", "r", "lora_alpha", "use_rslora", "init_lora_weights"}
_OF_TRAINING = {
    *("task_type", "auto_mapping", "peft_version", "inference_mode", "lora_dropout", "megatron_core"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "qalora_group_size"),
}
"""Options that say how an adapter was trained or saved, or which layers it is of: its tensors say that, too."""
_OFF: tuple[object, ...] = (None, False, "none", "", [], {})
_BASE_UNCHANGED = (None, True, False, "gaussian", "orthogonal", "eva")
"""Initialisations that leave the base model as it is; others, such as "pissa", take from it what the adapter has."""
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_OR_MERGE = "merge it into its base with peft, and name the merged model"
_LARGEST = 2**63  # far above any r or lora_alpha, far below what overflows a float


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """A LoRA adapter whose files were read and checked."""

    path: Path
    scale: float
    """s of the equation."""
    shapes: Mapping[str, tuple[int, int]]
    """(out, in) of each weight that it changes, by the name of the weight in the base model."""


def key_of(parameter: str, factor: str) -> str:
    """Return the name under which PEFT stores factor "A" or "B" of a weight."""
    return f"base_model.model.{parameter.removesuffix('.weight')}.lora_{factor}.weight"


def is_adapter(directory: Path) -> bool:
    """Return whether a directory holds an adapter."""
    return os.path.isfile(directory / CONFIG)


def named_adapter(name: str) -> tuple[Path, str] | None:
    """Return directory and base model of "ADAPTER" or "ADAPTER@BASE", the base empty without one; None for others."""
    return named_with(name, is_adapter)


def recorded_base(directory: Path) -> str:
    """Return the base model that an adapter was trained on, by its own account. Raises ModelError without one."""
    base = _read_config(directory).get("base_model_name_or_path")
    if not isinstance(base, str) or not base.strip():
        raise ModelError(f"{directory / CONFIG} names no base model: name it after an @, as in {directory}@BASE")
    return base


def read_adapter(directory: Path) -> Adapter:
    """Return the adapter in a directory. Raises ModelError for anything but plain LoRA, and for damaged files."""
    config, where = _read_config(directory), directory / CONFIG
    _check_options(config, where)
    if others := sorted(path.name for path in directory.glob("*.safetensors") if path.name != WEIGHTS):
        raise ModelError(
            f"{directory} holds an adapter and other weights ({others[0]}): move {CONFIG} and {WEIGHTS} to a directory "
            "of their own, and name that or this one"
        )
    weights = directory / WEIGHTS
    if not weights.is_file():
        raise ModelError(f"{directory} has no {WEIGHTS}: save the adapter again with peft, as safetensors")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if (
        type(rank) is not int
        or not 0 < rank < _LARGEST
        or not isinstance(alpha, int | float)
        or not abs(alpha) < _LARGEST
    ):
        raise ModelError(f"{where}: r = {rank!r:.40} and lora_alpha = {alpha!r:.40} give no scale: restore the file")
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Adapter(path=directory, scale=scale, shapes=_shapes(weights, rank))


def check_fits(adapter: Adapter, base: Mapping[str, tuple[int, ...]], where: Path) -> None:
    """Raise ModelError unless each weight of the adapter is one of the base, `base` its shapes by name, at `where`."""
    for name, shape in adapter.shapes.items():
        if base.get(name) != shape:
            found = " x ".join(map(str, base[name])) if name in base else "not there"
            raise ModelError(
                f"{adapter.path} is no adapter of {where}: {inert(name)} is {shape[0]} x {shape[1]} in the adapter and "
                f"{found} in the model. Name its own base model after an @: {adapter.path}@BASE"
            )


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    try:
        config = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read ({error}): save the adapter again") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} is not a JSON object: save the adapter again")
    return config


def _check_options(config: Mapping[str, Any], where: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise ModelError(f'{where}: peft_type = {config.get("peft_type")!r:.40}, not "LORA": {_OR_MERGE}')
    if (start := config.get("init_lora_weights")) not in _BASE_UNCHANGED:
        raise ModelError(
            f"{where}: init_lora_weights = {start!r:.40} may have changed the base model as well: {_OR_MERGE}"
        )
    for key, value in config.items():
        if key not in _READ | _OF_TRAINING and value not in _OFF:
            raise ModelError(f"{where}: {inert(key)} = {inert(repr(value), 60)} is not supported: {_OR_MERGE}")


def _shapes(weights: Path, rank: int) -> dict[str, tuple[int, int]]:
    stored = header_shapes(weights)
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, shape in stored.items():
        if not (match := _KEY.fullmatch(key)):
            raise ModelError(f"{weights}: {inert(key)} is no factor of a linear layer: {_OR_MERGE}")
        found.setdefault(f"{match[1]}.weight", {})[match[2]] = shape
    shapes = {}
    for name, factors in found.items():
        match factors:
            case {"A": (first, inside), "B": (out, second)} if first == second == rank:
                shapes[name] = (out, inside)
            case _:
                raise ModelError(f"{weights}: {inert(name)} has no two factors of rank r = {rank}: save it again")
    if not shapes:
        raise ModelError(f"{weights} holds no factors: save the adapter again")
    return shapes
