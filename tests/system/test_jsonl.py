"""JSON that is read, and what is refused with a ValueError."""

import pytest

from eggroll_llm.system.jsonl import parse_json


def test_json_as_text_or_bytes() -> None:
    assert parse_json(b'{"a": ["\xc3\xa9"]}') == parse_json('{"a": ["\\u00e9"]}') == {"a": ["\u00e9"]}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
        ('{"a": 1}'.encode("utf-16-le"), "Expecting"),
        ('{"a": 1}'.encode("utf-16"), "utf-8"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b"9" * 5000, "limit"),
    ],
)
def test_json_that_is_refused(data: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_json(data)
