"""A call that hangs ends the process, with what it started, and the run goes on afterwards as if nothing had been."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_engine import CONFIG, Bench, same_run

from eggroll_llm.engine.watchdog import EXIT_STATUS, LOOKS, Watchdog
from eggroll_llm.system.invocation import command

SUPPORT = Path(__file__).parents[1] / "support"


def looks(watchdog: Watchdog, count: int) -> list[bool]:
    return [watchdog.look() for _ in range(count)]


def test_a_call_may_last_for_some_looks_and_no_longer() -> None:
    watchdog = Watchdog(0)
    with watchdog:
        assert looks(watchdog, LOOKS) == [False] * LOOKS  # the first one sees that it began
        assert looks(watchdog, 2) == [True, True]


def test_every_call_counts_anew_however_many_there_are() -> None:
    watchdog = Watchdog(0)
    for _ in range(5):
        with watchdog:
            assert looks(watchdog, LOOKS) == [False] * LOOKS
    with pytest.raises(KeyError), watchdog:
        raise KeyError
    assert not watchdog.watching


def test_time_between_calls_does_not_count() -> None:
    watchdog = Watchdog(0)
    assert looks(watchdog, 3 * LOOKS) == [False] * 3 * LOOKS
    with watchdog:
        watchdog.look()
    assert looks(watchdog, 3 * LOOKS) == [False] * 3 * LOOKS


def test_without_a_limit_nothing_is_started() -> None:
    watchdog = Watchdog(0)
    with watchdog:
        assert watchdog._thread is None


def test_a_closed_one_ends() -> None:
    watchdog = Watchdog(3600)
    with watchdog:
        pass
    thread = watchdog._thread
    assert thread is not None
    assert thread.daemon
    watchdog.close()
    thread.join(timeout=60)
    assert not thread.is_alive()


def child(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), str(SUPPORT)])}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)


HANGS = """
import subprocess, sys, time
from eggroll_llm.engine.watchdog import Watchdog
inner = subprocess.Popen(
    ["sh", "-c", "sleep 600 & echo $!; wait"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
)
print(inner.pid, inner.stdout.readline(), flush=True)
sys.stderr.close()  # whatever Python's own streams are up to
with Watchdog(0.5):
    time.sleep(600)
"""


def test_a_process_that_hangs_ends_with_all_that_it_started() -> None:
    outcome = child(HANGS)
    assert outcome.returncode == EXIT_STATUS == 124
    assert outcome.stderr == (
        "error: the inference engine made no progress for engine.timeout_seconds = 0.5 seconds, so the process "
        f"exits; raise the limit if the engine is slow rather than hung. Resume a run with: {command('resume', 'RUN')}"
        "; repeat the command of an evaluation with --out.\n"
    )
    all_end(outcome.stdout, 2)


def all_end(output: str, count: int) -> None:
    """The processes whose numbers were printed."""
    pids = [int(pid) for pid in output.split()]
    assert len(pids) == count
    deadline = time.monotonic() + 60
    while any(is_running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_running(pid) for pid in pids)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"  # killed, and not yet waited for by who inherited it


HOLDS_THE_LOCK = """
import ctypes, subprocess
from eggroll_llm.engine.watchdog import Watchdog
inner = subprocess.Popen(["sleep", "600"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
watchdog = Watchdog(0.5)
with watchdog:
    pass
print(inner.pid, watchdog._second.pid, flush=True)
with watchdog:
    ctypes.PyDLL(None).sleep(600)
"""


def test_a_call_that_keeps_the_interpreter_locked_ends_as_well() -> None:
    """No thread of the process can run any Python then, so that another process must act."""
    outcome = child(HOLDS_THE_LOCK)
    assert outcome.returncode == -signal.SIGABRT
    assert outcome.stderr.startswith(
        "error: the inference engine made no progress for engine.timeout_seconds = 0.5 seconds"
    )
    assert f"Resume a run with: {command('resume', 'RUN')};" in outcome.stderr
    assert 'File "<string>", line 10 in <module>' in outcome.stderr  # where it hangs
    all_end(outcome.stdout, 2)


STOPS = """
import sys, time
from eggroll_llm.engine.watchdog import Watchdog
watchdog = Watchdog(1.0)
with watchdog:
    print("within", flush=True)
    for _ in range(5):
        time.sleep(0.1)
watchdog.close()
print("out", flush=True)
"""


def test_a_process_that_was_stopped_is_not_taken_for_one_that_hangs() -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([sys.executable, "-c", STOPS], stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "within\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(2.0)
        process.send_signal(signal.SIGCONT)
        assert process.stdout.read() == "out\n"
    assert process.returncode == 0


FULL = """
import os, time
from eggroll_llm.engine import watchdog
watchdog.LAST_WORDS_SECONDS = 0.5
os.set_blocking(2, False)
try:
    while True:
        os.write(2, bytes(4096))
except BlockingIOError:
    os.set_blocking(2, True)
with watchdog.Watchdog(0.5):
    time.sleep(600)
"""


def test_a_message_that_nobody_reads_does_not_keep_it() -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([sys.executable, "-c", FULL], stderr=subprocess.PIPE, env=environment) as process:
        assert process.wait(60) == EXIT_STATUS


TRAINS = """
import dataclasses, pathlib, sys, time
import pytest
from fake_engine import CONFIG, Bench

def prepare(engine):
    def hang(requests):
        if getattr(engine, "noise", None) and engine.noise.step == 3:
            time.sleep(600)
    engine.on_generate = hang

bench = Bench(pathlib.Path(sys.argv[1]), pytest.MonkeyPatch())
bench.prepare_engine = prepare
bench.train("run", engine=dataclasses.replace(CONFIG.engine, timeout_seconds=1.0))
"""


def test_a_run_whose_engine_hangs_goes_on_from_its_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = child(TRAINS, tmp_path)
    assert outcome.returncode == EXIT_STATUS
    run = tmp_path / "run"
    assert outcome.stderr == (
        "error: step 3: the inference engine made no progress for engine.timeout_seconds = 1 seconds, so the "
        "process exits; raise the limit if the engine is slow rather than hung. The journal is on disk up to step 2; "
        f"resume with: {command('resume', run)}\n"
    )
    bench = Bench(tmp_path, monkeypatch)
    bench.train("run", "resume", engine=dataclasses.replace(CONFIG.engine, timeout_seconds=0.0))
    assert any("did not shut down cleanly" in message for message in bench.display.messages)
    bench.train("whole")
    same_run(run, tmp_path / "whole")
