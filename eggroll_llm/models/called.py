"""What a model is called next to its figures, and what it was made from."""

import os
from dataclasses import dataclass
from pathlib import Path, PurePath

from eggroll_llm.models import embedded, gguf_file
from eggroll_llm.models.adapter.peft_format import named_adapter
from eggroll_llm.records.run_dir import RunDir, is_run_dir
from eggroll_llm.records.weights import named_with


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """What a model was made from."""

    name: str
    """Of the directory of the adapter or the run."""
    step: str
    """Of the run; empty for an adapter."""
    model: str
    """The model that the adapter was merged into, or that the run began from."""


def called(model: str) -> str:
    """Return the name of a configuration's model next to its figures; for a directory, its last part."""
    if model == embedded.NAME:
        return embedded.DESCRIPTION
    if is_gguf(model):
        return gguf_file.describe(Path(os.path.expanduser(model)))
    return short_name(model) if PurePath(model).is_absolute() else model


def short_name(model: str) -> str:
    """Return a configuration's model without its folders: `run@20` of a run, `adapter@base` of an adapter."""
    if os.path.isdir(model):
        return PurePath(model).name
    return "@".join(PurePath(part).name for part in model.split("@"))


def origins(model: str) -> list[Origin]:
    """Return what a configuration's model was made from, and what that was made from, as far as the files are there."""
    found: list[Origin] = []
    seen: set[str] = set()
    while model not in seen:
        seen.add(model)
        if adapter := named_adapter(model):
            path, step, model = adapter[0], "", adapter[1]
        elif run := named_with(model, is_run_dir):
            (path, step), model = run, RunDir.open(run[0]).recorded_model()
        else:
            break
        found.append(Origin(name=path.name, step=step, model=model))
    return found


def is_gguf(model: str) -> bool:
    """Return whether a configuration's model names a GGUF file, there or not; a directory may have such a name."""
    return model.lower().endswith(gguf_file.SUFFIX) and not os.path.isdir(os.path.expanduser(model))
