"""A run of two stand-in engines by Ray: `python ray_run.py FOLDER kill|wait|cut`.

With "kill" one of the engines is killed in the first step; with "wait" the file `sampling` appears in the folder when
the first step samples, which then does not end. With "cut", on the first machine of scripts/two_machines.sh, the second
one is cut off in the second step.
"""

import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_engine import Bench
from pipe_link import Build, Fault, Plan

from eggroll_llm.config.schema import EngineConfig, RunConfig
from eggroll_llm.engine import replicas
from eggroll_llm.engine.interface import Engine
from eggroll_llm.engine.links import Rules
from eggroll_llm.engine.pool import EnginePool
from eggroll_llm.system import signals

RULES = Rules(engines=2, least=1, restarts=3, timeout=0.0, trainable=True)


class Pool(EnginePool):
    """Has something happen before a step samples."""

    how, sampling = "", Path()

    def begin(self, *args: Any, **keywords: Any) -> float:
        seconds, step = super().begin(*args, **keywords), args[0].step
        if self.how == "wait":
            self.sampling.touch()
        elif self.how == "kill" and step == 1:
            started = self._roster.live[-1].started
            assert started
            os.kill(started.pid, signal.SIGKILL)
        elif self.how == "cut" and step == 2:
            subprocess.run(["ip", "link", "set", "cable", "down"], check=True)
        return seconds


def main(folder: Path, how: str) -> None:
    torch.set_num_threads(1)
    Pool.how, Pool.sampling = how, folder / "sampling"

    def make(config: RunConfig, journal: Path) -> Engine:
        cluster = replicas.Cluster(EngineConfig(replicas=2, threads=1))
        faults = {0: Fault("sample", 1, "hang")} if how == "wait" else {}
        logs = journal.parent / "engines"
        logs.mkdir()
        launcher = replicas.RayLauncher(cluster, Build(Plan(config, journal, faults), 0), logs, beat=60.0)
        rules = dataclasses.replace(RULES, timeout=6.0) if how == "cut" else RULES
        return Pool(launcher, rules, dtype=torch.float32, max_sequences=4, say=print)

    with signals.handled(), pytest.MonkeyPatch.context() as patch:
        bench = Bench(folder, patch)
        bench.make_engine = make
        bench.display.message = print  # type: ignore[method-assign]
        bench.train("run")


if __name__ == "__main__":
    os.environ["RAY_AUTH_MODE"] = "disabled"
    if "RAY_ADDRESS" not in os.environ:
        os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="r")  # its sockets need a short path
    try:
        main(Path(sys.argv[1]), sys.argv[2])
    except signals.Interrupted as error:
        sys.exit(error.status)
