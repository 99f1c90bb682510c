"""`eggroll-llm train` with the stand-in engine, in a process of its own, which may stand still for a signal to arrive.

    STUCK=RUN:PHASE:HOW python cli_run.py train RECIPE.toml --run-dir DIR --on-existing resume [--KEY=VALUE ...]

In step 2 of the run whose directory has that name, in that phase, two processes are started, one in a session of its
own, and a file with the run's name and ".stuck" appears beside it. HOW says what becomes of an exception that a signal
raises there: "raise", "swallow" (as by a bare `except:`, with a file ".swallowed"), "unraisable" (in a `__del__`),
"deaf" (swallowed for ever), or "native": in code that does not let Python look for signals.
"""

import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from fake_engine import MEMBERS, PROMPTS, Bench, FakeEngine, Near

from eggroll_llm.cli.main import main
from eggroll_llm.config.recipe import load_recipe
from eggroll_llm.engine.interface import Request
from eggroll_llm.es.estimate import UpdateSpec

VISITS = {"sampling": 2, "reward": MEMBERS * PROMPTS + 5, "update": 2, "evaluation": 2, "saving": 1}
"""How often a phase is entered until it is that of step 2, evaluations being after steps 0 and 2."""


class Stuck:
    """The place where a run stands still."""

    def __init__(self, run: Path, phase: str, how: str) -> None:
        self.run, self.phase, self.how = run, phase, how
        self.left = VISITS.get(phase, 0)
        self.children: list[Any] = []

    def enter(self, phase: str) -> None:
        if phase != self.phase:
            return
        self.left -= 1
        if self.left == 0:
            self.children = [subprocess.Popen(["sleep", "600"], start_new_session=alone) for alone in (False, True)]
            self.run.with_suffix(".stuck").touch()
            getattr(self, f"_{self.how}")()

    def _raise(self) -> None:
        time.sleep(600)

    def _swallow(self) -> None:
        try:
            time.sleep(600)
        except BaseException:
            self.run.with_suffix(".swallowed").touch()

    def _deaf(self) -> None:
        while True:
            self._swallow()

    def _unraisable(self) -> None:
        class Late:
            def __del__(self) -> None:
                time.sleep(600)

        Late()

    def _native(self) -> None:
        library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
        for _ in range(2):
            library.pthread_mutex_lock(mutex)


class StuckTask(Near):
    def __init__(self, stuck: Stuck) -> None:
        self.stuck = stuck

    def reward(self, member: int, value: float, problem: Mapping[str, Any]) -> float:
        if member >= 0:
            self.stuck.enter("reward")
        return super().reward(member, value, problem)


def hold(engine: FakeEngine, stuck: Stuck) -> None:
    update, export = engine.update, engine.export

    def generate(requests: Sequence[Request]) -> None:
        stuck.enter("evaluation" if requests[0].member is None else "sampling")

    def stuck_update(spec: UpdateSpec) -> Any:
        stuck.enter("update")
        return update(spec)

    def stuck_export(directory: Path) -> None:
        (directory / "half").write_text("written")
        stuck.enter("saving")
        (directory / "half").unlink()
        export(directory)

    engine.on_generate = generate
    engine.update, engine.export = stuck_update, stuck_export  # type: ignore[method-assign]


def train(arguments: list[str]) -> int:
    """The command, with the run that it names by the stand-in engine."""
    recipe, run = Path(arguments[1]), Path(arguments[arguments.index("--run-dir") + 1])
    words = arguments[arguments.index("--on-existing") + 2 :]
    name, phase, how = os.environ.get("STUCK", "::").split(":")
    stuck = Stuck(run, phase if run.name == name else "", how)
    bench = Bench(run.parent, pytest.MonkeyPatch())
    bench.prepare_engine = lambda engine: hold(engine, stuck)
    config = load_recipe(recipe, [(key, text) for key, _, text in (word.partition("=") for word in words)])
    with bench.standing_in(run.name, config, StuckTask(stuck)):
        return main(arguments)


if __name__ == "__main__":
    sys.exit(train(sys.argv[1:]))
