"""What an engine is made from, wherever it is built."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from eggroll_llm.config.schema import EngineConfig
from eggroll_llm.errors import ModelError
from eggroll_llm.es.settings import EsSettings
from eggroll_llm.models.files import model_identity
from eggroll_llm.models.resolve import resolve_model

if TYPE_CHECKING:
    from eggroll_llm.engine.vllm.engine import VllmEngine


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """Everything that an engine depends on, wherever it is built."""

    model: str
    """Name of the model, for machines that do not have `model_dir`."""
    model_dir: Path
    """Its directory on the driver."""
    engine: EngineConfig
    """With slots, sequences and context settled."""
    es: EsSettings | None = None
    """None: the engine has no masters, and its weights are those of the model or come from a trainer."""
    logprobs: bool = False
    thinking: bool = False
    identity: str = ""
    """Of the model; empty where it need not be checked."""

    def build(self) -> "VllmEngine":
        """Start vLLM in this process. Raises ModelError when this machine has another model."""
        from eggroll_llm.engine.vllm.engine import VllmEngine

        directory = self.model_dir if self.model_dir.is_dir() else resolve_model(self.model)
        if self.identity and (found := model_identity(directory)) != self.identity:
            raise ModelError(f"{directory}: is model {found}, the run is of {self.identity}: use the same files")
        return VllmEngine(directory, self.engine, self.es, logprobs=self.logprobs, thinking=self.thinking)
