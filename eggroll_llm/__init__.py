"""Fine-tune language models by evolution strategies on vLLM.

The public names load what they need when they are first used: `import eggroll_llm` is light.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eggroll_llm.api import evaluate, load_recipe, plot, train

__all__ = ["evaluate", "load_recipe", "plot", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from eggroll_llm import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return __all__
