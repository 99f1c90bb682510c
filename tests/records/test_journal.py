"""What was appended is read back to the bit; what a crash or damage does to the file is dropped or named."""

import dataclasses
import errno
import itertools
import json
import os
import random
import struct
import tracemalloc
import zlib
from pathlib import Path

import pytest

from eggroll_llm.errors import JournalError
from eggroll_llm.records.journal import Journal, JournalEntry, JournalHeader, read_journal

HEADER = JournalHeader(frozen_hash="a" * 64, base_model="smollm2@123")


def float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


def entry(step: int, *fitness: float) -> JournalEntry:
    return JournalEntry(
        step=step, noise_step=step, fitness=fitness or (float32(0.1), -1.0), sigma=0.012, learning_rate=1e-3
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A journal of three updates."""
    file = tmp_path / "journal.jsonl"
    with Journal.open(file, HEADER) as journal:
        for step in (1, 2, 3):
            journal.append(entry(step))
    return file


def test_everything_reads_back_as_written(tmp_path: Path) -> None:
    file = tmp_path / "journal.jsonl"
    entries = (
        entry(1),
        JournalEntry(
            step=2,
            noise_step=1,
            fitness=(1.5,),
            sigma=0.1,
            learning_rate=1 / 3,
            dropped=(4, 5),
            checksum="ff",
        ),
    )
    with Journal.open(file, HEADER) as journal:
        assert (journal.last_step, len(journal.entries), journal.dropped_tail) == (0, 0, "")
        for item in entries:
            journal.append(item)
        assert journal.last_step == 2
    contents = read_journal(file)
    assert (contents.header, tuple(contents.entries), contents.dropped_tail) == (HEADER, entries, "")
    assert contents.line_ends[-1] == file.stat().st_size


@pytest.mark.parametrize("count", [20, 2000])
def test_fitness_keeps_every_bit_of_float32(tmp_path: Path, count: int) -> None:
    generator = random.Random(0)
    patterns = [generator.getrandbits(32) for _ in range(count)]
    patterns += [0x00000000, 0x80000000, 0x00000001, 0x807FFFFF, 0x7F7FFFFF, 0x3DCCCCCD]
    finite = [p for p in patterns if (p >> 23) & 0xFF != 0xFF]
    values = tuple(struct.unpack("f", struct.pack("I", pattern))[0] for pattern in finite)
    file = tmp_path / "journal.jsonl"
    with Journal.open(file, HEADER) as journal:
        journal.append(entry(1, *values))
    read = read_journal(file).entries[0].fitness
    assert [struct.unpack("I", struct.pack("f", value))[0] for value in read] == finite
    assert file.read_text().count("float32") == (count > 1024)


SIGNS = [(1.0, -1.0), (-1.0, 1.0), (0.0, -0.0), (0.0, 0.0)]


def test_a_line_of_262144_members_is_small_and_exact(tmp_path: Path) -> None:
    file, generator = tmp_path / "journal.jsonl", random.Random(0)
    signs = tuple(value for _ in range(1 << 17) for value in generator.choice(SIGNS))
    others = tuple(float32(generator.gauss(0, 1)) for _ in range(1 << 18))
    uneven = (*signs[:2002], 0.5, -0.5, *signs[:2])
    with Journal.open(file, HEADER) as journal:
        for step, fitness in enumerate((signs, others, uneven, signs[:2046]), start=1):
            journal.append(entry(step, *fitness))
    contents = read_journal(file)
    sizes = [end - start for start, end in itertools.pairwise(contents.line_ends)]
    assert sizes[0] < 50_000
    assert sizes[1] < 1_500_000
    for item, fitness in zip(contents.entries, (signs, others, uneven, signs[:2046]), strict=True):
        assert struct.pack(f"{len(fitness)}f", *item.fitness) == struct.pack(f"{len(fitness)}f", *fitness)


def test_updates_are_read_one_at_a_time(tmp_path: Path) -> None:
    """The memory to go through a journal is that of a few lines, however many there are."""
    file = tmp_path / "journal.jsonl"
    peaks = []
    with Journal.open(file, HEADER) as journal:
        for steps in (4, 40):
            for step in range(journal.last_step + 1, steps + 1):
                journal.append(entry(step, *(float(member) for member in range(4000))))
            tracemalloc.start()
            assert sum(len(item.fitness) for item in read_journal(file).entries[1:]) == 4000 * (steps - 1)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert peaks[1] < peaks[0] + 4000 * 8


def test_a_journal_that_changes_under_its_reader_is_noticed(path: Path) -> None:
    entries = read_journal(path).entries
    assert [item.step for item in entries[1:]] == [2, 3]
    path.write_bytes(path.read_bytes().replace(b"0.012", b"0.013"))
    with pytest.raises(JournalError, match=r"journal\.jsonl:4: damaged line .* has changed since it was opened"):
        _ = entries[-1]


def test_a_journal_of_format_1_goes_on(path: Path) -> None:
    header, rest = path.read_bytes().split(b"\n", 1)
    fields = json.loads(header)
    del fields["crc"]
    path.write_bytes(sealed(json.dumps(fields | {"format": 1}, separators=(",", ":"))) + rest)
    before = path.read_bytes()
    with Journal.open(path, HEADER) as journal:
        journal.append(entry(4, *[1.0, -1.0] * 1000))
    assert path.read_bytes().startswith(before)
    assert [len(item.fitness) for item in read_journal(path).entries] == [2, 2, 2, 2000]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.1])
def test_fitness_that_is_no_finite_float32_is_refused(path: Path, value: float) -> None:
    before = path.read_bytes()
    with Journal.open(path, HEADER) as journal, pytest.raises(ValueError, match="is not a finite float32"):
        journal.append(entry(4, value))
    assert path.read_bytes() == before


def test_steps_are_consecutive_from_one(tmp_path: Path) -> None:
    with Journal.open(tmp_path / "journal.jsonl", HEADER) as journal:
        with pytest.raises(ValueError, match="step 2 cannot follow step 0"):
            journal.append(entry(2))
        journal.append(entry(1))
        with pytest.raises(ValueError, match="step 1 cannot follow step 1"):
            journal.append(entry(1))


def test_reopened_journal_goes_on(path: Path) -> None:
    with Journal.open(path, HEADER) as journal:
        assert [item.step for item in journal.entries] == [1, 2, 3]
        journal.append(entry(4))
    assert [item.step for item in read_journal(path).entries] == [1, 2, 3, 4]


def test_cut_anywhere_in_the_last_line_drops_that_line(path: Path) -> None:
    """Whatever prefix of the last line a crash leaves, the lines before it stay and appending works."""
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    start = len(whole) - len(lines[-1])
    for size in range(start, len(whole)):
        path.write_bytes(whole[:size])
        contents = read_journal(path)
        assert [item.step for item in contents.entries] == [1, 2]
        assert bool(contents.dropped_tail) == (size > start)
        assert path.stat().st_size == size
        with Journal.open(path, HEADER) as journal:
            assert (journal.last_step, journal.dropped_tail) == (2, contents.dropped_tail)
            journal.append(entry(3))
        assert path.read_bytes() == whole
    path.write_bytes(whole[:-1])
    assert read_journal(path).dropped_tail == (
        f"{path}:4: last line dropped, incomplete line; its update is done again"
    )


def test_a_dropped_line_stays_until_something_is_written(path: Path) -> None:
    """It tells whoever opens the journal next what happened, if nothing comes of it this time."""
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    for _ in range(2):
        with Journal.open(path, HEADER) as journal:
            assert (journal.last_step, bool(journal.dropped_tail)) == (2, True)
    with Journal.open(path, HEADER) as journal:
        journal.truncate_after(2)
    assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:-1])


def test_cut_within_the_header_is_a_new_journal(path: Path) -> None:
    whole = path.read_bytes()
    header = whole.splitlines(keepends=True)[0]
    for size in range(len(header)):
        path.write_bytes(header[:size])
        with Journal.open(path, HEADER) as journal:
            assert journal.last_step == 0
        assert path.read_bytes() == header


def test_any_changed_byte_is_noticed(path: Path) -> None:
    """The last line is dropped, as after a crash, also one that has become one with the line before it; before that,
    an error names the line.
    """
    whole = path.read_bytes()
    last = len(whole) - len(whole.splitlines(keepends=True)[-1])
    for position in range(len(whole)):
        data = bytearray(whole)
        data[position] ^= 0x20
        path.write_bytes(bytes(data))
        if position >= last:
            assert [item.step for item in read_journal(path).entries] == [1, 2]
        elif position == last - 1:
            contents = read_journal(path)
            assert ([item.step for item in contents.entries], bool(contents.dropped_tail)) == ([1], True)
        else:
            line = whole[:position].count(b"\n") + 1
            with pytest.raises(JournalError, match=rf"journal\.jsonl:{line}: damaged line \(its CRC does not match\)"):
                read_journal(path)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ([0, 1, 1, 2, 3], ":3: step 1 where step 2 belongs: repeats an earlier line."),
        ([0, 1, 3], ":3: step 3 where step 2 belongs: lines are missing before it."),
        ([0, 1, 2, 3, 3], ":5: step 3 where step 4 belongs: repeats an earlier line."),
        ([1, 2, 3], ":1: the header line is missing."),
    ],
)
def test_lines_repeated_or_missing(path: Path, order: list[int], message: str) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[index] for index in order))
    with pytest.raises(JournalError) as info:
        Journal.open(path, HEADER)
    assert str(info.value).startswith(f"{path}{message} Restore the file from a backup")


def test_empty_line_in_the_middle_is_damage(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], b"\n", *lines[2:]]))
    with pytest.raises(JournalError, match=r"journal\.jsonl:3: damaged line"):
        read_journal(path)


def test_journal_of_another_run_is_refused(path: Path) -> None:
    with pytest.raises(JournalError, match=r"base model is smollm2@123, now it is other@1\. Restore"):
        Journal.open(path, JournalHeader(frozen_hash="a" * 64, base_model="other@1"))
    with pytest.raises(JournalError, match=r"other settings \(hash aaaaaaaaaaaa, now bbbbbbbbbbbb\)"):
        Journal.open(path, JournalHeader(frozen_hash="b" * 64, base_model="smollm2@123"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train": "x"}, "to train on, or their"),
        ({"held_out": "x"}, "to evaluate on, or their"),
        ({"train": "x", "held_out": "x"}, "to train on and to evaluate on, or their"),
    ],
)
def test_journal_of_other_problems_is_refused_and_left_alone(
    tmp_path: Path, changes: dict[str, str], said: str
) -> None:
    file, header = tmp_path / "journal.jsonl", dataclasses.replace(HEADER, train="a", held_out="b")
    Journal.open(file, header).close()
    with file.open("ab") as journal:
        journal.write(b'{"step"')  # an update that a crash cut short
    before = file.read_bytes()
    with pytest.raises(JournalError, match=rf"journal\.jsonl:1: the problems {said} .* restore the data"):
        Journal.open(file, dataclasses.replace(header, **changes))
    assert file.read_bytes() == before
    with Journal.open(file, header) as reopened:
        assert (reopened.header, bool(reopened.dropped_tail)) == (header, True)


def test_a_journal_that_does_not_know_its_problems_goes_on(path: Path) -> None:
    """As those of the version before: what is not known is not compared."""
    header, rest = path.read_bytes().split(b"\n", 1)
    fields = json.loads(header)
    for key in ("train", "held_out", "crc"):
        del fields[key]
    from eggroll_llm.records.journal import _encode

    path.write_bytes(_encode(fields) + rest)
    with Journal.open(path, dataclasses.replace(HEADER, train="a", held_out="b")) as journal:
        assert journal.last_step == 3


def test_journal_of_another_format_is_refused(path: Path) -> None:
    data = path.read_bytes()
    fields = json.loads(data.splitlines()[0])
    assert list(fields) == ["format", "frozen_hash", "base_model", "train", "held_out", "task_file", "crc"]
    from eggroll_llm.records.journal import _encode

    del fields["crc"]
    path.write_bytes(_encode({**fields, "format": 3}))
    path.write_bytes(path.read_bytes() + data.splitlines(keepends=True)[1])
    with pytest.raises(JournalError, match="journal format 3, but this version reads 1 to 2"):
        read_journal(path)


def sealed(text: str) -> bytes:
    """A line with the right CRC, as another program could write it."""
    body = text.encode()
    return body[:-1] + b',"crc":"%08x"}\n' % zlib.crc32(body)


UPDATE = '{"step":1,"noise_step":1,"fitness":[0.5,-1],"sigma":1,"learning_rate":0.5,"dropped":[2],"checksum":"ff"}'


def test_a_line_of_another_program_is_an_update_if_it_says_one(path: Path) -> None:
    header = path.read_bytes().splitlines(keepends=True)[0]
    path.write_bytes(header + sealed(UPDATE))
    (update,) = read_journal(path).entries
    assert (update.fitness, update.dropped, update.checksum) == ((0.5, -1), (2,), "ff")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"step":1,"noise', '"noise'),
        ('"step":1,', '"step":true,'),
        ('"noise_step":1', '"noise_step":1.0'),
        ("[0.5,-1]", "1"),
        ("[0.5,-1]", '"12"'),
        ("[0.5,-1]", "[NaN]"),
        ("[0.5,-1]", "[1e39]"),
        ("[0.5,-1]", f"[1{'0' * 400}]"),
        ("[0.5,-1]", "[null]"),
        ("[0.5,-1]", '{"float32":"AAAA"}'),
        ("[0.5,-1]", '{"float32":"AACAfw=="}'),  # infinity
        ("[0.5,-1]", '{"float32":"AAAAAA=="}, "more":1'),
        ("[0.5,-1]", '{"float32":"?"}'),
        ("[0.5,-1]", '{"float32":1}'),
        ("[0.5,-1]", '{"signs":"AA==","pairs":5}'),
        ("[0.5,-1]", '{"signs":"AA==","pairs":1.0}'),
        ("[0.5,-1]", '{"signs":"AA=="}'),
        ("[2]", "[2.0]"),
        ("[2]", '{"2": 1}'),
        ('"sigma":1', '"sigma":Infinity'),
        ('"sigma":1', '"sigma":' + "[" * 2000 + "]" * 2000),
        ('"ff"', "3"),
        ('"ff"', '"ff","more":1'),
        ('"ff"', '"ff"]'),
        (UPDATE, "{}"),
    ],
)
def test_a_line_of_another_program_that_is_no_update_is_refused(path: Path, old: str, new: str) -> None:
    """Its CRC is right, so that it is not what a crash left of a line, even at the end, and is not dropped."""
    header = path.read_bytes().splitlines(keepends=True)[0]
    assert old in UPDATE
    path.write_bytes(header + sealed(UPDATE.replace(old, new)))
    with pytest.raises(JournalError, match=r"journal\.jsonl:2: is not an update\. Restore the file from a backup\.$"):
        read_journal(path)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ('{"frozen_hash":"a"}', "journal format None, but this version reads 1 to 2"),
        ('{"format":1,"frozen_hash":"a"}', "is not the header of a journal"),
        ('{"format":1,"frozen_hash":"a","base_model":3}', "is not the header of a journal"),
        ('{"format":1,"frozen_hash":"a","base_model":"b","more":""}', "is not the header of a journal"),
        ("{{}", "the header line is missing"),
    ],
)
def test_a_header_of_another_program_is_refused(path: Path, header: str, said: str) -> None:
    path.write_bytes(sealed(header))
    with pytest.raises(JournalError, match=rf"journal\.jsonl:1: {said}"):
        read_journal(path)


def test_missing_journal_is_an_error_to_read(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match=r"none\.jsonl: cannot be read \(No such file or directory\)"):
        read_journal(tmp_path / "none.jsonl")
    with pytest.raises(JournalError, match=r"/no/journal\.jsonl: cannot write the journal \(No such file"):
        Journal.open(tmp_path / "no" / "journal.jsonl", HEADER)


def test_going_back_forgets_later_updates(path: Path) -> None:
    whole = path.read_bytes()
    with Journal.open(path, HEADER) as journal:
        journal.truncate_after(5)
        assert path.read_bytes() == whole
        journal.truncate_after(1)
        assert (journal.last_step, [item.step for item in journal.entries]) == (1, [1])
        journal.append(entry(2))
        journal.append(entry(3))
    assert path.read_bytes() == whole


def test_full_disk_leaves_the_journal_as_it_was(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()
    journal = Journal.open(path, HEADER)
    real_fsync, failures = os.fsync, [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))]

    def fsync(descriptor: int) -> None:
        if failures:
            raise failures.pop()
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(JournalError, match=r"journal\.jsonl: cannot write \d+ bytes \(No space left on device; "):
        journal.append(entry(4))
    assert path.read_bytes() == before
    journal.append(entry(4))
    journal.close()
    assert [item.step for item in read_journal(path).entries] == [1, 2, 3, 4]


def test_journal_that_cannot_be_put_right_takes_no_more(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    journal = Journal.open(path, HEADER)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(JournalError, match="Input/output error"):
        journal.append(entry(4))
    with pytest.raises(ValueError, match="closed file"):
        journal.append(entry(4))


def test_line_is_synced_before_append_returns(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    real_fsync = os.fsync
    with Journal.open(path, HEADER) as journal:
        monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_size), real_fsync(fd))[1])
        journal.append(entry(4))
    assert synced == [path.stat().st_size]
