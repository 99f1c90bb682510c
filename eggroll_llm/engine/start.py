"""Starts vLLM, for a run or for an evaluation."""

from pathlib import Path

from eggroll_llm.config.schema import EngineConfig
from eggroll_llm.engine.interface import Engine
from eggroll_llm.es.settings import EsSettings


def start_engine(
    model_dir: Path, config: EngineConfig, *, es: EsSettings | None = None, logprobs: bool = False
) -> Engine:
    """Start vLLM on a checked model directory, with `slots` and `max_model_len` of the configuration settled.

    With `es` it serves the members of a population and updates the weights; without, it only answers with weights that
    come from outside. `logprobs`: see `VllmEngine`, also for the errors.
    """
    from eggroll_llm.engine.vllm.engine import VllmEngine

    return VllmEngine(
        model_dir,
        config,
        slots=config.slots,
        rank=es.rank if es else 1,
        max_model_len=config.max_model_len,
        es=es,
        trainable=es is not None,
        logprobs=logprobs,
    )
