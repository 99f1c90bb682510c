"""Prompts in tokens, with the tokenizer and the chat template of the model; and how much context they need."""

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing

from eggroll_llm.engine.interface import Completion
from eggroll_llm.errors import ConfigError, ModelError, TaskError
from eggroll_llm.tasks.prompts import ProblemSet, Prompter, needed_context, problems_hash, questions_of
from eggroll_llm.training.scorer import answered

TEXT = "Make 9 from 4 and 5:"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": TEXT}]


@pytest.fixture
def prompter(tiny_model: Callable[[str], Path]) -> Prompter:
    return Prompter(tiny_model("llama"))


def test_a_prompt_without_a_token_is_named(prompter: Prompter) -> None:
    with pytest.raises(TaskError, match=r"^the prompt of problem 'b' is empty: write one$"):
        prompter.encode_all([{"id": "a"}, {"id": "b"}], ["x", ""])


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
    assert needed_context([prompts(1, longest), prompts(7)], max_tokens, limit, model_limit) == context


def prompts(*lengths: int, name: str = "train") -> ProblemSet:
    return ProblemSet(
        problems=[{"id": f"{name}-{number}"} for number in range(len(lengths))],
        prompts=[(1,) * length for length in lengths],
        hashes=[""] * len(lengths),
    )


@pytest.mark.parametrize(
    ("limit", "model_limit", "said"),
    [
        (
            0,
            511,
            "the model's context of 511 tokens allows 511: lower sampling.max_tokens to 11, shorten the prompts or use "
            "a model with a longer context",
        ),
        (0, 500, "allows 500: shorten the prompts or use a model with a longer context"),
        (
            511,
            512,
            "engine.max_model_len = 511 allows 511: raise engine.max_model_len to 512, lower sampling.max_tokens to 11 "
            "or shorten the prompts",
        ),
        (400, 600, "allows 400: raise engine.max_model_len to 512 or shorten the prompts"),
        (400, 500, "allows 400: shorten the prompts or use a model with a longer context"),
    ],
)
def test_a_prompt_that_does_not_fit_is_refused(limit: int, model_limit: int, said: str) -> None:
    with pytest.raises(ConfigError) as info:
        needed_context([prompts(500)], 12, limit, model_limit)
    assert str(info.value).startswith("1 of 1 prompts is too long, first train-0 with 500 tokens; ")
    assert str(info.value).endswith(said)
    assert "the longest prompt has 500 tokens and completions up to 12, together 512" in str(info.value)


