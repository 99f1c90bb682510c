"""Prompts in tokens. Loads the tokenizer, not the model, so that lengths are known before the engine starts."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eggroll_llm.errors import ConfigError, ModelError
from eggroll_llm.tasks import Problem

Prompt = str | Sequence[Mapping[str, str]]
"""Plain text to be continued, or chat messages with "role" and "content"."""


@dataclass(frozen=True, kw_only=True)
class ProblemSet:
    """Problems with their prompts."""

    problems: Sequence[Problem]
    prompts: Sequence[tuple[int, ...]]
    """In tokens."""
    hashes: Sequence[str]
    """SHA-256 of the prompts' texts."""


class Prompter:
    """Turns prompts into tokens with a model's tokenizer and chat template."""

    def __init__(self, model_dir: Path) -> None:
        from transformers import AutoTokenizer

        self.model_dir = model_dir
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)

    @property
    def has_chat_template(self) -> bool:
        """Whether chat messages can be rendered."""
        return self.tokenizer.chat_template is not None

    def render(self, prompt: Prompt) -> str:
        """Return the prompt's text, chat template applied. Raises ModelError when it takes one and there is none."""
        if isinstance(prompt, str):
            return prompt
        if not self.has_chat_template:
            raise ModelError(
                f"{self.model_dir}: the tokenizer has no chat template, which the task's chat messages need: "
                'use prompt_style = "few_shot" in [task_options], or an instruct model'
            )
        messages = [dict(message) for message in prompt]
        return str(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))

    def encode(self, prompt: Prompt, *, bos_by_text: bool = False) -> tuple[int, ...]:
        """Return the prompt's tokens. Raises ModelError like `render`.

        The tokenizer adds its special tokens to plain text, and not to messages, as a chat template writes them itself.
        With `bos_by_text` it adds them to any text that does not start with one, which is lm-eval's rule.
        """
        return self._tokens(self.render(prompt), plain=isinstance(prompt, str), bos_by_text=bos_by_text)

    def encode_all(
        self, problems: Sequence[Problem], prompts: Sequence[Prompt], *, bos_by_text: bool = False
    ) -> ProblemSet:
        """Return the problems with their prompts, which are given in the same order, in tokens."""
        texts = [self.render(prompt) for prompt in prompts]
        return ProblemSet(
            problems=problems,
            prompts=[
                self._tokens(text, plain=isinstance(prompt, str), bos_by_text=bos_by_text)
                for text, prompt in zip(texts, prompts, strict=True)
            ],
            hashes=[text_hash(text) for text in texts],
        )

    def _tokens(self, text: str, *, plain: bool, bos_by_text: bool) -> tuple[int, ...]:
        special = plain
        if bos_by_text:
            bos = self.tokenizer.bos_token or self.tokenizer.eos_token
            special = bos is None or not text.startswith(bos)
        return tuple(self.tokenizer(text, add_special_tokens=special)["input_ids"])


def set_hash(hashes: Sequence[str]) -> str:
    """Return one hash of the hashes of many prompts, in their order."""
    return text_hash("\n".join(hashes))


def text_hash(text: str) -> str:
    """Return SHA-256 of a text as hex digits, lm-evaluation-harness's `prompt_hash`."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def needed_context(
    longest_prompt: int,
    max_tokens: int,
    limit: int,
    model_limit: int,
    remedy: str = "lower sampling.max_tokens, raise engine.max_model_len or shorten the prompts",
) -> int:
    """Return the context length to serve: `limit` when set, else just what is needed, in whole blocks of 32 tokens.

    Raises ConfigError when the longest prompt and completion do not fit, instead of truncating them.
    """
    if limit > model_limit:
        raise ConfigError(
            f"engine.max_model_len = {limit}: the model takes {model_limit} tokens: set it to that or less, or to 0"
        )
    needed = longest_prompt + max_tokens
    allowed = limit or model_limit
    if needed > allowed:
        key = f"engine.max_model_len = {limit}" if limit else f"the model's context of {model_limit} tokens"
        raise ConfigError(
            f"the longest prompt has {longest_prompt} tokens and completions up to {max_tokens}, together {needed}, "
            f"but {key} allows {allowed}: {remedy}"
        )
    return limit or min(model_limit, -(-needed // 32) * 32)
