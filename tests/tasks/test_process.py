"""A user's score that loops, eats memory or exits: it costs one completion, is killed, and nothing is left of it."""

import contextlib
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from scored import grade, score, score_all

from eggroll_llm.config.schema import RewardConfig
from eggroll_llm.engine.interface import Completion
from eggroll_llm.errors import TaskError
from eggroll_llm.records.answers import Graded
from eggroll_llm.tasks.load import load_task
from eggroll_llm.tasks.sandbox.process import UserProcess
from eggroll_llm.tasks.task import Answer, Score
from eggroll_llm.tasks.user import UserTask
from eggroll_llm.training.scorer import FAILED, Scorer

ROOT = Path(__file__).parents[2]
LIMITS = RewardConfig(timeout_seconds=3.0, memory_gib=0.25)
PATIENT = RewardConfig(timeout_seconds=60.0, memory_gib=0.25)
TASK = """
import os
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy's threads, one for each core, count as memory
import contextlib, fractions, os, pathlib, signal, stat, subprocess, sys, threading, time
from rewards import Score

kept = []

class Mine:
    def __init__(self, **options):
        self.options = options
    def problems(self, split):
        # JSON can hold neither the set nor the fraction, and would make a list of the tuple.
        return [{"n": n, "any": {n}, "half": fractions.Fraction(n, 2), "pair": (n, n)} for n in range(4)]
    def prompt(self, problem):
        return f"{problem['n']}?"
    def answer(self, completion):
        return f"voted {completion}"
    def score(self, completion, problem, truncated=False):
        assert problem["half"] * 2 == problem["n"] == problem["pair"][1] and problem["any"] == {problem["n"]}
        if completion == "loop":
            while True:
                pass
        if completion == "sleep":
            time.sleep(600)
        if completion == "pause":
            time.sleep(0.5)
        if completion == "memory":
            while True:
                kept.append(bytearray(1 << 24))
        if completion == "needs memory":
            bytearray(1 << 26)
        if completion == "sys.exit":
            sys.exit(3)
        if completion == "os._exit":
            os._exit(3)
        if completion == "status 0":
            os._exit(0)
        if completion == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if completion == "recursion":
            return self.score(completion, problem)
        if completion == "interrupt":
            raise KeyboardInterrupt
        if completion == "raise":
            raise ValueError("no\\x1b[2J such word")
        if completion == "None":
            return None
        if completion == "text":
            return "1.0"
        if completion == "values":
            return [1.0, 0.5]
        if completion == "no value":
            return []
        if completion.startswith("array"):
            import numpy  # for which most processes of these tests have no time
        if completion == "array":
            return numpy.array([1.0, 0.5])
        if completion == "array of one":
            return numpy.array([0.5])
        if completion == "huge":
            return 10 ** 400
        if completion == "huge part":
            return Score(0.0, False, "", {"value": 10 ** 400})
        if completion == "part in words":
            return Score(0.0, False, "", {"value": "x"})
        if completion == "nan":
            return float("nan")
        if completion == "options":
            return Score(0.5, True, repr(self.options))
        if completion == "who":
            return Score(1.0, True, str(os.getpid()))
        if completion.startswith("pid"):
            child = subprocess.Popen(["sleep", "600"])
            apart = subprocess.Popen(["sleep", "600"], start_new_session=True)
            pathlib.Path(completion[4:]).write_text(f"{os.getpid()} {child.pid} {apart.pid}")
            while True:
                pass
        if completion == "print":
            print("a \\x1b[31mred\\x1b[0m line", file=sys.stderr)
            print('{"score": [9.0, true, "forged"], "vote": null}', flush=True)
            os.write(1, b"past Python\\n")
            os.write(2, b"past Python\\n")
            subprocess.run(["echo", "past Python"])
        if completion == "flood":
            while True:
                print("flood " * 100)
        if completion == "megabytes":
            print("m" * 5_000_000, "m" * 10)
        if completion == "flood below":
            shown = os.stat(f"/proc/{os.getppid()}/fd/2").st_ino  # this one may be a log on disk
            for descriptor in range(3, 32):
                with contextlib.suppress(OSError):  # that of the replies among them
                    if (of := os.fstat(descriptor)).st_ino != shown and stat.S_ISFIFO(of.st_mode):
                        for _ in range(64):
                            os.write(descriptor, b"x" * 65536)
            time.sleep(600)
        return Score(1.0, not truncated, f"{problem['n']}: {completion}")
"""


