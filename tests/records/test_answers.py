"""The file of graded completions: continued after a kill at any byte, never counting a completion twice."""

import errno
import io
import json
import math
import os
import re
import threading
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from eggroll_llm.errors import SamplesError
from eggroll_llm.records.answers import TASK, Graded, Sample, SampleFile, read_samples, write_samples

SETTINGS = {"task": "t", "limit": 3, "temperature": 0.0}
NASTY = 'a "quote" \x1b[31m \u202e \ud800 \x00 </script>\r\n'


def sample(problem: int, number: int = 0, **changes: Any) -> Sample:
    fields: dict[str, Any] = {
        "problem": problem,
        "sample": number,
        "id": f"test-{problem}",
        "doc": {"question": "?", "numbers": [1, 2]},
        "prompt_hash": "ab",
        "completion": f"text {problem}",
        "tokens": 3,
        "truncated": False,
        "scores": {TASK: Graded(correct=True, reward=1.0, detail="correct", answer="18")},
    }
    return Sample(**{**fields, **changes})


def line_of(**changes: Any) -> bytes:
    """Of another sample, some of whose fields are not what they should be."""
    return json.dumps(asdict(sample(7)) | changes).encode() + b"\n"


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    with SampleFile(path, SETTINGS) as file:
        file.append(sample(1))
        file.append(sample(0, 1))
    settings, found = read_samples(path)
    assert settings == SETTINGS
    assert found == [sample(1), sample(0, 1)]
    with SampleFile(path, SETTINGS) as file:
        assert file.samples == {(1, 0): sample(1), (0, 1): sample(0, 1)}
        file.append(sample(2))
    assert len(read_samples(path)[1]) == 3
    write_samples(tmp_path / "whole.jsonl", SETTINGS, [sample(1), sample(0, 1), sample(2)])
    assert (tmp_path / "whole.jsonl").read_bytes() == path.read_bytes()


def test_a_problem_that_json_cannot_hold_is_written_as_text(tmp_path: Path) -> None:
    circle: list[Any] = []
    circle.append(circle)
    doc = MappingProxyType(
        {
            "grid": np.zeros(3),
            "one": np.float64(2),
            "lock": threading.Lock(),
            "module": json,
            "circle": circle,
            "n": 10**5000,
        }
    )
    write_samples(tmp_path / "s.jsonl", SETTINGS, [sample(0, doc=doc), sample(1)])
    first, second = read_samples(tmp_path / "s.jsonl")[1]
    assert second == sample(1)
    assert (first.doc["grid"], first.doc["one"], first.doc["circle"], first.doc["n"]) == (
        "[0. 0. 0.]",
        2,
        "list",
        "int",
    )
    assert "lock" in first.doc["lock"]


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s.jsonl"

    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with SampleFile(path, SETTINGS) as file:
        file.append(sample(1))
        file.replace([sample(1, completion="again")])
    assert read_samples(path)[1] == [sample(1, completion="again")]