def test_only_we_say_that_a_prompt_is_long(prompter: Prompter, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would promise "indexing errors" first."""
    said: list[str] = []
    logger = logging.getLogger("transformers.tokenization_utils_base")
    monkeypatch.setattr(logger, "warning", lambda text, *_: said.append(text))
    assert len(prompter.encode("a " * 600)) > 512
    assert said == []


def test_the_hash_of_problems_is_of_their_content_and_order() -> None:
    """Of an object that is no JSON only the type counts: its text may be another in every process."""

    def of(*problems: dict[object, object], prompts: str = "ab") -> str:
        return problems_hash(ProblemSet(problems=problems, prompts=[(1,)] * len(problems), hashes=list(prompts)))

    one, two = {"id": 1, "x": [1, 2]}, {"id": 2, "f": object(), (1, 2): "no key of JSON"}
    assert of(one, two) == of(dict(one), two | {"f": object()})
    others = [of(two, one), of(one | {"x": [1, 3]}, two), of(one, two, prompts="ac"), of(one, two | {"f": len})]
    assert len({of(one, two), *others}) == 5


def test_the_hash_of_problems_stays_what_it_was() -> None:
    """Runs are resumed only with the same one."""
    problems = [{"id": "train-1", "word": "é", "n": [1, 2.5, None]}, {"id": "train-2", "any": {1}}]
    found = problems_hash(ProblemSet(problems=problems, prompts=[(1,)] * 2, hashes=["ab", "cd"]))
    assert found == "bcd2ba3e3867e4927f7ba0d541ea853e56ab1f5306c9bb8aee13c14bece67687"


def test_a_problem_with_a_circle_in_it_counts_by_the_rest() -> None:
    """Also one that is too deep, or holds a number that Python does not write out."""

    def of(n: int, part: object) -> str:
        problem = {"id": 1, "n": n, "part": part}
        return problems_hash(ProblemSet(problems=[problem], prompts=[(1,)], hashes=["a"]))

    circle: list[object] = []
    circle.append(circle)
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    for part in (circle, deep, 10**5000):
        assert of(1, part) == of(1, part) != of(2, part)
    assert of(1, circle) != of(1, 10**5000)


def test_all_prompts_that_do_not_fit_are_counted_and_the_first_is_named() -> None:
    """To the token: with 12 more, 500 fit into 512 and 501 do not."""
    train, test = prompts(*[500] * 1201, 501, 700, 20), prompts(500, 501, name="test")
    with pytest.raises(ConfigError, match="the longest prompt has 700 tokens and completions up to 12, together 712"):
        needed_context([train, test], 12, 0, 512)
    with pytest.raises(ConfigError, match=r"^3 of 1,206 prompts are too long, first train-1201 with 501 tokens; "):
        needed_context([train, test], 12, 0, 512)
    with pytest.raises(ConfigError, match=r"^1 of 2 prompts is too long, first test-1 with 501 tokens; "):
        needed_context([test], 12, 512, 4096)
    assert needed_context([prompts(*[500] * 3)], 12, 0, 512) == 512


@pytest.mark.parametrize("prompt", ["x\ud83d", [{"role": "user", "content": "\udc00"}]])
def test_half_a_surrogate_pair_is_a_mistake_of_the_problem(prompter: Prompter, prompt: object) -> None:
    with pytest.raises(TaskError, match="the prompt of problem 'second' is not valid Unicode: it holds"):
        prompter.encode_all([{"id": "first"}, {"id": "second"}], ["x", prompt])  # type: ignore[list-item]


def test_a_problems_name_does_not_act_on_a_terminal() -> None:
    named = ProblemSet(problems=[{"id": "a\x1b[2J\n\u202eb" + 99 * "c"}], prompts=[(1,) * 9], hashes=[""])
    with pytest.raises(ConfigError) as info:
        needed_context([named], 9, 0, 10)
    assert r"first a\x1b[2J \u202ebccc" in str(info.value)
    assert str(info.value).isprintable()
    assert len(str(info.value)) < 400


@pytest.fixture
def copied(tiny_model: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))


def test_a_model_without_tokenizer_is_refused(copied: Path) -> None:
    """transformers would go on with one that knows no words."""
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (copied / file).unlink()
    with pytest.raises(ModelError, match=rf"^{copied} has no tokenizer \(none of tokenizer\.json.*copy it from the"):
        Prompter(copied)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        *[
            (file, text)
            for file in ("tokenizer.json", "tokenizer_config.json")
            for text in (b"", b"{", b"[]", b"\xff\xfe")
        ],
        ("tokenizer.json", b'{"model": {"type": "\\u001b[2J"}}'),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"0": "\\u001b[2J"}}'),
    ],
)
def test_a_damaged_tokenizer_is_refused(copied: Path, file: str, content: bytes) -> None:
    (copied / file).write_bytes(content)
    with pytest.raises(ModelError, match=r"the tokenizer cannot be loaded .*: restore it from the original") as info:
        Prompter(copied)
    assert str(copied) in str(info.value)
    assert str(info.value).isprintable()
    assert info.value.__cause__ is not None


def test_half_a_tokenizer_is_refused(copied: Path) -> None:
    whole = (copied / "tokenizer.json").read_bytes()
    (copied / "tokenizer.json").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="the tokenizer cannot be loaded"):
        Prompter(copied)


@pytest.mark.parametrize("auto_map", [{"AutoTokenizer": ["own.Own", None]}, ["own.Own", None]])
def test_a_tokenizer_with_code_of_its_own_is_refused_and_not_replaced(copied: Path, auto_map: object) -> None:
    """transformers knows a tokenizer for Llama models and would take it, whatever the model was made with."""
    ran = copied.parent / "ran"
    (copied / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: pass\n")
    path = copied / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": auto_map, "tokenizer_class": "Own"}))
    with pytest.raises(ModelError, match="'auto_map' asks to run Python code shipped with the model") as info:
        Prompter(copied)
    assert str(path) in str(info.value)
    assert not ran.exists()


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
        ("{% for message in messages %}", "unexpected|Unexpected"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "unsafe|undefined|has no attribute"),
    ],
)
def test_a_chat_template_that_fails_says_so(prompter: Prompter, template: str, said: str) -> None:
    prompter.tokenizer.chat_template = template
    with pytest.raises(ModelError, match=f"the chat template does not take the task's messages .*({said})"):
        prompter.encode(MESSAGES)


OPENED = (
    "<think>",
    "Reason first.\n<think>\n",
    "<|im_start|>assistant\n<think>\n",
    "Assistant: <think>\nLet me see.",
    "[THINK]",
)
MENTIONED = (
    "Reason between <think> and </think>.\nAnswer:",
    "Reason in <think> tags.\nAnswer:",
    "<|im_start|>user\nBegin with:\n<think><|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>assistant\n<think>\n\n</think>\n\n",
)


@pytest.mark.parametrize(("text", "opened"), [*((t, True) for t in OPENED), *((t, False) for t in MENTIONED)])
def test_prompts_that_end_in_a_thought_are_marked(prompter: Prompter, text: str, opened: bool) -> None:
    problems = prompter.encode_all([{}, {}], [TEXT, text])
    assert problems.in_thought == ({1} if opened else set())


def test_a_chat_template_that_opens_a_thought_is_seen_by_the_grader(prompter: Prompter) -> None:
    prompter.tokenizer.chat_template += "{% if add_generation_prompt %}<think>\n{% endif %}"
    problems = prompter.encode_all([{"id": 7}], [MESSAGES])
    completion = Completion(text="so 9", token_ids=(), truncated=True, prompt_tokens=1)
    graded, problem = answered(problems, 0, completion)
    assert (graded, problem) == (dataclasses.replace(completion, thought_open=True), {"id": 7})


def test_the_question_is_what_differs_between_prompts() -> None:
    """Examples, instructions and what opens the answer are the same in all of them."""
    few_shot = [f"1 + 1 = 2\n2 + 2 = 4\n{n} + {n} =" for n in (3, 4)]
    assert questions_of(few_shot) == ["3 + 3 =", "4 + 4 ="]
    opened = [f"User: What is {n}?\nAssistant: Let me think.\n<think>" for n in (3, 4)]
    assert questions_of(opened) == ["User: What is 3?", "User: What is 4?"]
    chats = [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"Is {n} even?\n\nThink first."}]
        for n in (3, 4)
    ]
    assert questions_of(chats) == ["Is 3 even?", "Is 4 even?"]
    assert questions_of(["a\nb"]) == ["b"]
    assert questions_of(["a\nsame", "a\nsame"]) == ["same", "same"]
    assert questions_of(["", "x" * 300]) == ["", "x" * 200]
