"""SIGTERM and Ctrl-C, sent to real processes: their status, that nothing of them is left, and that the work goes on."""

import dataclasses
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from fake_engine import CONFIG, Bench, same_run, train_once
from process_tree import ROOT, ProcessTree, wait_for

from eggroll_llm.cli.arguments import GO_ON
from eggroll_llm.cli.main import main
from eggroll_llm.config.recipe import to_toml
from eggroll_llm.config.schema import CheckpointConfig, EngineConfig
from eggroll_llm.engine.interface import Completion, Decoding, Request
from eggroll_llm.records.journal import read_journal
from eggroll_llm.system.invocation import command
from eval import evaluation

CLI_RUN = ROOT / "tests" / "support" / "cli_run.py"
CHANGES: dict[str, Any] = {"checkpoint": CheckpointConfig(every=2), "engine": EngineConfig()}  # with a watchdog


class Run:
    """A run in a process of its own."""

    def __init__(self, tree: ProcessTree, folder: Path, phase: str, how: str, *flags: str, **options: Any) -> None:
        self.tree, self.folder, self.messages = tree, folder, folder / "messages"
        recipe = folder / "recipe.toml"
        recipe.write_text(to_toml(dataclasses.replace(CONFIG, **CHANGES)))
        command = ["train", recipe, "--run-dir", folder / "run", "--on-existing", "resume", *flags]
        with self.messages.open("w") as file:
            self.process = tree.start(
                [sys.executable, CLI_RUN, *command],
                env={"STUCK": f"run:{phase}:{how}"},
                stdout=subprocess.DEVNULL,
                stderr=file,
                **options,
            )
        self.wait_for_file("run.stuck")

    def wait_for_file(self, name: str) -> None:
        path = self.folder / name
        assert wait_for(lambda: path.exists() or self.process.poll() is not None)
        assert path.exists(), self.messages.read_text()

    def ends_in_order(self, number: signal.Signals) -> None:
        self.process.send_signal(number)
        assert self.process.wait(60) == 128 + number
        again = f"resume with: {command('resume', self.folder / 'run')}"
        assert self.messages.read_text().splitlines()[-1] == f"interrupted; {again}"
        assert self.tree.all_end()

    def goes_on(self, bench: Bench, whole: Path) -> None:
        """Resumed, it comes to what a run comes to that was never stopped."""
        bench.train("run", "resume", **CHANGES)
        same_run(whole, self.folder / "run")


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never stopped."""
    return train_once(tmp_path_factory.mktemp("whole"), whole=CHANGES) / "whole"


@pytest.mark.parametrize(
    ("phase", "number"),
    [
        ("sampling", signal.SIGTERM),
        ("reward", signal.SIGINT),
        ("update", signal.SIGHUP),  # a terminal is closed
        ("evaluation", signal.SIGINT),
        ("saving", signal.SIGTERM),
    ],
)
def test_a_run_ends_in_order_in_any_phase(
    tree: ProcessTree, tmp_path: Path, bench: Bench, whole: Path, phase: str, number: signal.Signals
) -> None:
    run = Run(tree, tmp_path, phase, "raise")
    assert len(tree.alive()) == 4  # with the second process of the watchdog
    run.ends_in_order(number)
    assert "Traceback" not in run.messages.read_text()
    assert not [path.name for path in (tmp_path / "run").rglob(".*") if path.name.startswith((".tmp-", ".old-"))]
    run.goes_on(bench, whole)
    assert not [text for text in bench.display.messages if "did not shut down cleanly" in text]


def test_the_second_signal_of_a_closed_terminal_is_no_second_one(tree: ProcessTree, tmp_path: Path) -> None:
    """The shell sends one and the kernel another; that of somebody who does not want to wait is another kind."""
    run = Run(tree, tmp_path, "reward", "deaf")
    for _ in range(2):
        run.process.send_signal(signal.SIGHUP)
        run.wait_for_file("run.swallowed")
        with pytest.raises(subprocess.TimeoutExpired):
            run.process.wait(0.5)
    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(20) == 128 + signal.SIGTERM
    assert tree.all_end()


THREADS = """
import os, signal, sys, threading, time
from eggroll_llm.cli import main as cli
from eggroll_llm.cli import doctor

def wait(options, settings):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(600)

