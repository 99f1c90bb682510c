"""What a grader says of a completion."""

from collections.abc import Mapping
from dataclasses import dataclass, field

UNREAD = frozenset(
    {"no_marker", "no_number", "several_numbers", "not_plain", "hedged", "unclosed", "truncated", "syntax", "too_long"}
    | {"too_deep", "no_answer", "no_letter", "several"}
)
"""Words of the graders' `DETAILS` for a text whose form was refused, whatever its answer is worth."""


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

    @property
    def unread(self) -> bool:
        """Return whether a grader refused the form of the text."""
        return not self.correct and self.detail in UNREAD
