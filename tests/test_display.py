"""What is shown acts on nothing, and showing it stops nothing."""

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from eggroll_llm.display import ConsoleDisplay, duration
from eggroll_llm.evaluate import Evaluation
from eggroll_llm.inert import SAMPLE_CHARACTERS, inert
from eggroll_llm.samples import TASK, Graded, Sample

ROOT = Path(__file__).parents[1]
ROW = {
    "step": 7,
    "reward/mean": 0.25,
    "reward/accuracy": 0.125,
    "throughput/tokens_per_second": 1234.5,
    "time/step": 3.14159,
}
NASTY = "\x1b[2J\x1b]0;title\x07[bold red]a[/] \x00\r\u202eltr\u2066\ud800\u200b\n</script>"


def sample(text: str, correct: bool = False) -> dict[str, Any]:
    return {"problem": "test-1", "completion": text, "correct": correct}


def shown(samples: Sequence[dict[str, Any]] = (), seconds_left: float | None = None, width: int = 80) -> str:
    output = io.StringIO()
    display = ConsoleDisplay(Console(file=output, width=width, soft_wrap=True, highlight=False))
    display.step(ROW, samples, seconds_left=seconds_left)
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


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0, 59.4, 59.6, 600, 3599.6, 36061)] == [
        "0:00", "0:59", "1:00", "10:00", "1:00:00", "10:01:01",
    ]  # fmt: skip


def test_a_step_is_one_line_and_one_a_sample_when_not_on_a_terminal() -> None:
    lines = shown([sample("4+5=9", True), sample("x" * 400)], seconds_left=75).splitlines()
    assert lines[0] == "step    7  reward 0.250  accuracy 0.125  1,234 tokens/s  3.1 s  left 1:15"
    assert lines[1] == "           test-1: 4+5=9  [right]"
    assert lines[2].startswith("           test-1: xxx")
    assert lines[2].endswith("x…  [wrong]")
    assert len(lines) == 3
    assert shown(width=20) == "step    7  reward 0.250  accuracy 0.125  1,234 tokens/s  3.1 s\n"


def test_a_few_words_about_a_step_stand_at_its_end() -> None:
    output = io.StringIO()
    display = ConsoleDisplay(Console(file=output, width=80, soft_wrap=True, highlight=False))
    display.step(ROW, [], seconds_left=75, note="rewards tied, nothing learned")
    assert output.getvalue().endswith("  3.1 s  left 1:15  rewards tied, nothing learned\n")


def test_a_terminal_is_left_as_it_was() -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=60, _environ={"TERM": "xterm"})
    with contextlib.suppress(KeyboardInterrupt), ConsoleDisplay(console) as display:
        display.sampling("step 1", 3, 10)
        raise KeyboardInterrupt
    hidden, shown = "\x1b[?25l", "\x1b[?25h"  # the cursor
    assert output.getvalue().rindex(shown) > output.getvalue().rindex(hidden)
    assert display._status is None


def test_completions_are_inert() -> None:
    text = shown([sample(NASTY)])
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


def test_progress_is_for_terminals_only() -> None:
    output = io.StringIO()
    ConsoleDisplay(Console(file=output)).sampling("step 1", 3, 10)
    assert output.getvalue() == ""
    terminal = ConsoleDisplay(Console(file=output, force_terminal=True, width=60))
    terminal.sampling("step 1", 3, 10)
    terminal.sampling("step 1", 10, 10)
    assert "step 1: 10 of 10 completions" in output.getvalue()
    assert terminal._status is None  # finished: nothing goes on turning


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
from eggroll_llm.display import ConsoleDisplay
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


def test_no_standard_output_at_all() -> None:
    result = chatter(preexec_fn=lambda: os.close(1))
    assert (result.returncode, result.stderr) == (0, "survived\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_standard_output() -> None:
    with Path("/dev/full").open("w") as full:
        result = chatter(stdout=full)
    assert (result.returncode, result.stderr) == (0, "survived\n")
