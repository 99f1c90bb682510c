"""What is fuzzed: by name a check of bytes, inputs to start from, and words of the language of the inputs."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import fuzz_graders
import fuzz_lines
import fuzz_model
import fuzz_toml
from fuzz_common import DEEP, HARD_JSON

Check = Callable[[bytes], None]
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""Where files cost least."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A surface that reads what others wrote."""

    check: Callable[[bytes, Path], None]
    """Raises where the property of the surface does not hold for the bytes; may use the folder."""
    seeds: Callable[[], list[bytes]]
    """Inputs to start from."""
    words: tuple[bytes, ...]
    """What inputs are made of."""


def _of_text(check: Check) -> Callable[[bytes, Path], None]:
    return lambda data, _: check(data)


def _words(text: str) -> tuple[bytes, ...]:
    return tuple(word.encode() for word in text.split())


_MARKERS = (
    *_words(r"#### \boxed{ \fbox{ <answer> </answer> <think> </think> Answer: answer Question: </s> \text{ {,} << >>"),
    *_words("or and million about because = ** $ % 18 1,234 .5 -7 ½ \u0663 × − 4+5=9 (4+5)"),
    *(b"The answer is ", b"\xed\xa0\x80", b"\xe2\x80\x8b", b" \t\n", b"\n\n"),
)
_TOML = (
    *_words(
        "[ ] [[ ]] { } = . , # \" ' \"\"\" ''' true false 0xff 1e400 -inf nan 1979-05-27 07:32:00 a.b.c \\u0000 \\ud800"
    ),
    *_words("es sigma learning_rate task_options task steps seed minutes trials name recipe settings seeds"),
    *(b"countdown_smollm2.toml", b"\n", b"\r\n", b"\xff"),
    *(b"0x" + b"f" * 4000, b"a." * DEEP, b"[" * DEEP),
)
_JSON = (
    *_words('{ } [ ] : , "a" "step": null true NaN Infinity -0 1.5 1e400 \\ud800 "crc" "format" "fitness" "dropped"'),
    *_words('"nums" "numbers" "target" "solution" "question" "answer" "scores" "settings" ####'),
    *_words('"weight_map" "architectures" "LlamaForCausalLM" "shape" "data_offsets" "auto_map" "__metadata__"'),
    *HARD_JSON,
    *(b"\n", b"\r\n", b"\xff", b"\x00"),
)

TARGETS = {
    "countdown": Target(
        check=_of_text(fuzz_graders.check_countdown), seeds=fuzz_graders.countdown_seeds, words=(*_MARKERS, *_JSON)
    ),
    "gsm8k": Target(check=_of_text(fuzz_graders.check_gsm8k), seeds=fuzz_graders.gsm8k_seeds, words=_MARKERS),
    "recipe": Target(check=fuzz_toml.check_recipe, seeds=fuzz_toml.recipe_seeds, words=_TOML),
    "flags": Target(check=fuzz_toml.check_flags, seeds=fuzz_toml.flag_seeds, words=_TOML),
    "sweep": Target(check=fuzz_toml.check_sweep, seeds=fuzz_toml.sweep_seeds, words=_TOML),
    "journal": Target(check=fuzz_lines.check_journal, seeds=fuzz_lines.journal_seeds, words=_JSON),
    "journal-damage": Target(check=fuzz_lines.check_journal_damage, seeds=fuzz_lines.damage_seeds, words=()),
    "jsonl": Target(check=fuzz_lines.check_jsonl, seeds=fuzz_lines.jsonl_seeds, words=_JSON),
    "rows": Target(check=fuzz_lines.check_rows, seeds=fuzz_lines.row_seeds, words=_JSON),
    "model": Target(check=fuzz_model.check_model_files, seeds=fuzz_model.model_seeds, words=_JSON),
    "manifest": Target(check=fuzz_model.check_manifest, seeds=fuzz_model.manifest_seeds, words=_JSON),
    "shown": Target(check=fuzz_lines.check_shown, seeds=fuzz_lines.shown_seeds, words=_MARKERS),
}


@contextmanager
def checking(target: Target) -> Iterator[Check]:
    """The check with a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=MEMORY) as folder:
        yield lambda data: target.check(data, Path(folder))


def dictionary(words: tuple[bytes, ...]) -> str:
    """The words as libFuzzer reads them; it takes short ones only."""
    short = [word for word in words if 1 < len(word) <= 64]
    return "".join('"' + "".join(f"\\x{byte:02x}" for byte in word) + '"\n' for word in short)
