"""Two threads, among which the kernels divide their work, where the other tests have one."""

from collections.abc import Iterator

import pytest
from threads import threads


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    with threads(2):
        yield
