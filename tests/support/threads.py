"""Another number of threads for a while, also in a process that has served a model.

vLLM's worker puts a function that does nothing in the place of `torch.set_num_threads`.
"""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch._C.set_num_threads(count)
    assert torch.get_num_threads() == count
    try:
        yield
    finally:
        torch._C.set_num_threads(before)
