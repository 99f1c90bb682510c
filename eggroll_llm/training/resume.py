"""Resume a run: what its directory holds, what of it can be trusted, and the weights to continue from.

An ES run continues after the last update in its journal, a GRPO run after its newest checkpoint. Damage that an
interruption cannot explain is never repaired silently.
"""

from eggroll_llm.config.schema import RunConfig
from eggroll_llm.engine.interface import Engine
from eggroll_llm.errors import CheckpointError, ConfigError, JournalError, RunDirError
from eggroll_llm.es.estimate import UpdateSpec
from eggroll_llm.records.checkpoint import Checkpoint, list_checkpoints, load_training_state, newest_valid, remove_after
from eggroll_llm.records.journal import Journal, JournalHeader
from eggroll_llm.records.run_dir import RunDir
from eggroll_llm.records.updates import check_weights, recorded_update
from eggroll_llm.records.weights import final_step
from eggroll_llm.system.files import remove_directory
from eggroll_llm.system.invocation import command
from eggroll_llm.training.harness import Display
from eggroll_llm.training.plan import plan_of


def say_what_was_found(run: RunDir, journal: Journal, header: JournalHeader, display: Display) -> None:
    """Show what the last process left behind, and whether the task file has changed since."""
    if run.stale_lock:
        display.message(f"the last process that trained here did not shut down cleanly: {run.stale_lock}")
    if journal.dropped_tail:
        display.message(journal.dropped_tail)
    if journal.header and journal.header.task_file not in ("", header.task_file):
        display.message("the task file or a module it imports changed since the run started: rewards may differ")


def check_steps_left(steps: int, run: RunDir) -> None:
    """Raise ConfigError when the run has done more than `steps` already: its weights would be called those of fewer."""
    done = run.last_logged_step() or 0
    if 0 < steps < done:
        again = command("replay", run.path, "--step", steps, "--out", "DIR")
        earlier = f"; the model of an earlier step is rebuilt by: {again}" if run.has_updates_in_journal() else ""
        raise ConfigError(f"steps = {steps}: {run.path} has done {done} steps. Set steps to {done} or more{earlier}")


def by_journal(run: RunDir, journal: Journal, display: Display) -> int:
    """Return the step after which an ES run continues, and drop what is later. Raises JournalError."""
    logged = run.last_logged_step() or 0
    _check_journal(journal, run, logged)
    # In this order: a kill in between must not look as if the journal had lost a step.
    run.truncate_logs(min(journal.last_step, logged) or -1)
    journal.truncate_after(logged)
    _forget_later(run, journal.last_step, display)
    return journal.last_step


def by_checkpoint(run: RunDir, display: Display) -> tuple[int, Checkpoint | None]:
    """Return the step after which a GRPO run continues, and its checkpoint. Raises CheckpointError or RunDirError."""
    checkpoint = _newest(run, None, display)
    if checkpoint is None and list_checkpoints(run.checkpoints):
        raise CheckpointError(
            f"{run.checkpoints}: no checkpoint is valid: restore one, or start from scratch by deleting all or with "
            "--on-existing overwrite"
        )
    step = checkpoint.step if checkpoint else 0
    _check_logged(run, step)
    run.truncate_logs(step or -1)
    if checkpoint:
        _forget_final(run, step, display)
    return step, checkpoint


def restore(engine: Engine, config: RunConfig, run: RunDir, journal: Journal, display: Display) -> Checkpoint | None:
    """Bring the engine to the last step of the journal: newest valid checkpoint, which is returned, then replay.

    Raises:
        CheckpointError: its training state does not match its weights.
        JournalError: replaying gives weights other than those recorded.
    """
    if not journal.last_step:
        return None
    checkpoint = _newest(run, journal.last_step, display)
    start = 0
    if checkpoint:
        start = checkpoint.step
        engine.load_state(load_training_state(checkpoint))
        if checkpoint.metadata["checksum"] != engine.checksum():
            raise CheckpointError(
                f"{checkpoint.path}: its training state does not match its weights. Delete it: the run then "
                "resumes from an earlier one and the journal."
            )
    display.message(f"resuming after step {journal.last_step}: {_sources(start, journal.last_step)}")
    pending: list[UpdateSpec] = []
    for entry in journal.entries[start : journal.last_step]:
        if entry.checksum and pending:
            engine.replay(pending)
            pending = []
        check_weights(run.journal, entry, engine.checksum)
        pending.append(recorded_update(plan_of(config, entry.step), entry))
    if pending:
        engine.replay(pending)
    return checkpoint


def _sources(checkpoint: int, last: int) -> str:
    """Return where the weights of step `last` come from; checkpoint 0 means the base model."""
    begin = f"checkpoint of step {checkpoint}" if checkpoint else "base model"
    count = last - checkpoint
    return begin + (f" and {count} update{'s' * (count > 1)} from the journal" if count else "")


def _check_journal(journal: Journal, run: RunDir, logged: int) -> None:
    """Raise JournalError when journal and metrics, of `logged` steps, differ by more than an interruption explains.

    A step is in the journal first, so the metrics may lack one, which is then repeated with the same outcome. They may
    have one more than the journal only when its last line was dropped.
    """
    last, other, reached = journal.last_step, run.metrics.name, logged
    newest = max((step for step, _ in list_checkpoints(run.checkpoints)), default=0)
    if not last and newest > logged:  # without either file, checkpoints still say that there were steps
        other, reached = run.checkpoints.name, newest
    if reached - bool(journal.dropped_tail) <= last <= reached + 1:
        return
    ahead, behind = (journal.path.name, other) if last > reached else (other, journal.path.name)
    least = min(last, reached)
    back = f"cut {ahead} after step {least} too and lose what came later" if least else "start a new run directory"
    raise JournalError(
        f"{run.path}: {journal.path.name} ends at step {last}, {other} at step {reached}, which no interruption "
        f"explains. Restore {behind} from a backup, or {back}."
    )


def _forget_later(run: RunDir, step: int, display: Display) -> None:
    """Remove checkpoints of updates that the journal no longer holds, before it holds others of the same step."""
    if removed := remove_after(run.checkpoints, step):
        names = ", ".join(path.name for path in removed)
        display.message(f"{run.checkpoints}: {names} removed: the journal ends at step {step}")
    _forget_final(run, step, display)


def _forget_final(run: RunDir, step: int, display: Display) -> None:
    """Remove a final model of later updates than the run goes on from: the same step comes to other weights."""
    if (final := final_step(run) or 0) > step:
        remove_directory(run.final)
        display.message(f"{run.final}: removed, it is of step {final} and the run goes on after step {step}")


def _check_logged(run: RunDir, step: int) -> None:
    """Raise RunDirError when the metrics end before the checkpoint to resume from."""
    logged = run.last_logged_step() or 0
    if step > logged:
        raise RunDirError(
            f"{run.metrics}: ends at step {logged}, but the newest checkpoint is of step {step}: restore the file, or "
            "delete the later checkpoints"
        )


def _newest(run: RunDir, at_most: int | None, display: Display) -> Checkpoint | None:
    """Return the newest valid checkpoint, and show why newer ones are not valid."""
    newest = newest_valid(run.checkpoints, at_most=at_most)
    for refusal in newest.refused:
        display.message(refusal)
    return newest.checkpoint
