"""The index of faults in README.md: it has every row, and every test that it names is there."""

import ast
import functools
import re
from pathlib import Path

TESTS = Path(__file__).parent
ROWS = 35
NOT_HERE = "not here:"


def rows() -> dict[int, str]:
    """Number -> what proves it, for each line of the table."""
    text = (TESTS / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"^\| *(\d+) *\|[^|]+\|([^|]+)\|$", text, flags=re.MULTILINE)
    numbers = [int(number) for number, _ in found]
    assert len(set(numbers)) == len(numbers)
    return {int(number): proof for number, proof in found}


def named(text: str) -> list[tuple[str, str]]:
    """(file, test) of each `file::test`."""
    return re.findall(r"`([\w/.]+\.py)::(\w+)`", text)


@functools.cache
def functions_of(file: str) -> set[str]:
    """Names of the test functions of a file, those in classes included."""
    path = TESTS / file
    if not path.is_file():
        return set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def missing(text: str) -> list[str]:
    return [f"{file}::{test}" for file, test in named(text) if test not in functions_of(file)]


def test_every_fault_has_a_row_with_a_test_or_a_reason() -> None:
    assert list(rows()) == list(range(1, ROWS + 1))
    for number, proof in rows().items():
        assert named(proof) or NOT_HERE in proof.lower(), number


def test_every_test_that_the_index_names_exists() -> None:
    text = (TESTS / "README.md").read_text(encoding="utf-8")
    assert missing(text) == []
    assert text.count("::") == len(named(text))  # none is written in a way that is not looked at
    assert len(named(text)) == len(set(named(text))), "a test is named twice"


def test_a_test_that_is_gone_would_be_noticed() -> None:
    text = "`test_index.py::test_nothing`, `none.py::test_a`, `test_push.py::test_refuses_a_damaged_checkpoint`"
    assert missing(text) == ["test_index.py::test_nothing", "none.py::test_a"]
