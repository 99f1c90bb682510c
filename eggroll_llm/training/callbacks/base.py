"""What a run calls as it goes: code of its user, and trackers.

All calls are made in the thread that trains, between two steps, when what they are about is on disk. What a callback
raises ends the run with that exception, and the run can be resumed; `StopTraining` ends it as its limit would.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from eggroll_llm.errors import ConfigError
from eggroll_llm.records.answers import Sample

OnStep = Callable[[Mapping[str, Any]], None]
"""Called with the row of metrics of each finished step, evaluation included."""


class StopTraining(Exception):  # noqa: N818 (no error)
    """Raise this in a callback to end the run after this step: `final/` is written, and `resume` trains on."""


class Callback:
    """Base class of callbacks; override what you need.

    The order is that of the methods. Step 0 is the base model, which has an evaluation and no samples.
    """

    def on_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Take completions of a training step: the rows of completions.jsonl, `log.completions` of them."""

    def on_evaluation(self, step: int, metrics: Mapping[str, Any], samples: Sequence[Sample]) -> None:
        """Take an evaluation of the held-out problems: its metrics ("eval/accuracy", ...) and every graded answer."""

    def on_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Take the row of metrics.jsonl of a finished step, with its evaluation if it had one."""

    def on_end(self) -> None:
        """Clean up: the run is over, whatever ended it."""


class FunctionOfStep(Callback):
    """A plain function as a callback."""

    def __init__(self, function: OnStep) -> None:
        self._function = function

    def on_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._function(metrics)


class Callbacks:
    """Several callbacks, called one after the other."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks = callbacks
        self.stopped = False
        """Whether one of them has ended the run."""
        self.reason = ""
        """What it said, if anything."""

    def end_step(self, row: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], answers: Sequence[Sample]) -> None:
        """Report a step that is on disk; `answers` are those of its evaluation, empty without one."""
        step = row["step"]
        evaluation = {key: value for key, value in row.items() if key.startswith("eval/")}
        for callback in self._callbacks:
            try:
                if samples:
                    callback.on_samples(step, samples)
                if answers:
                    callback.on_evaluation(step, evaluation, answers)
                callback.on_step(step, row)
            except StopTraining as stop:
                self.stopped, self.reason = True, str(stop)

    def close(self) -> None:
        """Report the end to all, whatever one of them raises."""
        with ExitStack() as stack:
            for callback in reversed(self._callbacks):
                stack.callback(callback.on_end)


def check_callbacks(callbacks: Sequence[object]) -> None:
    """Raise ConfigError for what is no callback, such as a class in the place of its instance."""
    for i, callback in enumerate(callbacks):
        if not isinstance(callback, Callback):
            raise ConfigError(
                f"callbacks[{i}] = {callback!r:.80}: not an instance of a subclass of eggroll_llm.Callback. Derive its "
                "class from Callback, or pass a function of the row of metrics as on_step."
            )