def test_hostile_text_and_numbers_stay_inert(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    with SampleFile(path, SETTINGS) as file:
        grade = Graded(correct=False, reward=math.nan, detail=NASTY)
        file.append(sample(0, completion=NASTY, id=NASTY, doc={NASTY: math.inf}, scores={"x": grade}))
    text = path.read_bytes().decode("ascii")
    assert "\x1b" not in text
    assert "NaN" not in text
    (found,) = read_samples(path)[1]
    assert found.completion == NASTY.replace("\ud800", "\ufffd")
    assert math.isnan(found.scores["x"].reward)


def test_killed_at_any_byte(tmp_path: Path) -> None:
    """Cut anywhere, the file continues with exactly the completions whose lines are complete."""
    whole = tmp_path / "whole.jsonl"
    write_samples(whole, SETTINGS, [sample(0), sample(1)])
    data = whole.read_bytes()
    path = tmp_path / "cut.jsonl"
    for size in range(len(data) + 1):
        path.write_bytes(data[:size])
        lines = data[:size].count(b"\n")
        with SampleFile(path, SETTINGS) as file:
            assert len(file.samples) == max(0, lines - 1)
            for i in range(2):
                if (i, 0) not in file.samples:
                    file.append(sample(i))
        assert path.read_bytes() == data


def test_nothing_is_there_twice(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    with SampleFile(path, SETTINGS) as file:
        file.append(sample(0))
        with pytest.raises(SamplesError, match="problem 0, sample 0 is already in the file"):
            file.append(sample(0))
    path.write_bytes(path.read_bytes() + path.read_bytes().split(b"\n")[1] + b"\n")
    with pytest.raises(SamplesError, match=r"s\.jsonl:3: problem 0, sample 0 appears twice"):
        SampleFile(path, SETTINGS)


def test_another_evaluation_is_refused_or_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    with SampleFile(path, SETTINGS) as file:
        file.append(sample(0))
    before = path.read_bytes()
    other = {**SETTINGS, "limit": 4, "seed": 1}
    with pytest.raises(SamplesError, match="limit was 3 and is now 4; seed was None and is now 1") as error:
        SampleFile(path, other)
    assert "--on-existing overwrite" in str(error.value)
    assert path.read_bytes() == before
    with SampleFile(path, other, overwrite=True) as file:
        assert file.samples == {}
    assert read_samples(path) == (other, [])


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    with SampleFile(path, SETTINGS), pytest.raises(SamplesError, match="another evaluation is writing this file"):
        SampleFile(path, SETTINGS)
    SampleFile(path, SETTINGS).close()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"not json\n", r":2: is damaged"),
        (b"[]\n", r":2: is damaged"),
        (b'{"problem": 1}\n', r":2: is damaged"),
        (b'{"problem": 1, "scores": {"x": 1}}\n', r":2: is damaged"),
        (b"[" * 2000 + b"]" * 2000 + b"\n", r":2: is damaged \(values are nested too deeply\)"),
        (line_of(problem=[1]), r":2: is damaged \(problem and sample are counted\)"),
        (line_of(sample="0"), r":2: is damaged \(problem and sample are counted\)"),
        (line_of(kind=7), r":2: is damaged \(a kind is text\)"),
        (line_of(scores={"x": {"correct": True, "reward": 10**400, "detail": ""}}), r":2: is damaged \(int too large"),
    ],
)
def test_damage_in_the_middle_names_the_line(tmp_path: Path, line: bytes, said: str) -> None:
    path = tmp_path / "s.jsonl"
    write_samples(path, SETTINGS, [sample(0)])
    head, tail = path.read_bytes().split(b"\n", 1)
    path.write_bytes(head + b"\n" + line + tail)
    for attempt in (read_samples, lambda path: SampleFile(path, SETTINGS)):
        with pytest.raises(SamplesError, match=said):
            attempt(path)
    assert path.read_bytes() == head + b"\n" + line + tail


@pytest.mark.parametrize(
    "text", ["x\n", "[]\n", '{"format": 1}\n', '{"settings": {}}\n', "1\n", "no newline", '{"a": 1', "x\ny"]
)
def test_a_file_of_another_kind_is_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with pytest.raises(SamplesError, match=r"notes\.txt:1: is not a file of graded completions"):
        SampleFile(path, SETTINGS)
    assert path.read_text() == text


def test_a_later_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text(json.dumps({"format": 2, "settings": SETTINGS}) + "\n")
    with pytest.raises(SamplesError, match="format 2, but this version reads 1"):
        SampleFile(path, SETTINGS)


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(SamplesError, match="cannot write completions"):
        SampleFile(tmp_path / "no" / "s.jsonl", SETTINGS)
    with pytest.raises(SamplesError, match="cannot be read"):
        read_samples(tmp_path / "none.jsonl")


def test_a_full_disk_takes_back_half_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real_open, room = tmp_path / "s.jsonl", Path.open, [20]
    with SampleFile(path, SETTINGS) as file:
        file.append(sample(0))
    before = path.read_bytes()

    class Disk(io.FileIO):
        def write(self, data: Any) -> int:
            if not room[0]:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written = super().write(data[: room[0]])
            room[0] -= written
            return written

    def open_path(self: Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
        return (
            Disk(self, mode.replace("b", ""))
            if self == path and "a" in mode
            else real_open(self, mode, *rest, **options)
        )

    said = rf"^{re.escape(str(path))}: cannot write \d+ bytes \(No space left on device; \d+ bytes are free\)"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_path)
        with SampleFile(path, SETTINGS) as file, pytest.raises(SamplesError, match=said):
            file.append(sample(1))
    assert (path.read_bytes(), room) == (before, [0])
    with SampleFile(path, SETTINGS) as file:
        file.append(sample(1))
    assert read_samples(path)[1] == [sample(0), sample(1)]


def test_a_disk_that_takes_nothing_at_the_end_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file = SampleFile(tmp_path / "s.jsonl", SETTINGS)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(SamplesError, match=r"s\.jsonl: cannot write completions \(No space left on device; "):
        file.close()
    file.close()
