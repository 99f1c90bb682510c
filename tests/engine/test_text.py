"""From token ids to the text that is graded."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from eggroll_llm.engine.vllm.text import TextRules

MARKS = ("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<think>", "</think>", "<|box|>")


@pytest.fixture(scope="module")
def rules(tiny_model: Callable[[str], Path]) -> TextRules:
    """Of a tokenizer that begins with <|im_start|>, ends with <|im_end|>, and has every mark as a special token."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama"))
    tokenizer.add_tokens([AddedToken(mark, special=True) for mark in MARKS], special_tokens=True)
    return TextRules(tokenizer)


@pytest.mark.parametrize(
    ("written", "text", "ended"),
    [
        ("4+5=9", "4+5=9", False),
        ("4+5=9<|im_end|>", "4+5=9", True),
        ("4+5=9<|im_end|>\n<|im_start|>user\n3+4=7", "4+5=9", True),
        ("4+5=9<|endoftext|>Make 7", "4+5=9", True),
        ("4+5=9<|eot_id|><|start_header_id|>user<|end_header_id|>", "4+5=9", True),
        ("4+5=9<|im_start|>user\n3+4=7", "4+5=9", True),
        ("<|im_start|>4+5=9<|im_end|>", "4+5=9", True),  # one that begins the model's own turn
        ("<|im_end|>3+4=7", "", True),
        ("4<|box|>+5=9", "4+5=9", False),
        ("<think>is it 7</think>4+5=9<|im_end|>", "<think>is it 7</think>4+5=9", True),
        ("is it 7</think>4+5=9", "is it 7</think>4+5=9", False),
        ("", "", False),
    ],
)
def test_special_tokens_end_the_text_at_the_turn(rules: TextRules, written: str, text: str, ended: bool) -> None:
    """An invented next turn does not run together with the answer, and thoughts stay marked."""
    token_ids = rules._tokenizer(written, add_special_tokens=False)["input_ids"]
    assert rules.turn(token_ids) == (text, ended)
