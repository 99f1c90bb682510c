"""What holds of files with a line for everything: journals, logs, graded answers, data. And of text that is shown.

A check takes bytes and a folder of its own.
"""

import io
import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fuzz_common import HARD_JSON, SECONDS, refused
from fuzz_graders import as_text, in_time
from fuzz_toml import canonical
from made_up_runs import write_run
from rich.console import Console

from eggroll_llm.cli.display import ConsoleDisplay
from eggroll_llm.errors import JournalError, RunDirError, SamplesError, TaskError
from eggroll_llm.records.answers import read_samples, samples_text
from eggroll_llm.records.diagnosis import diagnose
from eggroll_llm.records.journal import Journal, JournalEntry, JournalHeader, read_journal
from eggroll_llm.system.jsonl import cut_after_step, last_step, read_rows, to_json
from eggroll_llm.system.terminal import SAMPLE_CHARACTERS, inert
from eggroll_llm.tasks.countdown_read import Solutions, file_problems
from eggroll_llm.tasks.gsm8k import Gsm8kOptions, load_gsm8k
from eval.runs import read_runs
from rewards import countdown, gsm8k

HEADER = JournalHeader(frozen_hash="a" * 64, base_model="smollm2@123", train="b", held_out="c")


def check_journal(data: bytes, folder: Path) -> None:
    """A journal as it stands, and with the right CRC on every line: as if another program had written it."""
    for content in (data, b"".join(_sealed(line) for line in data.split(b"\n"))):
        path = folder / "journal.jsonl"
        path.write_bytes(content)
        contents = refused(lambda path=path: in_time(lambda: read_journal(path), SECONDS), JournalError)
        if contents is None:
            continue
        vouched = [*_vouched(content)]
        assert contents.line_ends == tuple(end for end, _ in vouched)
        assert (contents.header is None) == (not vouched)
        assert bool(contents.dropped_tail) == (len(content) > (vouched[-1][0] if vouched else 0))
        for entry, (_, fields) in zip(contents.entries, vouched[1:], strict=True):
            assert json.loads(to_json(asdict(entry))) == {"dropped": [], "checksum": "", **fields}
            assert all(math.isfinite(value) for value in (*entry.fitness, entry.sigma, entry.learning_rate))


def _sealed(line: bytes) -> bytes:
    return line[:-1] + b',"crc":"%08x"}\n' % zlib.crc32(line[:-1] + b"}") if line else b""