threading.Thread(target=time.sleep, args=(600,)).start()  # as a task's file may
doctor.run = wait
sys.argv[1:] = ["doctor"]
cli.run()
"""


def test_no_thread_of_a_task_keeps_a_command_that_was_interrupted() -> None:
    outcome = subprocess.run(
        [sys.executable, "-c", THREADS], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert (outcome.returncode, outcome.stderr) == (143, "interrupted\n")


@pytest.mark.parametrize(("phase", "how", "updates"), [("reward", "swallow", 1), ("update", "unraisable", 2)])
def test_a_signal_that_was_swallowed_ends_the_run_soon_after(
    tree: ProcessTree, tmp_path: Path, bench: Bench, whole: Path, phase: str, how: str, updates: int
) -> None:
    """By a grader with a bare `except:`, and in a `__del__`, out of which Python lets nothing come."""
    run = Run(tree, tmp_path, phase, how)
    run.ends_in_order(signal.SIGTERM)
    assert len(read_journal(tmp_path / "run" / "journal.jsonl").entries) == updates
    run.goes_on(bench, whole)


@pytest.mark.parametrize(
    ("how", "first", "second"),
    [
        ("deaf", signal.SIGTERM, signal.SIGINT),
        ("native", signal.SIGTERM, signal.SIGTERM),
    ],
)
def test_a_second_signal_ends_it_at_once(
    tree: ProcessTree,
    tmp_path: Path,
    bench: Bench,
    whole: Path,
    how: str,
    first: signal.Signals,
    second: signal.Signals,
) -> None:
    """A reward that hangs whatever comes, with children in sessions of their own and not."""
    run = Run(tree, tmp_path, "reward", how)
    assert len(tree.alive()) == 4
    run.process.send_signal(first)
    if how == "deaf":
        run.wait_for_file("run.swallowed")
    with pytest.raises(subprocess.TimeoutExpired):
        run.process.wait(0.5)  # longer than what counts as the same signal
    run.process.send_signal(second)
    assert run.process.wait(20) == 128 + second
    assert tree.all_end()
    run.goes_on(bench, whole)


SCRIPT = """
import os, signal, threading, time
from eggroll_llm.system import signals as interruption
me, term, interrupt = os.getpid(), signal.SIGTERM, signal.SIGINT
def body():
    {body}
try:
    with interruption.handled():
        body()
except KeyboardInterrupt as error:
    print("ended with", error.status)
print(signal.getsignal(term) is signal.SIG_DFL)
"""


def said(tree: ProcessTree, *lines: str, status: int = 0) -> str:
    """What a script says that does this while signals are handled, without its last line."""
    code = SCRIPT.format(body="\n    ".join(lines))
    process = tree.start([sys.executable, "-c", code], stdout=subprocess.PIPE)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == status
    assert output.endswith("True\n")  # handled no longer
    return output.removesuffix("True\n")


def test_signals_that_come_together_are_one(tree: ProcessTree) -> None:
    """Such as those of timeout(1): one to the process, one to its group."""
    lines = [
        "interruption.SAME_SECONDS = 30",
        "signal.pthread_sigmask(signal.SIG_BLOCK, [term, interrupt])",
        "main = threading.main_thread().ident",
        "signal.pthread_kill(main, term), signal.pthread_kill(main, interrupt)",
        "try: signal.pthread_sigmask(signal.SIG_UNBLOCK, [term, interrupt])",
        "finally:",
        "    while len(interruption._arrivals) < 2: time.sleep(0.01)",
        "    time.sleep(0.1)",
        "    print('cleaned up')",
    ]
    assert said(tree, *lines, status=130) == "cleaned up\nended with 130\n"


def test_what_a_library_raises_in_its_place_is_an_interruption_too(tree: ProcessTree) -> None:
    assert said(
        tree,
        "try: os.kill(me, term)",
        "except BaseException: raise RuntimeError('the engine died')",
        status=143,
    ) == ("ended with 143\n")


def test_nothing_holds_a_process_that_was_ended(tree: ProcessTree) -> None:
    """Such as what a library does at exit. What was printed is not lost."""
    lines = ["import atexit; atexit.register(time.sleep, 600)", "os.kill(me, term)"]
    assert said(tree, *lines, status=143) == "ended with 143\n"


def test_without_a_signal_everything_comes_through(tree: ProcessTree) -> None:
    assert said(tree, "interruption.check()", "try: raise SystemExit(3)", "except SystemExit: print('three')") == (
        "three\n"
    )


def test_a_signal_that_is_ignored_stays_ignored(tree: ProcessTree) -> None:
    """As shells have it for what they start in the background."""
    code = SCRIPT.format(body="os.kill(me, interrupt); time.sleep(0.1); print('still here')")
    process = tree.start(
        [sys.executable, "-c", f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n{code}"],
        stdout=subprocess.PIPE,
    )
    assert process.communicate(timeout=60)[0] == "still here\nTrue\n"


def test_a_forked_child_ends_by_a_signal_and_its_parent_hears_nothing(tree: ProcessTree) -> None:
    lines = [
        "reading, writing = os.pipe()",
        "child = os.fork()",
        "if not child: os.write(writing, b'x'), time.sleep(600)",
        "os.read(reading, 1), os.kill(child, term)",
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), interruption._arrivals)",
    ]
    assert said(tree, *lines) == "-15 []\n"


EVAL = """
import pathlib, sys, time
from eggroll_llm.cli.main import main
from eggroll_llm.engine.interface import Completion
from eval import evaluation
class Engine:
    def stream(self, requests, decoding):
        for i, request in enumerate(requests):
            if i == 3:
                pathlib.Path({stuck!r}).touch()
                try: time.sleep(600)
                except BaseException:
                    if not {swallow}: raise
            yield i, Completion(text="x" * (i % 3), token_ids=(1,), truncated=False, prompt_tokens=5)
    def close(self): pass
