"""One engine in this process, or several in others."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from eggroll_llm.config.schema import EngineConfig
from eggroll_llm.engine.blueprint import Blueprint
from eggroll_llm.system import installed
from eggroll_llm.system.hardware import serves_on_cpu

if TYPE_CHECKING:
    from eggroll_llm.engine.interface import Engine


def in_this_process(engine: EngineConfig) -> bool:
    """Return whether a run has one engine, in the process of the run."""
    return engine.replicas == 1 or (engine.replicas == 0 and serves_on_cpu())


def start(blueprint: Blueprint, logs: Path | None, say: Callable[[str], None]) -> "Engine":
    """Start the engines of a run or an evaluation. Raises UserError.

    Those in other processes write what they print to files in `logs`, where there is such a folder; `say` gets a
    sentence when one is lost or joins.
    """
    if in_this_process(blueprint.engine):
        return blueprint.build()
    installed.check(f"engine.replicas = {blueprint.engine.replicas}", "ray")
    from eggroll_llm.engine.replicas import start_pool

    return start_pool(blueprint, logs, say)
