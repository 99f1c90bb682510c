"""Settings of an evolution strategy over a module: which of `EsSettings` there are, checked, and their hash."""

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from eggroll_llm.bounds import check_bounds
from eggroll_llm.errors import ConfigError
from eggroll_llm.es.estimate import UpdateSpec, check_finite
from eggroll_llm.es.fitness import shape_fitness
from eggroll_llm.es.optimizer import STATE_KEYS
from eggroll_llm.es.plan import plan_step
from eggroll_llm.es.settings import EsSettings, without_effect

OTHERS = frozenset(
    ("antithetic", "update_scale", "optimizer", "momentum", "adam_beta1", "adam_beta2", "adam_eps", "noise_reuse")
) | {"sigma_schedule", "learning_rate_schedule", "schedule_end"}
"""Those that concern a module besides the arguments of `ES`."""


def checked_settings(others: Mapping[str, Any], *, seed: int, steps: int, **own: Any) -> EsSettings:
    """Return the settings, some of `OTHERS` among them. Raises ConfigError for unknown ones and impossible values."""
    if unknown := others.keys() - OTHERS:
        raise ConfigError(f"{min(unknown)}: is not a setting of ES, which are {', '.join(sorted(OTHERS))}")
    es = EsSettings(**own, **others)
    if es.optimizer not in STATE_KEYS:
        raise ConfigError(f"optimizer = {es.optimizer!r}: must be one of {', '.join(STATE_KEYS)}")
    if es.learning_rate == 0:
        raise ConfigError("lr = 0.0: must be positive")
    if es.optimizer == "momentum" and es.momentum == 0:
        raise ConfigError('momentum = 0.0: is plain SGD. Set momentum to 0.9, or optimizer to "sgd"')
    for sentence in without_effect(es):
        warnings.warn(sentence, stacklevel=3)
    try:
        check_bounds(es)
        plan = plan_step(es, seed=seed, step=1, steps=steps)
        for step in (plan, plan_step(es, seed=seed, step=max(1, steps), steps=steps)):  # where a schedule ends
            _ = step.noise
        shape_fitness(torch.zeros(es.population, 1), es.fitness, antithetic=es.antithetic)
        check_finite(UpdateSpec.of(plan, (0.0, 0.0)))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return es


def settings_hash(settings: EsSettings, **others: Any) -> str:
    """Return the SHA-256 of settings that may not change within a run; those at their default do not count."""
    default = dataclasses.asdict(EsSettings())
    changed = {key: value for key, value in dataclasses.asdict(settings).items() if value != default[key]}
    return hashlib.sha256(json.dumps(others | changed, sort_keys=True).encode()).hexdigest()
