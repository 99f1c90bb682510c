"""How far a run has come and when it ends: after a number of steps or of minutes in training, whichever comes first."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Course:
    """How far a run has come."""

    fraction: float | None
    """Of the limit that is nearest, 0 to 1; None without limits."""
    seconds_left: float | None
    """Until that limit, evaluations not counted; None without limits, or where nothing is known yet."""
    best: float | None
    """Highest accuracy so far; None before the first evaluation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What ends a run; 0 is no limit. Wall time, in seconds, is that of the steps, without evaluations."""

    steps: int
    minutes: float

    def reached(self, step: int, wall_time: float) -> bool:
        """Return whether a run that has done `step` steps is over."""
        return bool(self.steps and step >= self.steps) or bool(self.minutes and wall_time >= 60 * self.minutes)

    def label(self, step: int) -> str:
        """Return "step 3 of 50", or "step 3" where no limit of steps is set."""
        return f"step {step:>{len(str(self.steps))}} of {self.steps}" if self.steps else f"step {step}"

    def course(self, step: int, wall_time: float, best: float | None) -> Course:
        """Return how far a run has come after `step` steps."""
        done = [step / self.steps] if self.steps else []
        done += [wall_time / (60 * self.minutes)] if self.minutes else []
        return Course(
            fraction=min(1.0, max(done)) if done else None,
            seconds_left=self.seconds_left(step, wall_time),
            best=best,
        )

    def seconds_left(self, step: int, wall_time: float) -> float | None:
        """Estimate from the limit that will be reached first; None without limits, and before the first step."""
        if not step:
            return None
        estimates = []
        if self.steps:
            estimates.append(wall_time / step * (self.steps - step))
        if self.minutes:
            estimates.append(60 * self.minutes - wall_time)
        return max(0.0, min(estimates)) if estimates else None
