"""Files whose values are nested deeper than Python, which calls itself for every level, can copy, compare and show.

The parsers of JSON and TOML stop at the depth that they can take themselves, which is more than is left for what comes
after them: without a limit of ours a hostile file, or a damaged one, ends in a RecursionError somewhere else.
"""

import json
from collections.abc import Mapping
from typing import Any

DEEPEST = 100
"""Most levels of arrays and tables; nothing that this package writes has more than a few."""


def too_deep(value: object) -> bool:
    """Return whether more levels than that are in each other. Does not call itself."""
    level: list[object] = [value]
    for _ in range(DEEPEST + 1):
        inner: list[object] = []
        for item in level:
            if isinstance(item, Mapping):
                inner += item.values()
            elif isinstance(item, list | tuple):
                inner += item
        if not inner:
            return False
        level = inner
    return True


def parse_json(data: bytes | str) -> Any:
    """Return what JSON, as text or in UTF-8, holds. Raises ValueError for anything else, and for what is too deep."""
    text = data if isinstance(data, str) else data.decode()
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("values are nested too deeply") from None
    # Counting is many times faster than looking, and nearly all lines have few brackets.
    if text.count("[") + text.count("{") > DEEPEST and too_deep(value):
        raise ValueError("values are nested too deeply")
    return value
