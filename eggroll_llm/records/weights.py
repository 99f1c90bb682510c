"""Find the weights of a run: at its end, at its best step, or at a step with a checkpoint.

Every model that a run writes names its step in `eggroll.json`, because a run that is extended keeps the old `final/`
until there is a new one.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from eggroll_llm.errors import ConfigError, ModelError
from eggroll_llm.records.checkpoint import checkpoint_path, verify_checkpoint
from eggroll_llm.records.run_dir import RunDir, is_run_dir
from eggroll_llm.system.files import write_text
from eggroll_llm.system.invocation import command
from eggroll_llm.system.jsonl import parse_json

PROVENANCE = "eggroll.json"


def named_run(name: str, at: str = "final") -> tuple[RunDir, str] | None:
    """Return the run of "RUN" or "RUN@STEP", and which of its weights, by default `at`; None for another name.

    Raises ConfigError where both the name and `at` choose.
    """
    found = named_with(name, is_run_dir)
    if found is None:
        return None
    if found[1] and at != "final":
        raise ConfigError(f"{name} and --at {at}: both choose a step: leave one of them out")
    return RunDir.open(found[0]), found[1] or at


def named_with(name: str, known: Callable[[Path], bool]) -> tuple[Path, str] | None:
    """Return the directory of "DIRECTORY" or "DIRECTORY@TEXT" and the text, where `known` knows the directory.

    The name of a directory that exists is never divided.
    """
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return (Path(path), "") if known(Path(path)) else None
    left, at, _ = path.rpartition("@")
    while at:
        if os.path.isdir(left) and known(Path(left)):
            return Path(left), path[len(left) + 1 :]
        left, at, _ = left.rpartition("@")
    return None


def weights_at(run: RunDir, at: str) -> tuple[Path, int]:
    """Return directory and step of the weights `at` "final", "best" or the number of a step.

    Raises:
        ConfigError: `at` is none of these.
        ModelError: the run does not have them.
        CheckpointError: they are damaged.
    """
    finished = final_step(run)
    if at == "final":
        if finished is None:
            raise ModelError(
                f"{run.path}: the run has no final/ yet: choose a checkpoint, {run.path}@STEP, or finish it "
                f"with: {command('resume', run.path)}"
            )
        return run.final, finished
    if at == "best":
        step = _best_trained(run)
    elif at.isdecimal():
        step = int(at)
    else:
        raise ConfigError(f'{run.path}@{at} or --at {at}: write "final", "best" or the number of a step')
    directory = checkpoint_path(run.checkpoints, step)
    if directory.is_dir():
        return verify_checkpoint(directory).path, step
    if step == finished:
        return run.final, step
    if not run.has_updates_in_journal():
        raise ModelError(
            f"{directory}: step {step} has no checkpoint, and the run has no journal to rebuild it: choose another step"
        )
    rebuilt = run.path.with_name(f"{run.path.name}-step-{step}")
    raise ModelError(
        f"{directory}: step {step} has no checkpoint: rebuild it as follows and name its directory: "
        f"{command('replay', run.path, '--step', step, '--out', rebuilt)}"
    )


def final_step(run: RunDir) -> int | None:
    """Return the step of the weights in `final/`; None when there are none, or they do not say."""
    return recorded_origin(run.final)[0]


def recorded_origin(directory: Path) -> tuple[int | None, str]:
    """Return the step and the identity of the base model that `write_provenance` wrote; None and "" without them."""
    try:
        found = parse_json((directory / PROVENANCE).read_bytes())
        return int(found["step"]), str(found.get("base_model", ""))
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None, ""


def write_provenance(directory: Path, *, step: int, base_model: str) -> None:
    """Write into a model's directory which step of a run on which base model it is. Raises OSError."""
    write_text(directory / PROVENANCE, json.dumps({"step": step, "base_model": base_model}) + "\n")


def best_step(metrics: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the row with the highest held-out accuracy, of equal ones the first; None without an evaluation."""
    evaluated = [row for row in metrics if row.get("eval/accuracy") is not None]
    return max(evaluated, key=lambda row: row["eval/accuracy"], default=None)


def _best_trained(run: RunDir) -> int:
    best = best_step(run.read_metrics())
    if best is None:
        raise ModelError(f"{run.path}: the run has no evaluation yet: choose a checkpoint, {run.path}@STEP")
    if best["step"] == 0:
        raise ModelError(f"{run.path}: no step was better than the base model: use that one, or the final one")
    return int(best["step"])
