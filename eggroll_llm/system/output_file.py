"""The file that `--out` names: refused before hours are spent, written whole or not at all."""

import os
from pathlib import Path

from eggroll_llm.errors import ConfigError
from eggroll_llm.system.files import LONGEST_NAME, describe_failure, staging_of, write_text


def check_output_file(out: Path, example: str) -> None:
    """Raise ConfigError for what cannot be a file; `example` is a name that could."""
    longest = LONGEST_NAME - len(staging_of(Path(".")).name)
    if any(len(os.fsencode(part)) > longest for part in out.parts):
        raise ConfigError(f"--out {str(out)[:40]}...: a name of more than {longest} bytes: use a shorter one")
    if out.is_dir() or not out.name:
        raise ConfigError(f"--out {out}: is a folder: name a file in it, such as {out / example}")
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {out.parent}: create it")


def write_output_file(out: Path, text: str) -> None:
    """Replace the file. Raises ConfigError when it cannot be written, and the old one is still there."""
    try:
        write_text(out, text)
    except OSError as error:
        raise ConfigError(f"--out {describe_failure(out, error, f'{len(text.encode())} bytes')}") from error
