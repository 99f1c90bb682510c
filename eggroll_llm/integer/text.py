"""The text inside Python itself: the help on its own topics (`pydoc_data.topics`, PSF licence), as bytes.

It is on every machine with Python, though another version of Python has another edition.
"""

import pydoc_data.topics
import zlib

import torch
from torch import Tensor


def load_text() -> tuple[Tensor, Tensor]:
    """Return the first nine tenths, to train on, and the rest, held out: uint8."""
    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[key] for key in sorted(topics)).encode()
    bytes_T = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    train = len(bytes_T) * 9 // 10
    return bytes_T[:train], bytes_T[train:]


def unigram_bits(train_T: Tensor, held_out_T: Tensor) -> float:
    """Return bits per held-out byte of a model that knows the frequencies of bytes in the other text, and no more."""
    count_V = torch.bincount(train_T.int(), minlength=256).double() + 0.01
    return float(-(count_V / count_V.sum()).log2()[held_out_T.int()].mean())


def identity(train_T: Tensor) -> str:
    """Return what tells this text from another edition."""
    return f"pydoc_data.topics {len(train_T)} bytes {zlib.crc32(train_T.numpy().tobytes()):08x}"
