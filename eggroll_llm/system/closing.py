"""Objects that hold a file or a lock until they are closed, as context managers."""

from types import TracebackType
from typing import Self


class Closing:
    """Closed at the end of a `with` block, whatever ended it."""

    def close(self) -> None:
        """Give free what is held; a second call does nothing."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