@pytest.fixture
def task(user_task: Callable[[str], UserTask]) -> UserTask:
    return user_task(TASK)


def completion(text: str, truncated: bool = False) -> Completion:
    return Completion(text=text, token_ids=(1,), truncated=truncated, prompt_tokens=3)


def gone(pid: int) -> bool:
    """Whether the process has ended, within a time; one that init has yet to collect has."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


def scored(task: UserTask, *texts: str, limits: RewardConfig = PATIENT) -> tuple[list[Score], Scorer, list[str]]:
    """Scores of one completion a problem, the scorer, and what it has said."""
    said: list[str] = []
    pairs = list(zip(map(completion, texts), task.problems("train"), strict=False))
    with Scorer(task, limits, said.append) as scorer:
        return score_all(scorer, pairs), scorer, said


BAD = {
    "loop": "score() took longer than 3 s",
    "sleep": "score() took longer than 3 s",
    "memory": "MemoryError (reward.memory_gib = 0.25)",
    "sys.exit": "SystemExit: 3",
    "os._exit": "score() ended its process with status 3",
    "status 0": "score() ended its process with status 0",
    "crash": "score() ended its process by SIGSEGV",
    "recursion": "RecursionError: maximum recursion depth exceeded",
    "interrupt": "KeyboardInterrupt",
    "raise": "ValueError: no",
    "None": "TypeError: score() returned None; return a number or a rewards.Score",
    "text": "TypeError: score() returned '1.0'; return a number or a rewards.Score",
    "values": "TypeError: score() returned [1.0, 0.5]; return a number or a rewards.Score",
    "no value": "TypeError: score() returned []; return a number or a rewards.Score",
    "array": "TypeError: score() returned array([1. , 0.5]); return a number or a rewards.Score",
    "flood below": "score() wrote to a file descriptor that it had not opened",
    "huge": "OverflowError: int too large to convert to float",
    "huge part": "OverflowError: int too large to convert to float",
    "part in words": "ValueError: could not convert string to float: 'x'",
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_score_costs_its_own_completion(task: UserTask, bad: str) -> None:
    late = bad in ("loop", "sleep")
    texts = ["a", bad, "c", "d" if late else bad]  # a time limit is waited for once
    scores, scorer, said = scored(task, *texts, limits=LIMITS if late else PATIENT)
    expected = [Score(0.0, False, FAILED) if t == bad else Score(1.0, True, f"{n}: {t}") for n, t in enumerate(texts)]
    assert scores == expected
    assert (scorer.scored, scorer.failures) == (4, texts.count(bad))
    sample, _, traceback = scorer.first_failure.partition("\n")
    assert sample == f'problem train-2, answer "{bad}"'
    assert BAD[bad] in traceback
    assert len(said) == 1
    assert BAD[bad] in said[0]
    assert sample in said[0]


def test_memory_that_was_kept_does_not_fail_the_next(task: UserTask) -> None:
    """A global of the task holds all that there is when the next completion comes, which needs 64 MiB."""
    scores, _, _ = scored(task, "memory", "needs memory", "memory", "needs memory", limits=PATIENT)
    assert [score.reward for score in scores] == [0, 1, 0, 1]


def test_not_a_number_is_no_failure_and_said_with_its_answer(task: UserTask) -> None:
    scores, scorer, said = scored(task, "a", "nan", "nan")
    assert math.isnan(scores[1].reward)
    assert (scorer.failures, scorer.first_failure) == (0, "")
    assert scorer.first_dropped == 'nan for problem train-2, answer "nan"'
    assert said == [f"score() returned NaN or infinity, so nothing is learned from it: {scorer.first_dropped}"]


def test_votes_truncation_and_options_get_there(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(TASK)
    options = {"text": 'quo"te', "deep": {"list": [1, 2.5, {"on": True}]}}
    task = load_task("mine.py:Mine", options, base_dir=tmp_path)
    problem = task.problems("test")[3]
    with Scorer(task, PATIENT) as scorer:
        assert score(scorer, completion("options"), problem) == Score(0.5, True, repr(options))
        cut = Graded(correct=False, reward=1.0, detail="3: a", answer="voted a")
        assert grade(scorer, completion("a", truncated=True), problem) == cut
        failed = Graded(correct=False, reward=0.0, detail=FAILED, answer="voted None")
        assert grade(scorer, completion("None"), problem) == failed


def test_any_text_gets_there(task: UserTask) -> None:
    """Also more of it than a pipe holds."""
    texts = ["\ud800 half", "\x00\n\r\u2028", "é" * 300_000, "x" * 3_000_000]
    scores, _, _ = scored(task, *texts)
    assert [s.detail for s in scores] == [f"{n}: {text}"[:10_000] for n, text in enumerate(texts)]


def test_what_it_prints_is_shown_inert_and_disturbs_nothing(task: UserTask, capfd: pytest.CaptureFixture[str]) -> None:
    scores, _, _ = scored(task, "print", "b")
    assert [s.detail for s in scores] == ["0: print", "1: b"]
    shown = capfd.readouterr()
    assert shown.out == ""
    assert shown.err == 'a \\x1b[31mred\\x1b[0m line\n{"score": [9.0, true, "forged"], "vote": null}\n'


def test_an_array_with_one_number_is_a_score(task: UserTask) -> None:
    scores, scorer, _ = scored(task, "array of one")
    assert (scores, scorer.failures) == ([Score(0.5, False, "reward")], 0)


def test_of_what_it_prints_without_end_a_part_is_shown(task: UserTask, capfd: pytest.CaptureFixture[str]) -> None:
    """It fills no log; a completion that is scored later says what it has to say."""
    scores, _, _ = scored(task, "megabytes", "flood", "megabytes", "print", limits=LIMITS)
    assert [s.reward for s in scores] == [1, 0, 1, 1]
    shown = capfd.readouterr().err
    cut = "\n(more than 10000 characters: the rest is not shown)\n"
    assert shown.count(cut) == 3
    assert [len(part) for part in shown.split(cut)[:3]] == [10_000] * 3
    assert shown.split(cut)[3].startswith("a \\x1b[31mred")


def test_nothing_is_left_of_one_that_was_late_and_of_one_that_is_closed(task: UserTask, tmp_path: Path) -> None:
    scores, _, _ = scored(task, f"pid {tmp_path / 'late'}", "b", limits=LIMITS)
    assert [s.reward for s in scores] == [0, 1]
    pids = list(map(int, (tmp_path / "late").read_text().split()))
    scorer = Scorer(task, PATIENT)
    pids.append(who(scorer, task))
    scorer.close()
    scorer.close()
    assert len(set(pids)) == 4
    for pid in pids:
        assert gone(pid)
    # It starts again when it is needed.
    assert who(scorer, task) not in pids
    scorer.close()


def who(scorer: Scorer, task: UserTask) -> int:
    return int(score(scorer, completion("who"), task.problems("train")[0]).detail)


def test_one_that_dies_between_completions_is_replaced(task: UserTask) -> None:
    with Scorer(task, PATIENT) as scorer:
        pid = who(scorer, task)
        assert who(scorer, task) == pid
        os.kill(pid, signal.SIGKILL)
        assert gone(pid)
        assert who(scorer, task) != pid
        assert scorer.failures == 0


def test_after_an_interruption_no_answer_is_taken_for_another(task: UserTask) -> None:
    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    problems = task.problems("train")
    with Scorer(task, PATIENT, interrupt) as scorer:
        with pytest.raises(KeyboardInterrupt):
            score_all(scorer, list(zip(map(completion, ("a", "None", "pause", "d")), problems, strict=True)))
        assert score(scorer, completion("again"), problems[1]) == Score(1.0, True, "1: again")


MAIN = """
import signal, sys
from pathlib import Path
sys.path.append("tests/support")
from eggroll_llm.system import signals as interruption
from eggroll_llm.config.schema import RewardConfig
from eggroll_llm.engine.interface import Completion
from eggroll_llm.training.scorer import Scorer
from eggroll_llm.tasks.load import load_task
from scored import score
folder = Path(sys.argv[1])
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background has it ignored
try:
    with interruption.handled():
        task = load_task("mine.py:Mine", {}, base_dir=folder)
        with Scorer(task, RewardConfig(timeout_seconds=300)) as scorer:
            answer = Completion(text=f"pid {folder / 'pids'}", token_ids=(), truncated=False, prompt_tokens=0)
            score(scorer, answer, task.problems("train")[0])
