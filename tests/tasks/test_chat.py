"""The settings of [chat]: a system prompt and arguments of the chat template, in training and evaluation alike."""

import dataclasses
import tomllib
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from eggroll_llm.config.compare import check_resume, frozen_hash
from eggroll_llm.config.recipe import load_recipe, to_toml
from eggroll_llm.config.rules import validate
from eggroll_llm.config.schema import ChatConfig, EvalConfig, GrpoConfig, RunConfig, SamplingConfig
from eggroll_llm.engine.interface import Completion, Decoding, Request
from eggroll_llm.errors import ConfigError, ModelError, TaskError, UserError
from eggroll_llm.es.settings import EsSettings
from eggroll_llm.tasks.chat import check_chat, thought_tags
from eggroll_llm.tasks.prompts import Prompter
from eggroll_llm.training import session
from eggroll_llm.training.prepare import Prepared, prepare
from eval import evaluation
from eval.evaluation import evaluate_subject, settings_for
from eval.subject import Subject

# Like Qwen3's: a thought that is switched off is written, empty, into the prompt.
THINKING = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% generation %}{{ message.content }}{% endgeneration %}<|im_end|>\n{% if loop.last %}{% break %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
TASK = """
class Words:
    def __init__(self, style="chat"):
        self.style = style
    def problems(self, split):
        return [{"word": f"{split} {n}"} for n in range(4)]
    def prompt(self, problem):
        if self.style == "text":
            return problem["word"]
        system = [{"role": "system", "content": "Mine."}] if self.style == "system" else []
        return [*system, {"role": "user", "content": problem["word"] + ("\\ud83d" if self.style == "half" else "")}]
    def score(self, completion, problem):
        return 1.0
"""
OFF = ChatConfig(system="Answer in one word.", template_args={"enable_thinking": False})


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A task, and the tiny model with the template above."""
    (tmp_path / "words.py").write_text(TASK)
    use_template(monkeypatch, THINKING)
    return tmp_path


def use_template(monkeypatch: pytest.MonkeyPatch, template: str) -> None:
    class Templated(Prompter):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.tokenizer.chat_template = template

    monkeypatch.setattr("eggroll_llm.training.prepare.Prompter", Templated)
    monkeypatch.setattr(evaluation, "Prompter", Templated)


@pytest.fixture
def config(tiny_model: Callable[[str], Path]) -> RunConfig:
    return RunConfig(
        model=str(tiny_model("llama")),
        task="words.py:Words",
        steps=2,
        chat=OFF,
        sampling=SamplingConfig(max_tokens=20),
        es=EsSettings(population=4, sigma=0.01, learning_rate=0.01),
        eval=EvalConfig(problems=3),
    )


def texts(prepared: Prepared) -> list[str]:
    tokenizer = Prompter(prepared.model_dir).tokenizer
    return [tokenizer.decode(prompt) for prompts in (prepared.train, prepared.held_out) for prompt in prompts.prompts]


def expected(word: str) -> str:
    return (
        f"<|im_start|>system\nAnswer in one word.<|im_end|>\n<|im_start|>user\n{word}<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


WORDS = [*(f"train {n}" for n in range(4)), *(f"test {n}" for n in range(3))]


def test_both_methods_train_and_evaluate_with_them(config: RunConfig, folder: Path) -> None:
    pytest.importorskip("trl")
    grpo = dataclasses.replace(
        config,
        method="grpo",
        grpo=GrpoConfig(learning_rate=1e-6),
        sampling=SamplingConfig(max_tokens=20, samples_per_prompt=8, temperature=1.0),
    )
    for each in (config, grpo):
        prepared = prepare(each, folder)
        assert texts(prepared) == [expected(word) for word in WORDS]
        assert prepared.config.chat == OFF
    plain = prepare(dataclasses.replace(config, chat=ChatConfig()), folder)
    assert "<think>" not in "".join(texts(plain))
    assert texts(plain)[0].startswith("<|im_start|>system\nBe kind.<|im_end|>\n")


def test_they_are_set_in_a_recipe_and_by_flags(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    base = 'task = "countdown"\nsteps = 1\n[es]\nsigma = 0.1\nlearning_rate = 0.1\n'
    recipe.write_text(base + '[chat]\nsystem = "Answer in one word."\ntemplate_args = { enable_thinking = false }\n')
    assert load_recipe(recipe).chat == OFF
    flags = [("--chat.template_args.enable_thinking", "true"), ("chat.template-args.depth", "2"), ("chat.system", "x")]
    changed = load_recipe(recipe, flags)
    assert changed.chat == ChatConfig(system="x", template_args={"enable_thinking": True, "depth": 2})
    recipe.write_text(to_toml(changed))
    assert load_recipe(recipe) == changed
    recipe.write_text(base + '[chat]\n\ntemplate_args.enable_thinking = "False"\n')
    with pytest.raises(ConfigError, match=r"recipe\.toml:8: chat\.template_args\.enable_thinking = 'False': is text"):
        load_recipe(recipe)
    recipe.write_text(base + "[chat.template_args]\nadd_generation_prompt = false\n")
    with pytest.raises(ConfigError, match=r"recipe\.toml:7: .*add_generation_prompt = False: is set by the run itself"):
        load_recipe(recipe)
    with pytest.raises(ConfigError, match=r"unknown flag --chat\.sytem. Did you mean --chat\.system"):
        load_recipe(recipe, [("--chat.sytem", "x")])


def test_a_run_from_before_there_were_such_settings_resumes(tmp_path: Path) -> None:
    """The hashes are those of the version before; a run that sets one is another run."""
    es = RunConfig(task="countdown", steps=5, es=EsSettings(sigma=0.01, learning_rate=0.01), task_options={"seed": 1})
    grpo = RunConfig(
        task="countdown",
        method="grpo",
        steps=5,
        grpo=GrpoConfig(learning_rate=1e-6),
        sampling=SamplingConfig(samples_per_prompt=8, temperature=1.0),
    )
    assert frozen_hash(es) == "5f5e381cd0d9fe23c832709c457a16d53c15dc735f5f616528dd688874843dc8"
    assert frozen_hash(grpo) == "f4347e4730e3114b37e401baa7002d7537f4493e4d5ead655a670b20143147a5"
    old = {key: value for key, value in tomllib.loads(to_toml(es)).items() if key != "chat"}
    (tmp_path / "config.toml").write_text(
        session.to_toml(es).replace('[chat]\nsystem = ""\ntemplate_file = ""\n\n[chat.template_args]\n', "")
    )
    assert tomllib.loads((tmp_path / "config.toml").read_text()) == old
    check_resume(load_recipe(tmp_path / "config.toml"), es, saved_in="config.toml")
    for chat in (ChatConfig(system="x"), ChatConfig(template_args={"a": 1}), ChatConfig(template_args={"a": 2})):
        changed = dataclasses.replace(es, chat=chat)
        assert frozen_hash(changed) != frozen_hash(es)
        with pytest.raises(ConfigError, match=r'chat\.(system was "" and is now "x"|template_args\.a was not set)'):
            check_resume(load_recipe(tmp_path / "config.toml"), changed, saved_in="config.toml")


DROPS = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}{{ add_generation_prompt }}"
REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}x"


@pytest.mark.parametrize(
    ("chat", "style", "template", "kind", "said"),
    [
        (
            {"template_args": {"enable_thnking": 1}},
            "chat",
            THINKING,
            ConfigError,
            r"args\.enable_thnking: .* mean enable",
        ),
        ({"template_args": {"xyz": 1}}, "chat", THINKING, ConfigError, "no such argument. It has: enable_thinking"),
        ({"template_args": {"loop": 1}}, "chat", DROPS, ConfigError, "no such argument. It has: none"),
        ({"template_args": {"range": 1}}, "chat", DROPS, ConfigError, "no such argument"),
        ({"system": "x"}, "text", THINKING, ConfigError, "chat.system is set, but the prompts are plain text"),
        (
            {"template_args": {"a": 1}},
            "text",
            THINKING,
            ConfigError,
            "chat.template_args is set, but the prompts",
        ),
        (
            {"system": "x"},
            "system",
            THINKING,
            ConfigError,
            "messages have a system prompt already: remove it",
        ),
        ({"system": "x"}, "chat", REFUSES, ModelError, "System role not supported.: remove chat.system, or change the"),
        (
            {"system": "No."},
            "chat",
            DROPS,
            ModelError,
            "the chat template ignores the system prompt: remove",
        ),
        ({}, "half", THINKING, TaskError, "the prompt of problem 'train-1' is not valid Unicode: it holds"),
    ],
)
def test_what_would_do_nothing_is_refused_before_the_engine(
    config: RunConfig,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    chat: dict[str, Any],
    style: str,
    template: str,
    kind: type[UserError],
    said: str,
) -> None:
    use_template(monkeypatch, template)
    changed = dataclasses.replace(config, chat=ChatConfig(**chat), task_options={"style": style})
    with pytest.raises(kind, match=said):
        prepare(changed, folder)


def test_what_is_the_templates_default_is_no_reason_to_refuse(config: RunConfig, folder: Path) -> None:
    same = ChatConfig(system="Be kind.", template_args={"enable_thinking": True})
    prepared = prepare(dataclasses.replace(config, chat=same), folder)
    assert texts(prepared) == texts(prepare(dataclasses.replace(config, chat=ChatConfig()), folder))


def test_a_template_that_cannot_be_parsed_here_is_left_to_transformers(tiny_model: Callable[[str], Path]) -> None:
    prompter = Prompter(tiny_model("llama"), ChatConfig(template_args={"anything": 1}))
    prompter.apply_template = lambda messages: "text"  # type: ignore[method-assign]
    for template in ("{% some_tag_of_transformers %}", "{{ messages | some_filter_of_transformers }}"):
        prompter.tokenizer.chat_template = template
        check_chat(prompter, [[{"role": "user", "content": "x"}]])


def test_names_that_a_template_sets_itself_are_not_proposed(tiny_model: Callable[[str], Path]) -> None:
    """Unless they have a default there: Llama 3.1 has its date so, and Qwen3 the content of a message."""
    template = (
        "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}{{ date_string }}"
        "{% set depth = depth | default(1) %}{{ depth }}{% if messages %}{% set content = 'x' %}{% endif %}"
        "{{ content }}{{ bos_token }}{{ enable_thinking }}{% for i in range(2) %}{{ i }}{% endfor %}"
    )

    def check(name: str) -> None:
        prompter = Prompter(tiny_model("llama"), ChatConfig(template_args={name: 1}))
        prompter.tokenizer.chat_template = template
        check_chat(prompter, [[{"role": "user", "content": "x"}]])

    for name in ("date_string", "depth", "enable_thinking", "bos_token"):
        check(name)
    with pytest.raises(ConfigError, match=r"has no such argument\. It has: date_string, depth, enable_thinking\.$"):
        check("i")


def test_half_a_surrogate_pair_in_a_system_prompt_is_named(config: RunConfig) -> None:
    with pytest.raises(ConfigError, match=r"chat\.system = '\\ud83d x': is not valid Unicode: it holds"):
        validate(dataclasses.replace(config, chat=ChatConfig(system="\ud83d x")))


def test_a_template_file_takes_the_place_of_the_models(config: RunConfig, folder: Path) -> None:
    """Beside the recipe; in evaluations of the run from anywhere, which are the same wherever it lies."""
    (folder / "mine.jinja").write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ mark }}{% endfor %} =")
    chat = ChatConfig(system="Add.", template_file="mine.jinja", template_args={"mark": "!"})
    prepared = prepare(dataclasses.replace(config, chat=chat), folder)
    assert texts(prepared) == [f"[system] Add.![user] {word}! =" for word in WORDS]
    assert prepared.config.chat.template_file == str(folder / "mine.jinja")
    assert frozen_hash(prepared.config) != frozen_hash(
        dataclasses.replace(prepared.config, chat=dataclasses.replace(chat, template_file=""))
    )


@pytest.mark.parametrize(
    ("template", "kind", "said"),
    [
        (None, ConfigError, r"chat\.template_file = '.*mine\.jinja': cannot be read \(.*No such file"),
        (b"\xff", ConfigError, "cannot be read .*codec"),
        (b" \n", ConfigError, "is empty: write a chat template into it"),
        (b"{% for %}", ModelError, r"mine\.jinja: the chat template does not take .* \(TemplateSyntaxError"),
        (b"{{ messages.__class__.__mro__ }}", ModelError, r"mine\.jinja: .* \(SecurityError: access to attribute"),
        (b"{{ messages.clear() }}", ModelError, r"mine\.jinja: .* \(SecurityError"),
        (b"{% include '/etc/passwd' %}", ModelError, r"mine\.jinja: .* \(TypeError: no loader"),
    ],
)
def test_templates_that_are_none_or_leave_their_sandbox(
    config: RunConfig, folder: Path, template: bytes | None, kind: type[UserError], said: str
) -> None:
    if template is not None:
        (folder / "mine.jinja").write_bytes(template)
    with pytest.raises(kind, match=said):
        prepare(dataclasses.replace(config, chat=ChatConfig(template_file="mine.jinja")), folder)


def test_a_budget_needs_tokens_that_mark_thoughts(config: RunConfig, folder: Path) -> None:
    sampling = dataclasses.replace(config.sampling, thinking_token_budget=9)
    with pytest.raises(ConfigError, match=r"sampling\.thinking_token_budget = 9: .* no pair of tokens such as <think>"):
        prepare(dataclasses.replace(config, sampling=sampling), folder)


def test_tags_are_paired_by_their_names() -> None:
    written = [
        "</think>",
        "<think>",
        "[THINK]",
        "[/THINK]",
        "<|im_end|>",
        "<thought>",
        "\u25c1think\u25b7",
        "\u25c1/think\u25b7",
    ]
    added = {100 + i: SimpleNamespace(content=text) for i, text in enumerate(written)}
    assert thought_tags(SimpleNamespace(added_tokens_decoder=added)) == {101: 100, 102: 103, 106: 107}
    assert thought_tags(object()) == {}


class Asked:
    """An engine that keeps what it was asked."""

    def __init__(self) -> None:
        self.prompts: list[Sequence[int]] = []

    def stream(self, requests: Sequence[Request], decoding: Decoding) -> Generator[tuple[int, Completion], None, None]:
        self.prompts = [request.prompt_ids for request in requests]
        for i in range(len(requests)):
            yield i, Completion(text="", token_ids=(1,), truncated=False, prompt_tokens=5)

    def close(self) -> None:
        pass


def test_an_evaluation_asks_like_the_run_and_flags_go_before_it(
    config: RunConfig, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task that asks with text gets what it would without a run. Only settings that are set are in the facts."""
    engine, model = Asked(), Path(config.model)
    monkeypatch.setattr(evaluation, "start_engine", lambda *_, **__: engine)
    run = Subject(name="run", model_dir=model, config=dataclasses.replace(config, task=f"{folder}/words.py:Words"))
    base = Subject(name="base", model_dir=model, config=None)
    tokenizer = Prompter(model).tokenizer

    def asked(subject: Subject, *flags: tuple[str, str], **how: Any) -> tuple[str, Any]:
        task = None if subject is run else f"{folder}/words.py:Words"
        results = evaluate_subject(settings_for(subject, flags, task=how.pop("task", task), **how), folder)
        return tokenizer.decode(engine.prompts[0]), results.facts.get("chat")

    assert asked(run) == (expected("test 0"), {"system": OFF.system, "template_args": OFF.template_args})
    assert asked(run, task=f"{folder}/words.py:Words")[0] == expected("test 0")
    flags = [("chat.system", "Answer in one word."), ("chat.template_args.enable_thinking", "false")]
    (folder / "mine.jinja").write_text("{{ messages[0].content }}")
    file = ("chat.template_file", str(folder / "mine.jinja"))
    assert asked(base, file) == ("test 0", {"system": "", "template_args": {}})
    assert asked(base, *flags) == (expected("test 0"), {"system": OFF.system, "template_args": OFF.template_args})
    text, facts = asked(base)
    assert ("Be kind." in text, "<think>" in text, facts) == (True, False, None)
    text, facts = asked(run, ("chat.system", ""))
    assert ("Be kind." in text, "<think>" in text, facts["system"]) == (True, True, "")
    assert asked(run, ("task_options.style", "text")) == ("test 0", None)
    with pytest.raises(ConfigError, match=r"chat\.system is set, .* or let the task return chat messages"):
        asked(base, ("task_options.style", "text"), flags[0])


def test_lm_evals_prompts_take_them_with_the_chat_template_alone(
    config: RunConfig, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, model = Asked(), Path(config.model)
    monkeypatch.setattr(evaluation, "start_engine", lambda *_, **__: engine)
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text(f'{{"question": "{split}?", "answer": "#### 2"}}\n')
    run = Subject(name="run", model_dir=model, config=config)
    base = Subject(name="base", model_dir=model, config=None)
    tokenizer = Prompter(model).tokenizer
    system = ("chat.system", "Answer in one word.")

    def asked(subject: Subject, *flags: tuple[str, str], chat: bool) -> str:
        data = ("task_options.data_dir", str(folder))
        how: dict[str, Any] = {"task": "gsm8k", "shots": 0, "apply_chat_template": chat, "max_tokens": 5}
        evaluate_subject(settings_for(subject, [data, *flags], **how), folder)
        return str(tokenizer.decode(engine.prompts[0]))

    question = "Question: test?\nAnswer:"
    assert asked(run, chat=True) == expected(question)
    assert asked(run, chat=False).endswith(question)
    assert "<|im_start|>system\nAnswer in one word." in asked(base, system, chat=True)
    with pytest.raises(ConfigError, match=r"chat\.system is set, .* remove it, or add --apply-chat-template"):
        asked(base, system, chat=False)
