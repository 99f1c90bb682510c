"""A recipe of a few lines, and what is said where it, or another text in its place, is refused."""

from pathlib import Path

import pytest

from eggroll_llm.config.recipe import load_recipe
from eggroll_llm.errors import ConfigError

RECIPE = """\
# two-number Countdown
task = "countdown"
steps = 30

[task_options]
numbers = 2

[es]
sigma = 1.2e-2
learning_rate = 1.5e-3  # of each weight
"""
TOO_DEEP = "values are nested more than 32 levels deep. Flatten them."
TOO_LARGE = "integers have 64 bits. Write a smaller number."


def refusal(path: Path, *overrides: tuple[str, str], text: str | None = None) -> str:
    """Message of the error that the recipe (or the text, written there) gives, without the folder."""
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as info:
        load_recipe(path, overrides)
    return str(info.value).replace(f"{path.parent}/", "")
