"""Runs that are killed, by SIGKILL and at any instant, and resumed: each must end like the one that was not.

    python soak.py es FOLDER | python soak.py grpo FOLDER MODEL

A process of its own, which imports everything once and forks for each run, before anything in it starts a thread.
Prints what it did as JSON.
"""

import io
import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from eggroll_llm.config.schema import CheckpointConfig

Run = Callable[[str], None]
"""Begins or resumes the run of that name, and makes it to the end."""


def die_at(change: int) -> None:
    """From now on count what changes the disk, writes by halves, and kill this process just before that change."""
    done = itertools.count(1)

    def count(*_: Any) -> None:
        if next(done) == change:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            count()
            return real(*arguments, **options)

        return call

    class Unbuffered(io.FileIO):
        def write(self, data: Any) -> int:
            count()
            written = super().write(data[: len(data) // 2])
            count()
            return written + super().write(data[len(data) // 2 :])

        def truncate(self, size: int | None = None) -> int:
            count()
            return super().truncate(size)

    real_open = Path.open

    def open_path(self: Path, mode: str = "r", buffering: int = -1, *rest: Any, **options: Any) -> Any:
        return Unbuffered(self, mode) if buffering == 0 else real_open(self, mode, buffering, *rest, **options)

    for name in ("ftruncate", "mkdir", "pwrite", "rename", "replace", "rmdir", "unlink"):
        setattr(os, name, counted(getattr(os, name)))
    os.fsync = count  # a kill loses nothing that was written, so that syncing is an instant like others, and slow
    Path.open = open_path  # type: ignore[method-assign]


def comes_to_its_end(run: Run, name: str, *, die: int = 0, seconds: float | None = None) -> bool:
    """Make a run in a child; False when it was killed, at a change of the disk or after some seconds."""
    child = os.fork()
    if not child:
        status = 1
        try:
            torch.set_num_threads(1)  # here, as threads that load a model must not be the first to ask for torch's pool
            if die:
                die_at(die)
            run(name)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), f"{name}: ended with {status}"
    return status == 0


def soak(run: Run, folder: Path, check: Callable[[Path, Path], None], changes: Iterable[int], delays: int) -> None:
    """Kill runs at their n-th change of the disk, for n of `changes` up to the end, and `delays` at random instants."""
    seed = time.time_ns() % 2**32
    print(f"seed of the delays: {seed}", flush=True)
    rng = random.Random(seed)
    start = time.perf_counter()
    assert comes_to_its_end(run, "whole")
    duration = time.perf_counter() - start
    killed = {"at a change": 0, "after a delay": 0, "again": 0}

    def resume(name: str, **how: Any) -> None:
        """Resume, be killed once more, resume."""
        if not comes_to_its_end(run, name, **how):
            killed["again"] += 1
            assert comes_to_its_end(run, name), name
        check(folder / "whole", folder / name)
        shutil.rmtree(folder / name)

    for change in changes:
        if comes_to_its_end(run, f"change-{change}", die=change):
            break
        killed["at a change"] += 1
        resume(f"change-{change}", die=1 + 7 * change % 60)
    for i in range(5 * delays):  # a run that was faster than its killer does not count
        if killed["after a delay"] == delays:
            break
        if not comes_to_its_end(run, f"delay-{i}", seconds=rng.uniform(0, duration)):
            killed["after a delay"] += 1
        resume(f"delay-{i}", seconds=rng.uniform(0, duration))
    print(json.dumps({**killed, "changes": change}))


def soak_es(folder: Path) -> None:
    """Two updates and then two more, so that a second final/ takes the place of the first."""
    from fake_engine import Bench, same_run, steps_left

    bench = Bench(folder, pytest.MonkeyPatch())

    def run(name: str) -> None:
        for steps in steps_left(folder / name):
            bench.train(name, "resume", steps=steps, checkpoint=CheckpointConfig(every=1, keep=1))

    run("first")  # which imports what is imported late
    soak(run, folder, same_run, changes=itertools.count(1, 3), delays=10)


def soak_grpo(folder: Path, model: Path) -> None:
    from grpo_stub import Bench, same_run

    import eggroll_llm.training.grpo_trl.trainer  # noqa: F401  # takes longer than a run

    bench = Bench(folder, model, pytest.MonkeyPatch())

    def run(name: str) -> None:
        bench.train(name, "resume", steps=3, checkpoint__every=1, checkpoint__keep=1, eval__every=1)

    soak(run, folder, same_run, changes=itertools.count(9, 23), delays=3)


if __name__ == "__main__":
    torch.set_num_threads(1)
    method, *paths = sys.argv[1:]
    {"es": soak_es, "grpo": soak_grpo}[method](*map(Path, paths))