def _vouched(content: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """(end, fields) of the first lines whose CRC is right, computed without the code under test."""
    end = 0
    for line in content.split(b"\n")[:-1]:
        body, mark, seal = line.rpartition(b',"crc":"')
        if not mark or seal != b'%08x"}' % zlib.crc32(body + b"}"):
            return
        end += len(line) + 1
        yield end, json.loads(body + b"}")


def check_journal_damage(data: bytes, folder: Path) -> None:
    """Edits of a good journal, three bytes each: where (two) and what for. What is still read are its first updates.

    An edit changes a byte, takes a piece away, repeats a piece, or cuts the end off.
    """
    path = folder / "journal.jsonl"
    good = journal_seed()
    path.write_bytes(good)
    entries = read_journal(path).entries
    content = bytearray(good)
    for high, low, what in zip(data[::3], data[1::3], data[2::3], strict=False):
        at = (high << 8 | low) % (len(content) + 1)
        size = 1 + (what >> 2)
        match what % 4:
            case 0:
                content[at : at + 1] = bytes(byte ^ size for byte in content[at : at + 1])
            case 1:
                del content[at : at + size]
            case 2:
                content[at:at] = content[at : at + size * 8]
            case _:
                del content[at:]
    path.write_bytes(content)
    contents = refused(lambda: read_journal(path), JournalError)
    if contents is None:
        assert path.read_bytes() == content
        return
    assert contents.entries == entries[: len(contents.entries)]
    assert contents.header in (HEADER, None)
    with Journal.open(path, HEADER) as journal:
        journal.append(JournalEntry(step=journal.last_step + 1, noise_step=1, fitness=(0.5,), sigma=1, learning_rate=1))
    assert [entry.step for entry in read_journal(path).entries] == [*range(1, len(contents.entries) + 2)]


def check_jsonl(data: bytes, folder: Path) -> None:
    """Logs, graded answers and a whole run whose metrics they are: rows, or an error that names the file."""
    path = folder / "rows.jsonl"
    path.write_bytes(data)
    rows = refused(lambda: in_time(lambda: read_rows(path), SECONDS), RunDirError)
    lines = data.split(b"\n")[:-1]
    assert rows is None or canonical(rows) == canonical([json.loads(line.decode()) for line in lines])
    last = last_step(path)
    kept = cut_after_step(path, 3)
    assert last is None or isinstance(last, int)
    assert kept is None or len(kept.split("\n")) <= len(lines) + 1
    read = refused(lambda: read_samples(path), SamplesError)
    if read is not None:
        settings, samples = read
        assert len({(sample.problem, sample.sample) for sample in samples}) == len(samples)
        path.write_text(samples_text(settings, samples), encoding="utf-8")
        assert samples_text(*read_samples(path)) == path.read_text(encoding="utf-8")
    run = folder / "run"
    if not run.exists():
        write_run(run, {0: "0011", 2: "0111"})
    (run / "metrics.jsonl").write_bytes(data)
    for found in refused(lambda: read_runs([run]), RunDirError) or ():
        assert found.best in found.evaluations
        assert all(f"{finding}" for finding in diagnose(found.config, found.rows, ended=True))
        assert [point.step for point in found.points] == sorted({row["step"] for row in found.rows})


def check_rows(data: bytes, folder: Path) -> None:
    """Problems of both tasks: what is loaded can be graded, and its known answer is right."""
    path = folder / "train.jsonl"
    path.write_bytes(data)
    for problem in refused(lambda: in_time(lambda: file_problems(path, Solutions()), SECONDS), TaskError) or ():
        numbers, target = problem["numbers"], problem["target"]
        assert countdown.score("<answer>1</answer>", numbers, target).detail != "bad_problem"
        if "solution" in problem:
            answer = f"<answer>{problem['solution']}</answer>"
            assert countdown.score(answer, numbers, target, use_all=False).correct
        assert json.loads(to_json(problem))["id"] == problem["id"]
    test = folder / "test.jsonl"
    if not test.exists():
        test.write_text('{"question": "How many?", "answer": "Two. #### 2"}\n')
    for style in ("chat", "few_shot"):
        options = Gsm8kOptions(data_dir=str(folder), prompt_style=style, shots=1)
        task = refused(lambda options=options: load_gsm8k(options, folder), TaskError)
        for problem in task.problems("train") if task else ():
            assert task.prompt(problem)
            assert gsm8k.score(f"#### {problem['answer']}", problem["answer"]).correct
            assert gsm8k.read_answer(f"#### {problem['answer']}") == problem["answer"]


def check_shown(data: bytes, folder: Path) -> None:
    """Text on a terminal: nothing acts on it, and showing it stops nothing."""
    text = as_text(data)
    shown = inert(text)
    assert shown.isprintable()
    assert len(shown) <= SAMPLE_CHARACTERS
    assert shown == text or not text.isprintable() or len(text) > SAMPLE_CHARACTERS
    output = io.StringIO()
    display = ConsoleDisplay(Console(file=output, width=80, soft_wrap=True, highlight=False, force_terminal=False))
    display.message(text)
    display.step(
        {"step": 1, "reward/mean": 0, "reward/accuracy": 0, "throughput/tokens_per_second": 0, "time/step": 0},
        [{"question": text, "completion": text, "correct": False, "reward": 0.0, "detail": text}],
        seconds_left=None,
    )
    lines = output.getvalue().split("\n")
    assert len(lines) == 4
    assert all(line.isprintable() for line in lines)
    back = json.loads(to_json({text: [text, math.nan]}))
    assert list(back.values()) == [[*back, None]]


def journal_seed() -> bytes:
    """A made-up journal of four updates."""
    lines = [{"format": 1, **asdict(HEADER)}]
    for step in range(1, 5):
        fitness = tuple(value / 4 for value in range(-3, 3 + step))
        sigma, checksum = 0.012 / step, "ff" if step == 2 else ""
        entry = JournalEntry(
            step=step, noise_step=step, fitness=fitness, sigma=sigma, learning_rate=1e-3, checksum=checksum
        )
        lines.append(asdict(entry))
    return b"".join(_sealed(json.dumps(line, separators=(",", ":")).encode()) for line in lines)


def journal_seeds() -> list[bytes]:
    """That journal, with its seals and without: the check puts them on."""
    sealed = journal_seed()
    bare = b"\n".join(line.rpartition(b',"crc"')[0] + b"}" for line in sealed.split(b"\n")[:-1])
    first = bare.partition(b"\n")[0]
    return [sealed, bare, sealed[:-9], *(first + b"\n" + hard for hard in HARD_JSON)]


def damage_seeds() -> list[bytes]:
    """One edit of each kind, and several."""
    return [bytes([0, at, what]) for at in (3, 150) for what in range(4)] + [bytes(range(0, 120, 7)), b""]


def jsonl_seeds() -> list[bytes]:
    """Metrics, and graded answers."""
    metrics = [
        {"step": step, "wall_time": 1.5 * step, "eval/accuracy": 0.5, "tokens/generated": 10, "reward/mean": None}
        for step in range(3)
    ]
    score = {"correct": True, "reward": 1.0, "detail": "correct", "answer": None}
    sample = {"problem": 0, "sample": 0, "id": "test-1", "doc": {"a": [1]}, "prompt_hash": "0", "completion": "4\n"}
    sample |= {"tokens": 3, "truncated": False, "scores": {"task": score}}
    samples = [{"format": 1, "settings": {"task": "x"}}, sample, sample | {"sample": 1}]
    hard = [b'{"step": %b}\n' % value for value in HARD_JSON]
    hard += [b'{"step": 0, "eval/accuracy": %b, "reward/mean": %b}\n' % (value, value) for value in HARD_JSON]
    for key, old in (("problem", b"0"), ("reward", b"1.0"), ("id", b'"test-1"'), ("tokens", b"3")):
        name = f'"{key}": '.encode()
        hard += [_lines(samples[:2]).replace(name + old, name + value) for value in HARD_JSON]
    return [_lines(metrics), _lines(samples), _lines(metrics)[:-4], *hard]


def row_seeds() -> list[bytes]:
    """Rows of both tasks."""
    problems: list[dict[str, Any]] = [
        {"nums": [44, 19, 35], "target": 98, "solution": "44+19+35"},
        {"numbers": [4, 5], "target": 0.8},
        {"nums": [3], "target": 3.0, "solution": None},
    ]
    questions = [{"question": f"{n}?", "answer": f"So <<{n}*1={n}>>{n},000.\n#### {n},000"} for n in (1, 2, 3)]
    hard = [b'{"nums": [4, 5], "target": %b}\n' % value for value in HARD_JSON]
    hard += [b'{"nums": %b, "target": 9}\n' % value for value in (b"[%b]" % value for value in HARD_JSON)]
    hard += [b'{"question": %b, "answer": "#### 3"}\n' % value for value in HARD_JSON]
    utf16 = _lines(problems).decode().encode("utf-16-le")
    return [_lines(problems), _lines(questions), utf16[:-2], *hard]


def shown_seeds() -> list[bytes]:
    """What acts on terminals."""
    return ["\x1b[2J\x1b]0;title\x07[bold red]a[/] \x00\r\u202eltr\u2066\u200b\n</script>".encode(), b"\xff4+5=9 [x]"]


def _lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(to_json(row) + "\n" for row in rows).encode()
