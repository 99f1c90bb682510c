"""Lines of keys, and TOML that reads back as it was."""

import tomllib

import pytest

from eggroll_llm.config.toml import key_line, write_toml
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
    assert write_toml({"none": None}) == "\n"
