"""Answers of the weights whose log-probabilities are needed later, so that an interrupted run goes on with the same.

Several steps may learn from the answers of one (drawn.json), and all later weights are compared with those that gave
the first (reference.json).
"""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from eggroll_llm.system.jsonl import parse_json

Tokens = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """Answers of a step, with what later steps need of it."""

    step: int
    """Step before whose update they were drawn."""
    indices: tuple[int, ...]
    """Problems."""
    token_ids: tuple[tuple[Tokens, ...], ...]
    """Answers in tokens, by problem."""
    rewards: tuple[tuple[float, ...], ...] = ()
    """Their rewards, by problem; NaN and infinity are kept. A reference has none."""
    logprobs: tuple[float, ...] = ()
    """Float32 log-probabilities of the scored tokens under the weights that drew them; empty until they are asked."""
    metrics: dict[str, float] = field(default_factory=dict)
    """What the row of that step said of the rewards."""


def drawn_text(drawn: Drawn) -> str:
    """Return what `read_drawn` reads."""
    return json.dumps(asdict(drawn))


def read_drawn(path: Path) -> Drawn | None:
    """Return the answers in a file; None when there is none, or when it is not ours."""
    try:
        return _drawn(parse_json(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _drawn(fields: dict[str, Any]) -> Drawn:
    drawn = Drawn(
        step=fields["step"],
        indices=tuple(fields["indices"]),
        token_ids=tuple(tuple(tuple(ids) for ids in samples) for samples in fields["token_ids"]),
        rewards=tuple(tuple(samples) for samples in fields["rewards"]),
        logprobs=tuple(fields["logprobs"]),
        metrics=dict(fields["metrics"]),
    )
    if type(drawn.step) is not int or not all(math.isfinite(value) for value in drawn.logprobs):
        raise ValueError("not answers")
    return drawn
