"""Lines of keys, and TOML that reads back as it was."""

import re
import tomllib
from pathlib import Path

import pytest
from small_recipe import TOO_DEEP, TOO_LARGE

from eggroll_llm.config.toml import key_line, read_toml, write_toml
from eggroll_llm.errors import ConfigError


def test_line_of_a_key() -> None:
    text = 'a = 1\n"b c" = """\nx = 1\n[y]\n"""\n[t]\n\n[t.u] # note\nk . l = 1\nm = {n = 2}\n[[v]]\nw = 1\n'
    lines = {
        "a": 1,
        "b c": 2,
        "x": 0,
        "y": 0,
        "t": 6,
        "t.none": 6,
        "t.u": 8,
        "t.u.k.l": 9,
        "t.u.m.n": 10,
        "v.w": 12,
    }
    assert {key: key_line(text, key) for key in lines} == lines
    # What Python's splitlines ends a line at, and TOML does not.
    assert key_line("# a\u2028b\x0cc\na = 1\r\nb = 2\r\n", "b") == 3


@pytest.mark.parametrize("value", [0.1, 1e-8, 1e300, -0.0, 5e-324, 1e16, 123456789.123, 2**63 - 1, -5])
def test_numbers_are_written_exactly(value: float) -> None:
    back = tomllib.loads(write_toml({"x": value}))["x"]
    assert (repr(back), type(back)) == (repr(value), type(value))


def test_written_text_does_nothing_to_a_terminal() -> None:
    text = '\x1b[2J\x7f\x9b\u202e\u2028\ufeff\U000e0001\t\n"\\ é 九'
    written = write_toml({"x": text, text: 1})
    assert all(line.isprintable() for line in written.split("\n"))
    assert "é 九" in written
    assert tomllib.loads(written) == {"x": text, text: 1}


def test_what_toml_cannot_hold_is_refused_by_key() -> None:
    with pytest.raises(ConfigError, match=r"t\.x = '\\udcff': not valid Unicode"):
        write_toml({"t": {"x": "\udcff"}})
    with pytest.raises(ConfigError, match=r"t\.x: a object cannot be written as TOML"):
        write_toml({"t": {"x": object()}})
    with pytest.raises(ConfigError, match="key 1 is not a string"):
        write_toml({"t": {1: 2}})
    with pytest.raises(ConfigError, match=r"t\.x: integers have 64 bits"):
        write_toml({"t": {"x": 2**63}})
    assert write_toml({"none": None}) == "\n"


@pytest.mark.parametrize(
    "line",
    [
        "x = {}1{}".format("[" * 30, "]" * 30),
        "x = {}1{}".format("{a = " * 30, "}" * 30),
        "x{} = 1".format(".a" * 30),
        f"x = [{-(2**63)}, {2**63 - 1}]",
    ],
)
def test_a_value_that_is_read_can_be_written_and_a_larger_one_is_refused(tmp_path: Path, line: str) -> None:
    """32 levels with [t], and 64 bits; far beyond, the standard library gives up first."""
    file = tmp_path / "a.toml"
    file.write_text(f"[t]\n{line}\n")
    table, _ = read_toml(file)
    assert tomllib.loads(write_toml(table)) == table
    if "[-" in line:
        larger = [line.replace("07]", f"{digits}]") for digits in ("08", "7" * 5000)] + [f"x = 0x{'f' * 5000}"]
        expected = f"(:2: t.x)?: {TOO_LARGE}"
    else:
        larger = [f"x.{line}", f"x = {'[' * 9000}", f"x{'.a' * 9000} = 1", f"[t{'.a' * 9000}]"]
        expected = rf"(:\d)?: {TOO_DEEP}"
    for text in larger:
        file.write_text(f"[t]\n{text}\n")
        with pytest.raises(ConfigError) as info:
            read_toml(file)
        assert re.fullmatch(expected, str(info.value).removeprefix(str(file))), text[:80]
