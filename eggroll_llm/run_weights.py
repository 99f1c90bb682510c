"""Which weights of a run are meant: those at its end, at its best step, or at a step that has a checkpoint."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from eggroll_llm.checkpoint import checkpoint_path, verify_checkpoint
from eggroll_llm.errors import ConfigError, ModelError
from eggroll_llm.journal import read_journal
from eggroll_llm.run_dir import RunDir


def weights_at(run: RunDir, at: str) -> tuple[Path, int]:
    """Return directory and step of the weights `at` "final", "best" or the number of a step.

    Raises:
        ConfigError: `at` is none of these.
        ModelError: the run does not have them.
        CheckpointError: they are damaged.
        JournalError: the journal is damaged.
    """
    last = len(read_journal(run.journal).entries)
    if at == "final":
        if not run.final.is_dir():
            raise ModelError(
                f"{run.path}: the run has no final/ yet: finish it with --on-existing resume, or take one of its "
                "checkpoints with --at STEP"
            )
        return run.final, last
    if at == "best":
        step = _best_trained(run)
    elif at.isdecimal():
        step = int(at)
    else:
        raise ConfigError(f'--at {at}: write "final", "best" or the number of a step')
    directory = checkpoint_path(run.checkpoints, step)
    if directory.is_dir():
        return verify_checkpoint(directory).path, step
    if step == last and run.final.is_dir():
        return run.final, step
    raise ModelError(
        f"{directory}: step {step} has no checkpoint: rebuild it with eggroll-llm replay {run.path} "
        f"--step {step} --out DIR, and name DIR"
    )


def best_step(metrics: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the row with the highest held-out accuracy, of equal ones the first; None without an evaluation."""
    evaluated = [row for row in metrics if row.get("eval/accuracy") is not None]
    return max(evaluated, key=lambda row: row["eval/accuracy"], default=None)


def _best_trained(run: RunDir) -> int:
    best = best_step(run.read_metrics())
    if best is None:
        raise ModelError(f"{run.path}: the run has no evaluation yet: take one of its checkpoints with --at STEP")
    if best["step"] == 0:
        raise ModelError(f"{run.path}: no step was better than the base model: take that one, or --at final")
    return int(best["step"])