evaluation.start_engine = lambda *_, **__: Engine()
sys.exit(main())
"""
TASK = """
class Words:
    def problems(self, split): return [{"word": f"{split} {n}", "n": n} for n in range(7)]
    def prompt(self, problem): return f"Reverse {problem['word']}:"
    def score(self, completion, problem): return float(len(completion) == problem["n"] % 3)
"""


LOOPING = """
import pathlib
class Words:
    def problems(self, split): return [{{"word": f"{{split}} {{n}}"}} for n in range(7)]
    def prompt(self, problem): return f"Reverse {{problem['word']}}:"
    def score(self, completion, problem):
        pathlib.Path({stuck!r}).touch()
        while True:
            pass
"""


def test_a_users_reward_that_loops_ends_with_the_command(
    tree: ProcessTree, tmp_path: Path, tiny_model: Callable[[str], Path]
) -> None:
    """While the engine samples on, and long before its limit of time.

    Its processes have sessions of their own, which Ctrl-C does not reach.
    """
    stuck = tmp_path / "stuck"
    (tmp_path / "words.py").write_text(LOOPING.format(stuck=str(stuck)))
    code = EVAL.format(stuck=str(tmp_path / "engine"), swallow=False)
    arguments = ["eval", tiny_model("llama"), "--task", f"{tmp_path}/words.py:Words", "--reward.timeout_seconds", 600]
    process = tree.start([sys.executable, "-c", code, *arguments, "--reward.workers", 2], stderr=subprocess.PIPE)
    assert wait_for(lambda: (stuck.exists() and (tmp_path / "engine").exists()) or process.poll() is not None)
    assert len(tree.alive()) == 3
    process.send_signal(signal.SIGINT)
    _, messages = process.communicate(timeout=60)
    assert (process.returncode, messages.splitlines()[-1]) == (130, "interrupted")
    assert tree.all_end()


class Answers:
    """What the engine of `EVAL` answers, asked for any part."""

    def stream(self, requests: Sequence[Request], decoding: Decoding) -> Iterator[tuple[int, Completion]]:
        for i in range(len(requests)):
            yield (
                i,
                Completion(text="x" * ((7 - len(requests) + i) % 3), token_ids=(1,), truncated=False, prompt_tokens=5),
            )

    def close(self) -> None:
        pass


@pytest.mark.parametrize(("number", "swallow"), [(signal.SIGINT, False), (signal.SIGTERM, True)])
def test_an_evaluation_ends_in_order_and_continues(
    tree: ProcessTree,
    tmp_path: Path,
    tiny_model: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    swallow: bool,
) -> None:
    (tmp_path / "words.py").write_text(TASK)
    stuck, out = tmp_path / "stuck", tmp_path / "stopped.json"
    arguments = ["eval", str(tiny_model("llama")), "--task", f"{tmp_path}/words.py:Words", "--out"]
    code = EVAL.format(stuck=str(stuck), swallow=swallow)
    process = tree.start([sys.executable, "-c", code, *arguments, out], stderr=subprocess.PIPE)
    assert wait_for(lambda: stuck.exists() or process.poll() is not None)
    time.sleep(1.0)  # for the scores of what the engine has answered
    process.send_signal(number)
    _, messages = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert messages.splitlines()[-1] == f"interrupted; {GO_ON}"
    samples = out.with_suffix(".samples.jsonl")
    assert len(samples.read_text().splitlines()) == 1 + 3
    assert not out.exists()

    monkeypatch.setattr(evaluation, "start_engine", lambda *_, **__: Answers())
    whole = tmp_path / "whole.json"
    assert main([*arguments, str(whole)]) == main([*arguments, str(out)]) == 0
    assert out.read_text() == whole.read_text()
    assert samples.read_text() == whole.with_suffix(".samples.jsonl").read_text()
