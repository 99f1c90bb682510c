"""Fitness as it stands in a line of the journal: readable decimals, or for a large population one text.

    up to `READABLE` members    [0.5, -1.0, ...]                             about 20 bytes each
    signs                       {"signs": base64, "pairs": K}                two bits a pair
    others                      {"float32": base64}                          little-endian, 5.3 bytes each

The bits are those that were given, zeros with their signs included: a pair without a winner is 0, -0, one that was left
out 0, 0.
"""

import base64
import binascii
import math
import struct
from typing import Any

READABLE = 1024
_TOO_LARGE = 2.0**128  # for float32
_PAIRS = ((1.0, -1.0), (-1.0, 1.0), (0.0, -0.0), (0.0, 0.0))
_CODES = {struct.pack("<2f", *pair): code for code, pair in enumerate(_PAIRS)}
_PAIRS_OF_BYTE = [sum((_PAIRS[byte >> shift & 3] for shift in (0, 2, 4, 6)), ()) for byte in range(256)]


def pack(fitness: tuple[float, ...]) -> list[float] | dict[str, Any]:
    """Return fitness as JSON has it. Raises ValueError for a value that is not a finite float32."""
    try:
        packed = struct.pack(f"<{len(fitness)}f", *fitness)
    except OverflowError:
        packed = b"\0" * 4 * len(fitness)
    for value, kept in zip(fitness, struct.unpack(f"<{len(fitness)}f", packed), strict=True):
        if value != kept or not math.isfinite(value):
            raise ValueError(f"fitness {value!r} is not a finite float32")
    if len(fitness) <= READABLE:
        return list(fitness)
    signs = None if len(fitness) % 2 else _signs(packed)
    if signs is None:
        return {"float32": base64.b64encode(packed).decode()}
    return {"signs": base64.b64encode(signs).decode(), "pairs": len(fitness) // 2}


def _signs(packed: bytes) -> bytes | None:
    """Return two bits for each pair of float32 values, the first in the lowest; None when they are not signs."""
    codes = [_CODES.get(packed[at : at + 8]) for at in range(0, len(packed), 8)]
    known = [code for code in codes if code is not None]
    if len(known) < len(codes):
        return None
    known += [0] * (-len(known) % 4)
    return bytes(a | b << 2 | c << 4 | d << 6 for a, b, c, d in zip(*[iter(known)] * 4, strict=True))


def unpack(value: Any) -> tuple[float, ...] | None:
    """Return the fitness of a line, None when it is none."""
    match value:
        case list():
            numbers = all(type(number) in (int, float) and abs(number) < _TOO_LARGE for number in value)
            return tuple(value) if numbers else None
        case {"float32": str(text), **others} if not others:
            packed = _decoded(text)
            if packed is None or len(packed) % 4:
                return None
            fitness = struct.unpack(f"<{len(packed) // 4}f", packed)
            return fitness if all(map(math.isfinite, fitness)) else None
        case {"signs": str(text), "pairs": int(pairs), **others} if not others:
            packed = _decoded(text)
            if packed is None or len(packed) != -(-pairs // 4):
                return None
            fitness = tuple(number for byte in packed for number in _PAIRS_OF_BYTE[byte])
            return fitness[: 2 * pairs]
    return None


def _decoded(text: str) -> bytes | None:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
