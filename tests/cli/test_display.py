"""What is shown acts on nothing, and showing it stops nothing."""

import contextlib
import io
import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from eggroll_llm.cli.display import ConsoleDisplay, Line, _Console, duration
from eggroll_llm.records.answers import TASK, Graded, Sample
from eggroll_llm.system.terminal import SAMPLE_CHARACTERS, inert
from eggroll_llm.training.evaluation import Evaluation
from eggroll_llm.training.limits import Course

ROOT = Path(__file__).parents[2]
ROW = {
    "step": 7,
    "reward/mean": 0.25,
    "reward/accuracy": 0.125,
    "completions": 256,
    "throughput/tokens_per_second": 1234.5,
    "time/step": 3.14159,
}
NASTY = "\x1b[2J\x1b]0;title\x07[bold red]a[/] \x00\r\u202eltr\u2066\ud800\u200b\n</script>"


def sample(text: str, correct: bool = False, question: str = "Make 9 from 4 and 5:") -> dict[str, Any]:
    return {
        "question": question,
        "completion": text,
        "correct": correct,
        "reward": 1.0 if correct else 0.1,
        "detail": "correct" if correct else "wrong_value",
    }


def terminal(output: io.StringIO, width: int = 80, kind: str = "xterm") -> ConsoleDisplay:
    return ConsoleDisplay(_Console(file=output, force_terminal=True, width=width, _environ={"TERM": kind}))


def uncoloured(output: io.StringIO) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", output.getvalue())


def shown(
    samples: Sequence[dict[str, Any]] = (), seconds_left: float | None = None, width: int = 80, row: Any = ROW
) -> str:
    output = io.StringIO()
    display = ConsoleDisplay(Console(file=output, width=width, soft_wrap=True, highlight=False))
    display.step(row, samples, seconds_left=seconds_left)
    return output.getvalue()


@pytest.mark.parametrize(
    ("text", "visible"),
    [
        ("4+5=9", "4+5=9"),
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("a\nb\r\tc\x00\x7f", r"a\nb\r\tc\x00\x7f"),
        ("\u202eevil\u2066", r"\u202eevil\u2066"),
        ("\u200b\ufeff\u2028", r"\u200b\ufeff\u2028"),
        ("\ud800", r"\ud800"),
        ("[bold]x[/bold]", "[bold]x[/bold]"),
        ("é × 3 = 九", "é × 3 = 九"),
    ],
)
def test_nothing_acts_on_a_terminal(text: str, visible: str) -> None:
    assert inert(text) == visible
    assert inert(text).isprintable()


def test_long_text_is_cut() -> None:
    assert inert("x" * 10, 10) == "x" * 10
    assert inert("x" * 11, 10) == "x" * 9 + "…"
    assert inert("\x00" * 10, 10) == r"\x00\x00\…"
    assert len(inert("\x1b" * 1_000_000)) == SAMPLE_CHARACTERS


def test_a_step_that_learns_from_earlier_answers_says_what_it_scored() -> None:
    again = ROW | {"completions": 0, "throughput/tokens_per_second": 0.0, "tokens/scored": 2560}
    assert shown(row=again) == "step    7  reward 0.250  accuracy 0.125  2,560 tokens scored  3.1 s\n"


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0, 59.4, 59.6, 600, 3599.6, 36061)] == [
        "0:00", "0:59", "1:00", "10:00", "1:00:00", "10:01:01",
    ]  # fmt: skip


def test_a_step_is_one_line_and_one_a_sample_when_not_on_a_terminal() -> None:
    lines = shown([sample("4+5=9", True), sample("x" * 400)], seconds_left=75).splitlines()
    assert lines[0] == "step    7  reward 0.250  accuracy 0.125  1,234 tokens/s  3.1 s  left 1:15"
    assert lines[1] == "           Make 9 from 4 and 5: → 4+5=9  [right, reward 1: correct]"
    assert lines[2].startswith("           Make 9 from 4 and 5: → xxx")
    assert lines[2].endswith("x…  [wrong, reward 0.1: wrong_value]")
    assert len(lines) == 3
    several = sample("4+5=9", True) | {"rewards": {"right": 1.0, "short": None}}
    assert shown([several]).splitlines()[1].endswith("[right, reward 1: right 1, short –]")
    assert shown(width=20) == "step    7  reward 0.250  accuracy 0.125  1,234 tokens/s  3.1 s\n"


