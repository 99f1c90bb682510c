"""What is too deep is told from what is not, by counting levels, whatever Python's stack has left."""

import pytest

from eggroll_llm.system.nesting import DEEPEST, parse_json, too_deep


def nested(levels: int) -> object:
    value: object = 1
    for level in range(levels):
        value = {"a": value} if level % 2 else [0, value]
    return value


@pytest.mark.parametrize("value", [1, "[" * 500, [], {}, [[]] * 500, nested(DEEPEST), {"a": (1, [2])}])
def test_levels_count_and_nothing_else(value: object) -> None:
    assert not too_deep(value)


@pytest.mark.parametrize("levels", [DEEPEST + 1, DEEPEST + 2, 100_000])
def test_one_level_more_is_too_deep(levels: int) -> None:
    assert too_deep(nested(levels))


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b"[" * DEEPEST + b"1" + b"]" * DEEPEST, None),
        (b'"' + b"[" * 500 + b'"', "[" * 500),
        (b"[[]" + b",[]" * 500 + b"]", [[]] * 501),
    ],
)
def test_json_that_is_read(data: bytes, value: object) -> None:
    assert value is None or parse_json(data) == value
    assert not too_deep(parse_json(data))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"[" * (DEEPEST + 1) + b"1" + b"]" * (DEEPEST + 1), "nested too deeply"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
        ('{"a": 1}'.encode("utf-16-le"), "Expecting"),
        ('{"a": 1}'.encode("utf-16"), "utf-8"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b"9" * 5000, "limit"),
    ],
)
def test_json_that_is_not(data: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_json(data)
