"""What is too large for one message: a driver fetches a state by parameter and an exported model by pieces."""

import tempfile
from pathlib import Path

from torch import Tensor

from eggroll_llm.engine.interface import Engine

PIECE = 16 << 20
"""Bytes of a file in one message."""


class Parcels:
    """One engine's state and exported model, each held until it has been fetched or is asked for again."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._state: dict[str, Tensor] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def pack_state(self) -> list[str]:
        """Return the names of what `Engine.state` returns, to be taken one by one."""
        self._state = dict(self._engine.state())
        return list(self._state)

    def take(self, name: str) -> Tensor:
        """Return one tensor of the state and let go of it."""
        return self._state.pop(name)

    def pack_export(self) -> dict[str, int]:
        """Export the model to a temporary folder and return its files -> bytes."""
        self.discard_export()
        self._folder = tempfile.TemporaryDirectory()
        self._engine.export(self._model)
        return {path.name: path.stat().st_size for path in self._model.iterdir()}

    def read(self, name: str, start: int) -> bytes:
        """Return at most `PIECE` bytes of an exported file."""
        with (self._model / name).open("rb") as file:
            file.seek(start)
            return file.read(PIECE)

    def discard_export(self) -> None:
        """Delete the exported files."""
        if self._folder:
            self._folder.cleanup()
        self._folder = None

    @property
    def _model(self) -> Path:
        assert self._folder is not None
        return Path(self._folder.name) / "model"
