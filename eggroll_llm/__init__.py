"""Fine-tune language models, and train any torch module, by evolution strategies.

The public names load what they need when they are first used: `import eggroll_llm` is light, and `ES` needs torch only.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eggroll_llm.api import evaluate, load_recipe, plot, train
    from eggroll_llm.module.es import ES
    from eggroll_llm.training.callbacks.base import Callback, StopTraining

_PLACES = {
    "Callback": "training.callbacks.base",
    "ES": "module.es",
    "StopTraining": "training.callbacks.base",
    "evaluate": "api",
    "load_recipe": "api",
    "plot": "api",
    "train": "api",
}
__all__ = ["ES", "Callback", "StopTraining", "evaluate", "load_recipe", "plot", "train"]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