def test_a_few_words_about_a_step_stand_at_its_end() -> None:
    output = io.StringIO()
    display = ConsoleDisplay(Console(file=output, width=80, soft_wrap=True, highlight=False))
    display.step(ROW, [], seconds_left=75, note="rewards tied, nothing learned")
    assert output.getvalue().endswith("  3.1 s  left 1:15  rewards tied, nothing learned\n")


def test_a_terminal_is_left_as_it_was() -> None:
    """However the process ends: the cursor was never hidden."""
    output = io.StringIO()
    with contextlib.suppress(KeyboardInterrupt), terminal(output) as display:
        display.sampling("step 1", 3, 10)
        raise KeyboardInterrupt
    assert "\x1b[?25" not in output.getvalue()
    assert display._live is None


def test_completions_are_inert() -> None:
    text = shown([sample(NASTY, question=NASTY) | {"detail": NASTY}])
    assert text.count("\n") == 2
    assert text.replace("\n", "").isprintable()
    assert "[bold red]a[/]" in text
    assert r"\x1b[2J" in text


def test_messages_and_evaluations() -> None:
    output = io.StringIO()
    display = ConsoleDisplay(Console(file=output, width=40, soft_wrap=True, highlight=False))
    display.message(f"[bold]careful[/bold] {NASTY}")
    samples = [
        Sample(
            problem=i,
            sample=0,
            id=i,
            doc={},
            prompt_hash="",
            completion="",
            tokens=1,
            truncated=False,
            scores={TASK: Graded(correct=right, reward=1.0, detail="")},
        )
        for i, right in enumerate((True, True, True, False))
    ]
    display.evaluation(30, Evaluation(samples=tuple(samples), seconds=2.04))
    message, evaluation = output.getvalue().splitlines()
    assert message.startswith("[bold]careful[/bold] " + r"\x1b[2J")
    assert evaluation == "eval    30  accuracy 75.0 % [30.1, 95.4] on 4 held-out problems, 2.0 s"


def a_run(display: ConsoleDisplay) -> None:
    with display:
        display.working("starting the engine")
        for step, left in ((0, None), (1, 75.0), (10, 0.0)):
            display.course(Course(fraction=step / 10, seconds_left=left, best=0.25))
            display.sampling(f"step {step:>2} of 10", 9, 256)
            display.sampling(f"step {step:>2} of 10", 256, 256)
        display.step(ROW, [sample("4+5=9", True)], seconds_left=0)


def test_progress_is_for_terminals_only() -> None:
    output = io.StringIO()
    a_run(ConsoleDisplay(Console(file=output, width=80)))
    plain = uncoloured(output)
    assert "\x1b" not in plain
    assert "\r" not in plain
    first, step, answer = plain.splitlines()
    assert first == "starting the engine"
    assert step.startswith("step    7  reward 0.250")
    assert answer.endswith("[right, reward 1: correct]")


def drawn(line: Line, width: int) -> str:
    output = io.StringIO()
    Console(file=output, width=width, force_terminal=False).print(line)
    text = output.getvalue()
    assert text.count("\n") == 1
    return text[:-1]


@pytest.mark.parametrize("width", [20, 40, 60, 80, 110, 200])
def test_the_moving_line_never_wraps_and_its_parts_stay_where_they_are(width: int) -> None:
    line = Line()
    places = set()
    for step, fraction, left, done in ((0, 0.0, None, 1), (9, 0.18, 3599.0, 256), (50, 1.0, 0.0, 99)):
        line.course = Course(fraction=fraction, seconds_left=left, best=0.25 if step else None)
        line.counting(f"step {step:>2} of 50", done, 256)
        text = drawn(line, width)
        assert cell_len(text) < width
        places.add(text.find("%"))
    assert len(places) == 1
    assert ("best 0.250" in text) == (width > 50)
    assert "━" in text or width < 80
    assert text[2:].startswith("step 50 of 50:"[: width - 6])


