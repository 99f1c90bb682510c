"""GGUF files of a model by llama.cpp's own converter: a script of the user's, in a process of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from eggroll_llm.errors import ConfigError
from eggroll_llm.system.invocation import python_command

SCRIPT = "convert_hf_to_gguf.py"
TYPES = ("f32", "f16", "bf16", "q8_0", "auto")
"""What the converter writes; llama.cpp's `llama-quantize` makes the smaller ones from them."""
_CLONE = "git clone --depth 1 https://github.com/ggml-org/llama.cpp"


def find_converter(named: Path | None) -> Path:
    """Return the converter: the script `named`, or in the folder named, on PATH, or in $LLAMA_CPP_DIR.

    Raises ConfigError, with the commands that fetch it, when it is nowhere.
    """
    if named:
        places = [named / SCRIPT if named.is_dir() else named]
    else:
        folder, on_path = os.environ.get("LLAMA_CPP_DIR"), shutil.which(SCRIPT)
        places = [Path(place) for place in (on_path, folder and os.path.join(folder, SCRIPT)) if place]
    for place in places:
        if place.is_file():
            return place.resolve()
    looked = " or ".join(map(str, places)) or "on PATH, and LLAMA_CPP_DIR is not set"
    raise ConfigError(
        f"--gguf: llama.cpp's converter is not {looked}. Get it with `{_CLONE}` and `"
        f"{python_command('-m', 'pip', 'install', 'gguf')}`, and give its place: --converter llama.cpp/{SCRIPT}"
    )


def write_gguf(model_dir: Path, out: Path, kind: str, converter: Path) -> None:
    """Convert a model's directory to the file `out`, whole or not at all.

    Raises ConfigError when the converter fails, and OSError.
    """
    with TemporaryDirectory(prefix=".tmp-", dir=out.parent) as scratch:
        written = Path(scratch) / out.name
        # The folder of the script is on its path, as it expects; the working directory is not.
        words = [sys.executable, str(converter), str(model_dir), "--outfile", str(written), "--outtype", kind]
        outcome = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False)
        if outcome.returncode != 0 or not written.is_file():
            said = outcome.stderr.strip().rpartition("\n")[2] or f"exit status {outcome.returncode}, and no file"
            raise ConfigError(f"{converter} could not convert {model_dir}: {said}")
        with written.open("rb") as file:
            os.fsync(file.fileno())
        written.rename(out)
