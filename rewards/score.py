"""What a grader says of a completion."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Score:
    """Verdict on one completion."""

    reward: float
    """What training maximises; it may contain shaping."""
    correct: bool
    """What accuracy counts."""
    detail: str
    """Why: a word of the grader's `DETAILS`."""
