"""How exact products of float32 matrices are."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch


@contextmanager
def float32_products(precision: Literal["highest", "medium"]) -> Iterator[None]:
    """Set it for a while, whatever the process has set.

    "highest" is float32; "medium" rounds factors to bfloat16 where the processor multiplies those faster, and adds up
    in float32.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