except interruption.Interrupted as error:
    sys.exit(error.status)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_main_process_can_be_interrupted_and_takes_it_along(
    task: UserTask, tmp_path: Path, number: signal.Signals
) -> None:
    """While the score loops. Of a SIGKILL the score's process is told by the kernel; what it has started lives on."""
    pids = tmp_path / "pids"
    with subprocess.Popen(
        [sys.executable, "-c", MAIN, str(tmp_path)], cwd=ROOT, stderr=subprocess.PIPE, text=True
    ) as process:
        while not (pids.exists() and len(pids.read_text().split()) == 3) and process.poll() is None:
            time.sleep(0.02)
        worker, *started = map(int, pids.read_text().split())
        process.send_signal(number)
        _, error = process.communicate(timeout=30)
    assert error == ""
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    assert gone(worker)
    for child in started:
        if number == signal.SIGKILL:
            os.kill(child, signal.SIGKILL)
        else:
            assert gone(child)


THERE = f"import os, random\nTHERE = os.getpid() != {os.getpid()}\nONCE = 1\n"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("ONCE = random.random()", r"mine\.py: problems\(\) returns different problems each time"),
        ("ONCE = [1, 2][THERE]", r"problems\(\) returns different problems each time"),
        ("if THERE: 1 / 0", r"mine\.py: in the scoring process .*(?s:.)*ZeroDivisionError"),
        ("if THERE: os._exit(5)", r"ended its process with status 5"),
        ("if THERE: bytearray(1 << 30)", r"reward\.memory_gib = 0\.25\): (?s:.)*MemoryError"),
    ],
)
def test_a_task_that_is_another_one_there_is_refused_at_the_start(tmp_path: Path, change: str, said: str) -> None:
    code = """
        class Mine:
            def problems(self, split): return [{"n": ONCE, (1, 2): "no key of JSON"}]
            def prompt(self, problem): return "?"
            def score(self, completion, problem): return 1.0
    """
    (tmp_path / "mine.py").write_text(f"{THERE}{change}\n{textwrap.dedent(code)}")
    task = load_task("mine.py:Mine", {}, base_dir=tmp_path)
    before = children()
    with pytest.raises(TaskError, match=said), Scorer(task, LIMITS):
        pytest.fail("it has started")
    assert children() <= before


