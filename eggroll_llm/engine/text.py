"""Token ids -> text, and the rule that ends a completion.

A stop string of one ASCII character ends a completion exactly when a token with that character appears, which the
engine can see from the token id alone. Longer ones may straddle tokens, so that the engine has to detokenise.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any


def before_stop(text: str, stop: Sequence[str]) -> str:
    """Return the text before the first stop string."""
    return text[: min((at for string in stop if (at := text.find(string)) >= 0), default=len(text))]


class TextRules:
    """A tokenizer's view of stop strings and completions."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids_with = cache(self._find_ids_with)

    def stop_token_ids(self, stop: Sequence[str]) -> list[int] | None:
        """Return the tokens that end a completion, or None when token ids alone cannot tell."""
        if any(len(string) != 1 or not string.isascii() for string in stop):
            return None
        return sorted({token_id for string in stop for token_id in self._ids_with(string)})

    def text(self, token_ids: Sequence[int]) -> str:
        """Return the text without special tokens."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def _find_ids_with(self, character: str) -> list[int]:
        ids = range(len(self._tokenizer))
        texts = self._tokenizer.batch_decode([[token_id] for token_id in ids])
        return [token_id for token_id, text in zip(ids, texts, strict=True) if character in text]
