"""Engines by real Ray: the same run, a killed actor, a machine cut off, our signals, and nothing left afterwards."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_engine import Bench, rows, same_run
from process_tree import ROOT, ProcessTree, wait_for

from eggroll_llm.cli.main import main
from eggroll_llm.config.schema import EngineConfig
from eggroll_llm.system import installed
from eggroll_llm.system.processes import _descendants

pytestmark = [
    pytest.mark.skipif(bool(installed.missing("ray")), reason="needs the extra ray"),
    pytest.mark.slow,
]

RUN = ROOT / "tests" / "support" / "ray_run.py"


def start(tree: ProcessTree, folder: Path, how: str, *within: Path) -> "subprocess.Popen[str]":
    """Start a run of two engines by Ray in a process of its own, `within` a command."""
    path = [ROOT / "tests" / "support", *(Path(entry) for entry in sys.path if entry)]
    with (folder / "printed").open("w") as file:
        return tree.start([*within, sys.executable, RUN, folder, how], path=path, stdout=file, stderr=file)


def test_actors_make_the_run_of_one_engine(tree: ProcessTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them is killed in the first step; nothing is left afterwards, and each has a log."""
    status, printed = start(tree, tmp_path, "kill").wait(240), (tmp_path / "printed").read_text()
    assert status == 0, printed
    Bench(tmp_path, monkeypatch).train("one")
    same_run(tmp_path / "one", tmp_path / "run")
    assert sum(row["engines/lost"] for row in rows(tmp_path / "run")[1:]) == 1
    lost = next(line for line in printed.splitlines() if " lost (" in line)
    assert "(ActorDiedError: The actor died unexpectedly before finishing this task; see " in lost
    assert sorted(path.name for path in (tmp_path / "run" / "engines").iterdir()) == ["01.log", "02.log"]
    assert tree.all_end()


TWO_MACHINES = [ROOT / "scripts" / "two_machines.sh"]
NAMESPACES = (
    "unshare --user --map-root-user --net --mount --uts --pid --fork ip link add here type veth peer name there"
)


@pytest.mark.skipif(
    not shutil.which("unshare") or subprocess.run(NAMESPACES.split(), capture_output=True).returncode != 0,
    reason="needs namespaces of Linux",
)
def test_a_machine_that_is_cut_off_is_done_without(
    tree: ProcessTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two, each with an engine, in the second step. Its engine is given up, and nothing waits for Ray to notice."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    status, printed = start(tree, tmp_path, "cut", *TWO_MACHINES).wait(240), (tmp_path / "printed").read_text()
    assert status == 0, printed
    Bench(tmp_path, monkeypatch).train("one")
    same_run(tmp_path / "one", tmp_path / "run")
    lost = next(line for line in printed.splitlines() if " lost (" in line)
    assert re.match(r"engine \d on machine-2 lost \(no progress for engine.timeout_seconds = 6 seconds\); ", lost)
    assert [row["engines"] for row in rows(tmp_path / "run")[1:]] == [2, 1, 1, 1]
    assert tree.all_end()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_nothing_is_left_when_the_driver_is_ended(tree: ProcessTree, tmp_path: Path, number: signal.Signals) -> None:
    """In the middle of sampling. A first SIGTERM ends it in order, by our handler and not by Ray's."""
    process = start(tree, tmp_path, "wait")
    assert wait_for(lambda: (tmp_path / "sampling").exists() or process.poll() is not None)
    started = {pid for pid, _ in _descendants(process.pid)}  # Ray's write their names over their environment
    assert len(started) > 3, (tmp_path / "printed").read_text()
    os.kill(process.pid, number)
    assert process.wait(60) == (143 if number == signal.SIGTERM else -9)
    assert wait_for(lambda: not any(holds_something(pid) for pid in started), seconds=20)


def holds_something(pid: int) -> bool:
    """Whether a process is alive and none of Ray's two agents, which wait a minute or two for a server that is gone."""
    with contextlib.suppress(OSError):
        ended = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        return not ended and b"Agent" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


TASK = """
class Echo:
    stop = ("\\n",)
    def problems(self, split): return [{"n": n} for n in range(6 if split == "train" else 3)]
    def prompt(self, problem): return f"Make {problem['n']} from"
    def score(self, completion, problem): return float(len(completion) % 7)
"""
RECIPE = """
model = "{model}"
task = "echo.py:Echo"
steps = 2
sampling = {{ prompts_per_step = 3, max_tokens = 8 }}
es = {{ population = 6, sigma = 0.05, learning_rate = 0.01 }}
eval = {{ problems = 3 }}
engine = {{ dtype = "float32", kv_cache_gib = 0.1, threads = 1, max_sequences = 8 }}
"""
COMMAND = """
import sys
from eggroll_llm.cli.main import main
status = main()
print("vLLM here:", "vllm" in sys.modules)
sys.exit(status)
"""


def test_ray_has_the_cores_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    from eggroll_llm.engine import replicas

    monkeypatch.setattr(replicas, "_connect", lambda address, *, cpus: pytest.fail(f"{cpus} cores"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {7})
    with pytest.raises(pytest.fail.Exception, match=r"^1 cores$"):
        replicas.Cluster(EngineConfig())


@pytest.mark.vllm
def test_two_real_engines_make_the_run_of_one(
    tree: ProcessTree, tmp_path: Path, tiny_model: Callable[[str], Path]
) -> None:
    """By the command, with vLLM in each, one of them here: journal, weights and the answers of an evaluation."""
    (tmp_path / "echo.py").write_text(TASK)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(model=tiny_model("llama")))
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(["train", str(recipe), "--run-dir", str(one)]) == 0
    command = [sys.executable, "-c", COMMAND, "train", recipe, "--run-dir", two, "--engine.replicas", 2]
    options: Any = {"env": {"RAY_AUTH_MODE": "disabled"}, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = tree.start(command, path=[Path(entry) for entry in sys.path if entry], **options)
    printed, _ = process.communicate(timeout=280)
    assert process.returncode == 0, printed
    assert printed.endswith("vLLM here: False\n")
    assert (one / "journal.jsonl").read_text() == (two / "journal.jsonl").read_text()
    weights = [(run / "final" / "model.safetensors").read_bytes() for run in (one, two)]
    assert weights[0] == weights[1]
    assert [row["eval/reward"] for row in evaluated(one)] == [row["eval/reward"] for row in evaluated(two)]
    assert [row["engines"] for row in rows(two)[1:]] == [2, 2]


def evaluated(run: Path) -> list[dict[str, Any]]:
    return [row for row in rows(run) if "eval/reward" in row]
