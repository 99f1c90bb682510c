"""What accuracies are read next to: the best constant answer, and the kinds of problem that they are made of."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from eggroll_llm.records.answers import TASK, Sample

MOST_KINDS = 20
"""Kinds that are told apart; of more, the rarest count together."""
OTHERS = "others"


@dataclass(frozen=True, kw_only=True, slots=True)
class Constant:
    """The best of the answers that are the same, or follow the same pattern, in every problem."""

    pattern: str
    """The answer, or a pattern such as "a - b, largest first"; inert, and short."""
    accuracy: float
    """Fraction of the held-out problems that it solves."""
    problems: int
    """Number of held-out problems."""

    def settings(self) -> dict[str, Any]:
        """Return it as an evaluation's file holds it, next to the settings."""
        return {"constant": asdict(self)}

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Self | None:
        """Return what `settings` wrote there; None for anything else."""
        try:
            found = settings["constant"]
            return cls(
                pattern=str(found["pattern"]), accuracy=float(found["accuracy"]), problems=int(found["problems"])
            )
        except (KeyError, TypeError, ValueError):
            return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """Accuracy on the problems of one kind."""

    accuracy: float
    problems: int


def by_kind(samples: Iterable[Sample], grader: str = TASK) -> dict[str, Share]:
    """Return the accuracy on each kind of problem, in the order of their numbers and names; {} for fewer than two."""
    right: dict[str, list[bool]] = defaultdict(list)
    problems: dict[str, set[int]] = defaultdict(set)
    samples = [sample for sample in samples if sample.kind and grader in sample.scores]
    counts = Counter(sample.kind for sample in samples)
    kept = {kind for kind, _ in sorted(counts.items(), key=lambda kind: (-kind[1], _place(kind[0])))[:MOST_KINDS]}
    for sample in samples:
        kind = sample.kind if sample.kind in kept else OTHERS
        right[kind].append(sample.scores[grader].correct)
        problems[kind].add(sample.problem)
    if len(right) < 2:
        return {}
    return {
        kind: Share(accuracy=sum(right[kind]) / len(right[kind]), problems=len(problems[kind]))
        for kind in sorted(right, key=lambda kind: (kind == OTHERS, _place(kind)))
    }


def _place(kind: str) -> tuple[int, str]:
    """Return what sorts "2 steps" before "10 steps"."""
    number = re.match(r"\d{1,9}", kind)
    return (int(number[0]) if number else -1, kind)