def test_the_line_tells_limit_time_and_best() -> None:
    line = Line()
    line.course = Course(fraction=0.5, seconds_left=75.0, best=0.523)
    line.counting("evaluation", 7, 512)
    words = drawn(line, 100).split()
    assert words[1:3] == ["evaluation:", "7/512"]
    assert words[4:] == ["50%", "left", "1:15", "best", "0.523"]
    assert words[3] == "━" * 20  # of 40


def test_the_line_moves_by_itself_while_the_engine_starts() -> None:
    output = io.StringIO()
    display = terminal(output)
    with display:
        display.working("starting the engine")
        deadline = time.monotonic() + 20
        while len(set(re.findall(r". starting the engine \d:\d\d", uncoloured(output)))) < 4:
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.mark.parametrize("width", [40, 60, 100])
def test_a_sample_is_one_line_of_a_terminal(width: int) -> None:
    """Question and answer share the room; the reward and why are always seen."""
    output = io.StringIO()
    display = terminal(output, width)
    for text, question in (("4+5=9", "Make 9 from 4 and 5:"), ("九" * 300, "Was?" * 100), ("x", "Q " * 100)):
        display.console.print(display._sample(sample(text, question=question)))
    lines = uncoloured(output).splitlines()
    if width >= 80:
        assert len(lines) == 3
        assert all(cell_len(line) <= width for line in lines)
        assert all(line.endswith("[wrong, reward 0.1: wrong_value]") for line in lines)
    assert "wrong_value]" in lines[-1]


def test_a_broken_terminal_does_not_stop_the_line_that_moves() -> None:
    class Broken(io.StringIO):
        broken = False

        def write(self, text: str) -> int:
            if self.broken:
                raise OSError(5, "Input/output error")
            return super().write(text)

    output = Broken()
    display = terminal(output)
    with display:
        display.working("starting the engine")
        output.broken = True
        deadline = time.monotonic() + 20
        while not display.console.quiet:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        display.sampling("step 1", 1, 2)
        display.message("still running")


class Full(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("file", [Full(), io.StringIO()], ids=["full", "closed"])
def test_an_output_that_fails_is_given_up(file: io.StringIO) -> None:
    if not isinstance(file, Full):
        file.close()
    display = ConsoleDisplay(Console(file=file))
    display.message("one")
    assert display.console.quiet
    display.step(ROW, [sample("x")], seconds_left=None)
    display.sampling("step 1", 1, 2)
    display.table(Table())


CHATTER = """
import sys
from eggroll_llm.cli.display import ConsoleDisplay
display = ConsoleDisplay()
for number in range(5000):
    display.message(f"line {number}")
print("survived", file=sys.stderr)
"""


def chatter(**options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CHATTER], cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False, **options
    )


def test_a_reader_that_goes_away_stops_nothing() -> None:
    """As in `eggroll-llm train ... | head -1`."""
    reading, writing = os.pipe()
    os.close(reading)
    result = chatter(stdout=writing)
    os.close(writing)
    assert (result.returncode, result.stderr) == (0, "survived\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_behind_standard_output(unbuffered: str) -> None:
    with Path("/dev/full").open("w") as full:
        result = chatter(stdout=full, env={**os.environ, "PYTHONUNBUFFERED": unbuffered})
    assert (result.returncode, result.stderr) == (0, "survived\n")


LOGGED = """
import logging, sys, time
from eggroll_llm.cli import main as cli
from eggroll_llm.cli.display import ConsoleDisplay
cli._set_up_messages()
with ConsoleDisplay() as display:
    display.working("loading")
    logging.getLogger("eggroll_llm").info("converting the model")
    time.sleep(0.3)
"""


def test_a_message_stands_above_the_line_that_moves() -> None:
    """On the terminal. What goes to a file goes there, whatever the terminal shows."""
    assert re.search(r"\r\x1b\[2Kconverting the model\r\n", on_a_terminal(LOGGED))
    result = subprocess.run(
        [sys.executable, "-c", LOGGED], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=True
    )
    assert result.stderr == b"converting the model\n"


def on_a_terminal(code: str) -> str:
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80"}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=theirs, stderr=theirs)
    os.close(theirs)
    assert process.wait(timeout=60) == 0
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    return shown
