"""Prompts in tokens, with the tokenizer and the chat template of the model; and how much context they need."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing

from eggroll_llm.errors import ConfigError, ModelError
from eggroll_llm.prompts import Prompter, needed_context

TEXT = "Make 9 from 4 and 5:"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": TEXT}]


@pytest.fixture
def prompter(tiny_model: Callable[[str], Path]) -> Prompter:
    return Prompter(tiny_model("llama"))


def test_text_is_continued_as_it_is(prompter: Prompter) -> None:
    ids = prompter.encode(TEXT)
    assert isinstance(ids, tuple)
    assert prompter.tokenizer.decode(ids) == TEXT


def test_chat_messages_go_through_the_template_and_ask_for_an_answer(prompter: Prompter) -> None:
    ids = prompter.encode(MESSAGES)
    assert all(type(token) is int for token in ids)
    assert prompter.tokenizer.decode(ids) == (
        f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{TEXT}<|im_end|>\n<|im_start|>assistant\n"
    )
    # Special tokens of the template are single tokens, not their spelling.
    assert ids[0] == prompter.tokenizer.convert_tokens_to_ids("<|im_start|>")


def test_lm_evals_rule_for_the_first_token(prompter: Prompter) -> None:
    """Special tokens are added unless the text starts with one, template or not."""
    tokenizer = prompter.tokenizer
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    bos = tokenizer.bos_token_id
    assert [ids.count(bos) for ids in (prompter.encode(TEXT), prompter.encode(f"<|im_start|>{TEXT}"))] == [1, 2]
    assert prompter.encode(MESSAGES).count(bos) == 3
    for prompt, count in ((TEXT, 1), (f"<|im_start|>{TEXT}", 1), (MESSAGES, 3)):
        assert prompter.encode(prompt, bos_by_text=True).count(bos) == count
    tokenizer.chat_template = "{{ messages[-1]['content'] }}"  # one that writes no special token
    assert [prompter.encode(MESSAGES, bos_by_text=rule).count(bos) for rule in (False, True)] == [0, 1]


def test_a_model_without_chat_template_says_what_to_do(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    base = shutil.copytree(tiny_model("llama"), tmp_path / "base")
    (base / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((base / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    prompter = Prompter(base)
    assert prompter.tokenizer.decode(prompter.encode(TEXT)) == TEXT
    with pytest.raises(ModelError, match=r'no chat template.*prompt_style = "few_shot"') as info:
        prompter.encode(MESSAGES)
    assert str(base) in str(info.value)


@pytest.mark.parametrize(
    ("longest", "max_tokens", "limit", "model_limit", "context"),
    [
        (100, 28, 0, 512, 128),  # exactly four blocks of 32
        (100, 29, 0, 512, 160),
        (500, 12, 0, 512, 512),
        (480, 5, 0, 500, 500),  # a block more would be beyond the model
        (100, 28, 256, 512, 256),  # what the user sets is taken
        (100, 28, 128, 512, 128),
    ],
)
def test_context_is_what_is_needed(longest: int, max_tokens: int, limit: int, model_limit: int, context: int) -> None:
    assert needed_context(longest, max_tokens, limit, model_limit) == context


@pytest.mark.parametrize(
    ("limit", "model_limit", "said"),
    [
        (0, 511, "the model's context of 511 tokens allows 511"),
        (511, 2048, "engine.max_model_len = 511 allows 511"),
    ],
)
def test_a_prompt_that_does_not_fit_is_refused(limit: int, model_limit: int, said: str) -> None:
    with pytest.raises(ConfigError) as info:
        needed_context(500, 12, limit, model_limit)
    assert said in str(info.value)
    assert "the longest prompt has 500 tokens and completions up to 12, together 512" in str(info.value)
    assert "lower sampling.max_tokens" in str(info.value)