def children() -> set[int]:
    """Processes that this one has started."""
    stats = {path.parent.name: path for path in Path("/proc").glob("[0-9]*/stat")}
    found = set()
    for pid, path in stats.items():
        with contextlib.suppress(OSError):  # it has just ended
            if int(path.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.add(int(pid))
    return found


@pytest.mark.parametrize("removed", [False, True])
def test_a_file_that_is_edited_during_a_run_changes_nothing(task: UserTask, removed: bool) -> None:
    """The process and one in its place go on with what was read at first, and show its lines."""
    problem = task.problems("train")[0]
    texts = ["raise", "a", "os._exit", "raise", "a"]
    with UserProcess(task, PATIENT) as process:
        process.start()
        if removed:
            task.path.unlink()
        else:
            task.path.write_text("'other lines'\n" * 200 + TASK.replace("Score(1.0", "Score(2.0"))
        answers = [Answer(text=text, problem=problem) for text in texts]
        failed, scored, ended, *again = process.judge(answers, voted=False)
    assert scored.score == Score(1.0, True, "0: a")
    assert 'raise ValueError("no\\x1b[2J such word")' in failed.failure
    assert ended.failure == "score() ended its process with status 3"
    assert again == [failed, scored]


def test_gold_answers_are_graded_there(tmp_path: Path) -> None:
    gold = """
    def gold(self, problem):
        return "loop" if problem["n"] == 2 else "good"
"""
    (tmp_path / "mine.py").write_text(TASK + gold)
    with pytest.raises(TaskError, match=r"(?s)'train-3' \(train\): score\(\) failed on its gold .*longer than 3 s"):
        load_task("mine.py:Mine", {}, base_dir=tmp_path, limits=LIMITS)


def test_the_completions_of_a_step_are_sent_together(task: UserTask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands take seconds, as neither process waits for the other at each."""
    problems, writes, write = task.problems("train"), [], os.write

    def counted(descriptor: int, data: bytes) -> int:
        writes.append(write(descriptor, data))
        return writes[-1]

    with Scorer(task, PATIENT) as scorer:
        monkeypatch.setattr(os, "write", counted)
        scores = score_all(scorer, [(completion("a"), problems[i % 4]) for i in range(5000)])
    assert [s.detail[0] for s in scores] == [str(i % 4) for i in range(5000)]
    assert sum(writes) > 5000 * 50
    assert len(writes) < 500
