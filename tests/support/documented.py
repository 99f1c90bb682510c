"""The keys of metrics.jsonl as docs/commands.md has them."""

import re
from collections.abc import Iterable
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "commands.md"


def undocumented(keys: Iterable[str]) -> set[str]:
    """The keys that are in no row of the table; NAME is any name there, and what ends with / what it begins."""
    table = PAGE.read_text(encoding="utf-8").partition("## A row of metrics.jsonl")[2].partition("\n## ")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    names = [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]
    assert len(names) > 40
    known = re.compile("|".join(re.escape(name).replace("NAME", ".+") + ".*" * name.endswith("/") for name in names))
    return {key for key in keys if not known.fullmatch(key)}
