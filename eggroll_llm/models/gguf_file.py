"""The header of a GGUF file: its metadata, and where each tensor lies; and which files can be a model here.

A GGUF is foreign data. Every count and length in it is compared with what is left of the file before anything of that
size is allocated. Only the standard library is used, so mistakes are found before anything heavy is imported.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

import array
import functools
import math
import mmap
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eggroll_llm.errors import ModelError
from eggroll_llm.system.terminal import inert

SUFFIX = ".gguf"
ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""What `general.architecture` may be."""

_STRING, _ARRAY = 8, 9
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Type of a value -> its struct format."""
_DIMENSIONS = 4  # what ggml allows
_MINIMUM = {"key": 13, "tensor": 24}  # bytes that each takes at least
# Names of `general.file_type`; an empty one was never in use, or is not any more.
_FILE_TYPES = (
    *("F32", "F16", "Q4_0", "Q4_1", "", "", "", "Q8_0", "Q5_0", "Q5_1", "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S"),
    *("Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "IQ2_XXS", "IQ2_XS", "Q2_K_S", "IQ3_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL"),
    *("IQ3_S", "IQ3_M", "IQ2_S", "IQ2_M", "IQ4_XS", "IQ1_M", "BF16"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """A tensor as it is stored."""

    shape: tuple[int, ...]
    """Of the values, slowest first as in torch."""
    kind: int
    """Number of its ggml type."""
    offset: int
    """Its first byte, from the start of the file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """What a GGUF file says before its weights."""

    path: Path
    metadata: dict[str, Any]
    """Key -> number, text or sequence of these."""
    tensors: dict[str, StoredTensor]
    """In the order of the file."""

    @property
    def architecture(self) -> str:
        """Return `general.architecture`; empty when there is none."""
        return str(self.metadata.get("general.architecture", ""))


def read_header(path: Path) -> Header:
    """Return the header. Raises ModelError for a file that cannot be read, is no GGUF, or is damaged."""
    try:
        with path.open("rb") as file:
            start = file.read(4)
            if start != b"GGUF":
                raise ModelError(f"{path} is not a GGUF file, it begins with {start!r}: download it again")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _parse(path, _Cursor(content))
    except ModelError:
        raise
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror or error}): correct `model`") from error
    except (ValueError, OverflowError) as error:  # of decoding, too
        raise ModelError(f"{path} is damaged ({inert(str(error))}): download it again") from error


def check_header(header: Header) -> None:
    """Raise ModelError for a GGUF that is only a part, no language model, or of another architecture."""
    parts = header.metadata.get("split.count", 0)
    if (isinstance(parts, int) and parts > 1) or re.search(r"-\d{5}-of-(?!00001)\d{5}\.gguf$", header.path.name):
        raise ModelError(
            f"{header.path} is one of several parts of a model: merge them with `llama-gguf-split --merge FIRST_PART "
            "OUT.gguf` of llama.cpp and name the result"
        )
    if header.architecture not in ARCHITECTURES or header.metadata.get("general.type", "model") != "model":
        kind = f"general.type {header.metadata.get('general.type', 'model')!r} and architecture {header.architecture!r}"
        raise ModelError(
            f"{header.path} has {inert(kind)}: a GGUF can be a model here if its architecture is one of "
            f"{', '.join(ARCHITECTURES)}; of others, use the original's directory or hub id"
        )


@functools.lru_cache(maxsize=8)
def general(path: Path) -> Mapping[str, Any]:
    """Return what a GGUF file says of itself, `general.name` as `name` and so on; nothing when it cannot be read.

    A report or a card may be written where the file is not. Kept, because a header takes a quarter of a second.
    """
    try:
        metadata = read_header(path).metadata
    except ModelError:
        return {}
    return {key.removeprefix("general."): value for key, value in metadata.items() if key.startswith("general.")}


def describe(path: Path) -> str:
    """Return what to call the model of a GGUF file next to its figures: never by the name of the original alone."""
    number = general(path).get("file_type")
    kind = _FILE_TYPES[number] if type(number) is int and 0 <= number < len(_FILE_TYPES) else ""
    if kind in ("F32", "F16", "BF16"):
        return f"{path.name}, {kind} GGUF in bfloat16"
    bits = re.search(r"\d", kind)
    return f"{path.name}, {f'{bits[0]}-bit ({kind}) ' if bits else ''}GGUF expanded to bfloat16"


class _Cursor:
    """Reads values one after the other, and nothing beyond the end."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content = content
        self.position = 4

    def left(self) -> int:
        return len(self.content) - self.position

    def check(self, count: int, size: int, what: str) -> None:
        if count * size > self.left():
            raise ValueError(f"it ends within its header: {count} {what} of at least {size} bytes in {self.left()}")

    def number(self, code: str) -> Any:
        size = struct.calcsize(f"<{code}")
        self.check(1, size, "numbers")
        (value,) = struct.unpack_from(f"<{code}", self.content, self.position)
        self.position += size
        return value

    def text(self) -> str:
        length = self.number("Q")
        self.check(length, 1, "characters")
        self.position += length
        return self.content[self.position - length : self.position].decode()

    def numbers(self, code: str, count: int) -> Sequence[Any]:
        size = struct.calcsize(f"<{code}")
        self.check(count, size, "numbers")
        values = array.array("B" if code == "?" else code)
        values.frombytes(self.content[self.position : self.position + count * size])
        self.position += count * size
        return values

    def value(self) -> Any:
        kind = self.number("I")
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.number(_format(kind))
        kind, count = self.number("I"), self.number("Q")
        if kind != _STRING:
            return self.numbers(_format(kind), count)
        self.check(count, 8, "strings")
        return [self.text() for _ in range(count)]


def _format(kind: int) -> str:
    if kind not in _FORMATS:
        raise ValueError(f"a value has type {kind}")
    return _FORMATS[kind]


def _parse(path: Path, cursor: _Cursor) -> Header:
    version = cursor.number("I")
    if version not in (2, 3):
        raise ModelError(f"{path} is a GGUF of version {version}; versions 2 and 3 can be read: convert it again")
    tensors, keys = cursor.number("Q"), cursor.number("Q")
    cursor.check(keys, _MINIMUM["key"], "keys")
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        key = cursor.text()
        if key in metadata:
            raise ValueError(f"it has the key {key!r} twice")
        metadata[key] = cursor.value()
    cursor.check(tensors, _MINIMUM["tensor"], "tensors")
    found: dict[str, StoredTensor] = {}
    for _ in range(tensors):
        name = cursor.text()
        if name in found:
            raise ValueError(f"it has the tensor {name!r} twice")
        found[name] = _tensor(cursor)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"its alignment is {alignment}")
    start = -(-cursor.position // alignment) * alignment
    placed = {
        name: StoredTensor(shape=each.shape, kind=each.kind, offset=start + each.offset) for name, each in found.items()
    }
    return Header(path=path, metadata=metadata, tensors=placed)


def _tensor(cursor: _Cursor) -> StoredTensor:
    """Read one entry; its offset counts from the first tensor."""
    count = cursor.number("I")
    if not 1 <= count <= _DIMENSIONS:
        raise ValueError(f"a tensor has {count} dimensions")
    shape = tuple(cursor.number("Q") for _ in range(count))[::-1]
    if not 0 < math.prod(shape) < 2**48:
        raise ValueError(f"a tensor has shape {shape}")
    return StoredTensor(shape=shape, kind=cursor.number("I"), offset=cursor.number("Q"))
