"""What a grader says of a completion."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Score:
    """Verdict on one completion."""

    reward: float
    """What training maximises; it may contain shaping."""
    correct: bool
    """What accuracy counts."""
    detail: str
    """Why: a word of the grader's `DETAILS`."""
    parts: Mapping[str, float | None] = field(default_factory=dict, hash=False)
    """Where the reward is a sum of several: each by its name, unweighted; None where it does not apply."""
