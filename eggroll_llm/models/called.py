"""What a model is called next to its figures."""

from pathlib import Path, PurePath

from eggroll_llm.models import embedded, gguf_file


def called(model: str) -> str:
    """Return the name of a configuration's model next to its figures; for a directory, its last part."""
    if model == embedded.NAME:
        return embedded.DESCRIPTION
    if is_gguf(model):
        return gguf_file.describe(Path(model).expanduser())
    return PurePath(model).name if PurePath(model).is_absolute() else model


def is_gguf(model: str) -> bool:
    """Return whether a configuration's model names a GGUF file, there or not; a directory may have such a name."""
    return model.lower().endswith(gguf_file.SUFFIX) and not Path(model).expanduser().is_dir()
