"""The options of task "verifiers"."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifiersOptions:
    """Options of task "verifiers"."""

    environment: str = ""
    """Name of an installed environment, as vf.load_environment takes it; or a Python file that defines
    load_environment, relative to the recipe's folder."""
    args: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of load_environment."""
    test_share: float = 0.1
    """Share of the training rows that is held out where the environment has no evaluation data set."""
    seed: int = 0
    """Seed that chooses the rows held out, independent of the seed of the run."""
