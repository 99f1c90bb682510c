"""What is fuzzed: by name a check of bytes, inputs to start from, and words of the language of the inputs."""

from collections.abc import Callable
from dataclasses import dataclass

import fuzz_graders

Check = Callable[[bytes], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A grader, which reads what a model wrote."""

    check: Check
    """Raises where the property of the grader does not hold for the bytes."""
    seeds: Callable[[], list[bytes]]
    """Inputs to start from."""
    words: tuple[bytes, ...]
    """What inputs are made of."""


def _words(text: str) -> tuple[bytes, ...]:
    return tuple(word.encode() for word in text.split())


_MARKERS = (
    *_words(r"#### \boxed{ \fbox{ <answer> </answer> <think> </think> Answer: answer Question: </s> \text{ {,} << >>"),
    *_words("or and million about because = ** $ % 18 1,234 .5 -7 ½ \u0663 × − 4+5=9 (4+5)"),
    *(b"The answer is ", b"\xed\xa0\x80", b"\xe2\x80\x8b", b" \t\n", b"\n\n"),
)
_JSON = (*_words('{ } [ ] : , "a" null true NaN Infinity -0 1.5 1e400 \\ud800'), b"[" * 1200, b"9" * 4500)

TARGETS = {
    "countdown": Target(
        check=fuzz_graders.check_countdown, seeds=fuzz_graders.countdown_seeds, words=(*_MARKERS, *_JSON)
    ),
    "gsm8k": Target(check=fuzz_graders.check_gsm8k, seeds=fuzz_graders.gsm8k_seeds, words=_MARKERS),
}


def dictionary(words: tuple[bytes, ...]) -> str:
    """The words as libFuzzer reads them; it takes short ones only."""
    short = [word for word in words if 1 < len(word) <= 64]
    return "".join('"' + "".join(f"\\x{byte:02x}" for byte in word) + '"\n' for word in short)
