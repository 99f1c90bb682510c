"""What a score does to the pipes and the process that it shares with us: no completion gets the reward of another."""

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eggroll_llm.config.schema import RewardConfig
from eggroll_llm.tasks.load import load_task
from eggroll_llm.tasks.sandbox.process import UserProcess
from eggroll_llm.tasks.task import Answer, Verdict
from eggroll_llm.tasks.user import UserTask

PATIENT = RewardConfig(timeout_seconds=60.0, memory_gib=0.25)
LIMITS = RewardConfig(timeout_seconds=3.0, memory_gib=0.25)
GARBLED = "score() wrote to a file descriptor that it had not opened"
TASK = """
import fcntl, os, signal, stat, sys, time
from rewards import Score

HELD = []

def replies():
    # The only pipe to write to but, perhaps, standard error.
    for descriptor in range(3, 64):
        try:
            of, flags = os.fstat(descriptor), fcntl.fcntl(descriptor, fcntl.F_GETFL)
        except OSError:
            continue
        shown = os.stat(f"/proc/{os.getppid()}/fd/2").st_ino
        if stat.S_ISFIFO(of.st_mode) and flags & os.O_ACCMODE == os.O_WRONLY and of.st_ino != shown:
            return descriptor

class Mine:
    def problems(self, split):
        return [{"n": n} for n in range(4)]
    def prompt(self, problem):
        return f"{problem['n']}?"
    def score(self, completion, problem):
        if completion.startswith("fork"):
            child = os.fork()
            if child:
                os.waitpid(child, 0)  # it would have answered first
            elif completion == "fork, exit":
                sys.exit()
            elif completion == "fork, raise":
                raise ValueError
            else:
                return -1.0
        if completion == "forge":
            os.write(replies(), b'{"score": [9.0, true, "forged"], "vote": null}\\n')
        if completion == "forge a number":
            os.write(replies(), b'1 {"score": [9.0, true, "forged"], "vote": null}\\n')
        if completion == "trickle":
            while True:
                os.write(replies(), b"x" * 100)
                time.sleep(0.001)
        if completion == "close":
            os.close(replies())
            time.sleep(600)
        if completion == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if completion == "leave a child":
            if not os.fork():
                time.sleep(600)
            os._exit(3)
        return Score(problem["n"], True, completion)
"""


@pytest.fixture
def task(user_task: Callable[[str], UserTask]) -> UserTask:
    return user_task(TASK)


def verdicts(task: UserTask, *texts: str, limits: RewardConfig = PATIENT) -> list[Verdict]:
    problems = task.problems("train")
    answers = [Answer(text=text, problem=problem) for text, problem in zip(texts, problems, strict=True)]
    with UserProcess(task, limits) as process:
        return [*process.judge(answers, voted=False), *process.judge(answers[1:], voted=False)]


def rewards(found: list[Verdict]) -> list[float | None]:
    return [verdict.score and verdict.score.reward for verdict in found]


@pytest.mark.parametrize("how", ["exit", "raise", "return"])
def test_a_forked_child_of_a_score_answers_nothing(task: UserTask, how: str) -> None:
    found = verdicts(task, f"fork, {how}", "b", f"fork, {how}", "d")
    assert rewards(found) == [0, 1, 2, 3, 1, 2, 3]


def test_a_forked_child_of_an_import_answers_nothing(tmp_path: Path) -> None:
    fork = f"import os\nif os.getpid() != {os.getpid()} and (pid := os.fork()): os.waitpid(pid, 0)\n"
    (tmp_path / "mine.py").write_text(fork + TASK)
    task: Any = load_task("mine.py:Mine", {}, base_dir=tmp_path)
    assert rewards(verdicts(task, *"abcd")) == [0, 1, 2, 3, 1, 2, 3]


@pytest.mark.parametrize("bad", ["forge", "forge a number"])
def test_a_reply_to_something_else_is_not_taken(task: UserTask, bad: str) -> None:
    """One reward too many would shift all that follow; the number is that of the first completion."""
    found = verdicts(task, "a", "b", bad, "d")
    assert rewards(found) == [0, 1, None, 3, 1, None, 3]
    assert found[2].failure == GARBLED


@pytest.mark.parametrize(
    ("bad", "said", "limits"),
    [
        ("close", "score() closed a file descriptor that it had not opened", PATIENT),
        ("killed", "score() ended its process by SIGKILL, as the kernel does when memory is short", PATIENT),
        ("leave a child", "score() ended its process with status 3", LIMITS),
    ],
)
def test_it_is_said_how_a_score_has_failed(task: UserTask, bad: str, said: str, limits: RewardConfig) -> None:
    """Here a pipe that its child holds open does not hide its end."""
    start = time.monotonic()
    found = verdicts(task, bad, "b", "c", "d", limits=limits)
    assert rewards(found) == [None, 1, 2, 3, 1, 2, 3]
    assert found[0].failure == said
    assert time.monotonic() - start < 50


def test_one_that_never_comes_to_the_end_of_a_line_is_late(task: UserTask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although there is always something to read."""
    read = os.read

    def slowly(descriptor: int, size: int) -> bytes:
        time.sleep(0.0001)
        return read(descriptor, min(size, 10))

    monkeypatch.setattr(os, "read", slowly)
    found = verdicts(task, "trickle", "b", "c", "d", limits=LIMITS)
    assert rewards(found) == [None, 1, 2, 3, 1, 2, 3]
    assert found[0].failure == "score() took longer than 3 s"


def test_an_interrupted_start_closes_no_descriptor_of_others(
    task: UserTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, close = UserProcess(task, PATIENT), os.close
    process.start()
    process.close()

    class Interrupting(subprocess.Popen[bytes]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            monkeypatch.setattr(os, "close", interrupt)

    def interrupt(descriptor: int) -> None:
        close(descriptor)
        monkeypatch.setattr(os, "close", close)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", Interrupting)
    # These take the numbers that the pipes had.
    with (tmp_path / "a").open("w") as first, (tmp_path / "b").open("w") as second:
        with pytest.raises(KeyboardInterrupt):
            process.start()
        process.close()
        for file in (first, second):
            assert os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))
