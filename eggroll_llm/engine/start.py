"""Starts the engine of a run or an evaluation: one in this process, or several in others."""

from collections.abc import Callable
from pathlib import Path

from eggroll_llm.config.schema import EngineConfig
from eggroll_llm.engine.blueprint import Blueprint
from eggroll_llm.engine.interface import Engine
from eggroll_llm.es.settings import EsSettings
from eggroll_llm.system import installed
from eggroll_llm.system.hardware import serves_on_cpu


def in_this_process(engine: EngineConfig) -> bool:
    """Return whether a run has one engine, in the process of the run."""
    return engine.replicas == 1 or (engine.replicas == 0 and serves_on_cpu())


def start_engine(
    model_dir: Path,
    config: EngineConfig,
    *,
    es: EsSettings | None = None,
    logprobs: bool = False,
    thinking: bool = False,
    model: str = "",
    logs: Path | None = None,
    say: Callable[[str], None] = lambda sentence: None,
) -> Engine:
    """Start vLLM on a checked model directory, with slots, sequences and context of the configuration settled.

    With `es` it serves the members of a population and updates the weights; without, it only answers with weights that
    come from outside. `logprobs`, `thinking`: see `VllmEngine`, also for the errors. `model` is what machines without
    the directory know it by. Engines in other processes print into files in `logs`, if given, and `say` gets a sentence
    when one is lost or joins. Raises UserError.
    """
    name = model or str(model_dir)
    blueprint = Blueprint(model=name, model_dir=model_dir, engine=config, es=es, logprobs=logprobs, thinking=thinking)
    if in_this_process(config):
        return blueprint.build()
    installed.check(f"engine.replicas = {config.replicas}", "ray")
    from eggroll_llm.engine.replicas import start_pool

    return start_pool(blueprint, logs, say)
