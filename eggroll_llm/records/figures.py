"""What a run's diagnosis rests on, in numbers: rows of metrics -> names and figures. `diagnosis` says what is wrong."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from eggroll_llm.config.schema import RunConfig
from eggroll_llm.records.accuracy import accuracy_text, percent
from eggroll_llm.records.diagnosis import RECENT, share_of, tied_share, unread_share
from eggroll_llm.system.jsonl import number, whole

Row = Mapping[str, Any]


def figures(config: RunConfig, rows: Sequence[Row]) -> dict[str, str]:
    """Return what was measured in the last steps by its name; what was not recorded is left out."""
    recent = [row for row in rows if row["step"]][-RECENT:]
    evaluations = [row for row in rows if math.isfinite(number(row, "eval/accuracy"))]
    if not recent:
        return {}
    tied = "problems on which both twins tied" if config.own_problems else "problems on which all rewards tied"
    found = {tied: tied_share(config, recent)}
    answering = "members" if config.members_answer else "the weights"
    found[f"training problems solved by {answering}"] = share_of(recent, "reward/accuracy")
    shown = {name: percent(share) for name, share in found.items() if math.isfinite(share)}
    if evaluations:
        last = evaluations[-1]
        solved = accuracy_text(number(last, "eval/accuracy"), whole(last, "eval/problems"))
        shown[f"held-out problems solved by the weights, step {last['step']}"] = solved
    more = {
        "answers of twins of which one is right": share_of(recent, "twins/differ"),
        "of those, the other's form was refused": unread_share(recent),
        "answers cut off": share_of(recent, "completions/truncated"),
    }
    shown |= {name: percent(share) for name, share in more.items() if math.isfinite(share)}
    distances = {
        "members from the weights": [number(row, "members/divergence") for row in recent],
        "weights from the base model": [number(row, "base/divergence") for row in evaluations[-1:]],
    }
    for name, values in distances.items():
        if finite := [value for value in values if math.isfinite(value)]:
            shown[f"divergence of {name}"] = f"{sum(finite) / len(finite):.2g} nats a token"
    return shown
