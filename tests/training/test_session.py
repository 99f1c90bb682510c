"""What is settled and checked before the engine starts."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from eggroll_llm.config.recipe import load_recipe, to_toml
from eggroll_llm.config.schema import EngineConfig, EvalConfig, RunConfig, SamplingConfig
from eggroll_llm.errors import ConfigError, JournalError, ModelError, RunDirError, TaskError
from eggroll_llm.es.settings import EsSettings
from eggroll_llm.records.run_dir import RunDir
from eggroll_llm.tasks.prompts import Prompter
from eggroll_llm.training import session
from eggroll_llm.training.prepare import Prepared, prepare, settle
from eggroll_llm.training.session import outcome, train

TASK = """
class Words:
    def __init__(self, chat=False, train=6):
        self.chat, self.train = chat, train
    def problems(self, split):
        return [{"word": f"{split} {n}"} for n in range(self.train if split == "train" else 4)]
    def prompt(self, problem):
        return [{"role": "user", "content": problem["word"]}] if self.chat else f"Reverse {problem['word']}:"
    def score(self, completion, problem):
        return float(completion == problem["word"][::-1])
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "words.py").write_text(TASK)
    return tmp_path


@pytest.fixture
def config(tiny_model: Callable[[str], Path]) -> RunConfig:
    return RunConfig(
        model=str(tiny_model("llama")),
        task="tasks/words.py:Words",
        steps=2,
        sampling=SamplingConfig(max_tokens=20),
        es=EsSettings(population=4, sigma=0.01, learning_rate=0.01),
        eval=EvalConfig(problems=3),
    )


def test_validation_problems_are_the_last_of_train_and_not_trained_on(config: RunConfig, folder: Path) -> None:
    words = {split: [f"{split} {n}" for n in range(6 if split == "train" else 4)] for split in ("train", "test")}

    def prepared(**changes: Any) -> tuple[list[str], list[str]]:
        found = prepare(dataclasses.replace(config, eval=EvalConfig(**changes)), folder)
        return [p["word"] for p in found.train.problems], [p["word"] for p in found.held_out.problems]

    assert prepared(problems=3) == (words["train"], words["test"][:3])
    assert prepared(problems=2, split="validation") == (words["train"][:4], words["train"][4:])
    with pytest.raises(ConfigError, match=r"eval\.problems = 6 leaves none of 6 training problems: lower it"):
        prepared(problems=6, split="validation")


ASKED = """
class Words:
    def __init__(self, chat=False):
        self.chat = chat
    def problems(self, split):
        return [{{"word": word, "split": split}} for word in {words}[split]]
    def prompt(self, problem):
        return [{{"role": "user", "content": problem["word"]}}] if self.chat else problem["word"]
    def score(self, completion, problem):
        return 0.0
"""


def test_training_problems_that_are_asked_like_a_held_out_one_are_left_out(
    config: RunConfig, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also like one that this run is not evaluated on. Other columns may differ: the prompt decides."""

    def changed(train: str, test: str, **changes: Any) -> RunConfig:
        name = f"words{len(list(folder.iterdir()))}.py"
        (folder / name).write_text(ASKED.format(words={"train": list(train), "test": list(test)}))
        return dataclasses.replace(config, task=f"{name}:Words", **changes)

    def words(found: Prepared) -> tuple[str, str]:
        splits = (found.train.problems, found.held_out.problems)
        train, held_out = ("".join(problem["word"] for problem in problems) for problems in splits)
        return train, held_out

    for chat in (False, True):
        found = prepare(changed("abcdaa", "xyzadz", task_options={"chat": chat}), folder)
        assert words(found) == ("bc", "xyz")
        assert found.notes == ("4 training problems were left out: they have the prompt of a held-out one.",)
    found = prepare(changed("abcab", "xyz", eval=EvalConfig(problems=2, split="validation")), folder)
    assert words(found) == ("c", "ab")
    found = prepare(changed("aab", "xyz"), folder)
    assert (words(found), found.notes) == (("aab", "xyz"), ())
    with pytest.raises(TaskError, match="every training problem has the prompt of a held-out one"):
        prepare(changed("ab", "bax"), folder)

    def start(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "start_engine", start)
    display: Any = Quiet()
    with pytest.raises(KeyboardInterrupt):
        train(changed("abx", "xyz"), folder, folder / "run", "fail", display)
    assert "1 training problems were left out: they have the prompt of a held-out one." in display.said


def test_everything_automatic_is_settled(config: RunConfig, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eggroll_llm.training.prepare.resolve_dtype", lambda name: {"auto": "float32"}.get(name, name))
    settled = settle(config, folder)
    assert settled.task == f"{folder}/tasks/words.py:Words"
    assert (settled.engine.dtype, settled.engine.slots, settled.engine.max_sequences) == ("float32", 4, 128)
    assert settle(settled, Path("/elsewhere")) == settled
    large = dataclasses.replace(config, es=dataclasses.replace(config.es, population=200))
    assert settle(large, folder).engine.slots == 64
    said = dataclasses.replace(config, engine=EngineConfig(slots=7, dtype="bfloat16", max_sequences=9))
    assert settle(said, folder).engine == said.engine
    with monkeypatch.context() as patch:
        patch.setattr("eggroll_llm.system.hardware.serves_on_cpu", lambda: False)  # as on a GPU
        assert settle(config, folder).engine.max_sequences == 512
    assert settle(dataclasses.replace(config, task="gsm8k"), folder).task == "gsm8k"
    monkeypatch.chdir(folder)
    for name, is_local in {"m.gguf": True, "me/model": False}.items():
        settled_name = settle(dataclasses.replace(config, model=name), folder).model
        assert settled_name == (str(folder.resolve() / name) if is_local else name)


def test_masters_are_not_split_from_float32(config: RunConfig, folder: Path) -> None:
    split = dataclasses.replace(config, es=dataclasses.replace(config.es, masters="split"))
    served = {dtype: dataclasses.replace(split, engine=EngineConfig(dtype=dtype)) for dtype in ("bfloat16", "float32")}
    assert settle(served["bfloat16"], folder).es.masters == "split"
    with pytest.raises(ConfigError, match=r'^es\.masters = "split": engine\.dtype = "float32" serves float32 here.*'):
        settle(served["float32"], folder)
    settle(dataclasses.replace(served["float32"], method="grpo"), folder)


@pytest.mark.parametrize(("method", "dtype"), [("es", "float32"), ("grpo", "bfloat16")])
def test_fp8_is_of_bfloat16_and_es_only(config: RunConfig, folder: Path, method: Any, dtype: Any) -> None:
    fine = dataclasses.replace(config, engine=EngineConfig(dtype="bfloat16", quantization="fp8"))
    assert settle(fine, folder).engine.quantization == "fp8"
    other = dataclasses.replace(fine, method=method, engine=dataclasses.replace(fine.engine, dtype=dtype))
    found = f'method = "{method}" and engine\\.dtype = "{dtype}"'
    with pytest.raises(ConfigError, match=rf'^engine\.quantization = "fp8": .*{found}'):
        settle(other, folder)


def test_paths_of_built_in_tasks_are_made_absolute(config: RunConfig, folder: Path) -> None:
    """The resolved configuration lies in another folder than the recipe."""

    def options(task: str, **given: Any) -> dict[str, Any]:
        return dict(settle(dataclasses.replace(config, task=task, task_options=given), folder).task_options)

    assert options("gsm8k", data_dir="../data", seed=2) == {"data_dir": str(folder.parent / "data"), "seed": 2}
    assert options("countdown", file="a.jsonl", test_file="/b.jsonl") == {
        "file": f"{folder}/a.jsonl",
        "test_file": "/b.jsonl",
    }
    assert options("countdown", file="") == {"file": ""}
    # What a user's task makes of its options is its own business.
    assert options("tasks/words.py:Words", data_dir="x", file="y") == {"data_dir": "x", "file": "y"}


def test_prompts_are_tokens_and_the_context_is_what_they_need(config: RunConfig, folder: Path) -> None:
    prepared = prepare(config, folder)
    assert [problem["word"] for problem in prepared.train.problems] == [f"train {n}" for n in range(6)]
    assert [problem["word"] for problem in prepared.held_out.problems] == ["test 0", "test 1", "test 2"]
    tokenizer = Prompter(prepared.model_dir).tokenizer
    for split in (prepared.train, prepared.held_out):
        texts = [tokenizer.decode(prompt) for prompt in split.prompts]
        assert texts == [f"Reverse {problem['word']}:" for problem in split.problems]
    longest = max(map(len, (*prepared.train.prompts, *prepared.held_out.prompts)))
    context = prepared.config.engine.max_model_len
    assert context % 32 == 0
    assert context - 32 < longest + 20 <= context
    assert prepared.model_dir == Path(config.model)
    # Written into the run directory, it reads back as the same.
    resolved = folder / "config.toml"
    resolved.write_text(to_toml(prepared.config))
    assert load_recipe(resolved) == prepared.config


def test_the_longer_of_training_and_evaluation_counts(config: RunConfig, folder: Path) -> None:
    longer = dataclasses.replace(config, eval=EvalConfig(problems=3, max_tokens=300))
    assert 300 < prepare(longer, folder).config.engine.max_model_len <= 352


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"sampling": SamplingConfig(max_tokens=500)},
            r"model's context of 512 tokens allows 512: lower sampling\.max_tokens to \d+, shorten the prompts or use "
            "a model with a longer context$",
        ),
        (
            {"eval": EvalConfig(problems=3, max_tokens=500)},
            r"allows 512: lower eval\.max_tokens to \d+, shorten the prompts or use a model with a longer context$",
        ),
        (
            {"engine": EngineConfig(max_model_len=30)},
            r"max_model_len = 30 allows 30: raise engine\.max_model_len to \d+, lower sampling\.max_tokens to \d+ or "
            "shorten the prompts$",
        ),
    ],
)
def test_a_context_that_is_too_short_is_refused(
    config: RunConfig, folder: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=f"the longest prompt has .*{said}"):
        prepare(dataclasses.replace(config, **changes), folder)


def test_prompts_that_are_too_long_are_counted(config: RunConfig, folder: Path) -> None:
    """Ids are those that a task without any is given; held-out prompts count too."""
    long = dataclasses.replace(config, engine=EngineConfig(max_model_len=30))
    with pytest.raises(ConfigError, match=r"^9 of 9 prompts are too long, first train-1 with \d+ tokens; the longest"):
        prepare(long, folder)


def test_a_rank_that_no_weight_of_the_model_has_is_refused(
    config: RunConfig, folder: Path, tiny_model: Callable[[str], Path]
) -> None:
    narrow = shutil.copytree(tiny_model("llama"), folder / "narrow")
    save_file({"model.layers.0.k_proj.weight": torch.zeros(3, 8)}, narrow / "model.safetensors")
    config = dataclasses.replace(config, model=str(narrow), es=dataclasses.replace(config.es, rank=4))
    with pytest.raises(ConfigError, match=r"^es\.rank = 4: .* is 3 x 8; its rank is at most 3"):
        prepare(config, folder)
    prepare(dataclasses.replace(config, es=dataclasses.replace(config.es, rank=3)), folder)


def test_a_model_without_linear_layers_that_can_be_trained_is_refused(
    config: RunConfig, folder: Path, tiny_model: Callable[[str], Path]
) -> None:
    other = shutil.copytree(tiny_model("llama"), folder / "other")
    save_file({"transformer.h.0.attn.c_attn.weight": torch.zeros(3, 8)}, other / "model.safetensors")
    with pytest.raises(ModelError, match="nothing to train"):
        prepare(dataclasses.replace(config, model=str(other)), folder)


def test_a_run_for_which_memory_is_short_leaves_nothing(
    config: RunConfig, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settings can be changed and the same directory named again. What it would take can be asked anyway."""
    monkeypatch.setattr(session, "start_engine", lambda *_, **__: pytest.fail("the engine was started"))
    monkeypatch.setattr("eggroll_llm.training.budget.available_memory", lambda: 2**29)
    monkeypatch.setattr("eggroll_llm.training.budget.serves_on_cpu", lambda: True)
    quiet: Any = Quiet()
    with pytest.raises(ConfigError, match=r"and 0\.50 GiB are available: lower engine\.kv_cache_gib from 1 to 0\."):
        train(config, folder, folder / "run", "fail", quiet)
    assert not (folder / "run").exists()
    prepare(config, folder)


def test_a_context_beyond_the_model_is_refused(config: RunConfig, folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"engine\.max_model_len = 4096: the model takes 512 tokens: set it to that"):
        prepare(dataclasses.replace(config, engine=EngineConfig(max_model_len=4096)), folder)


def test_what_else_is_wrong_is_found_before_the_engine(
    config: RunConfig, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "start_engine", lambda *_, **__: pytest.fail("the engine was started"))

    def refused(error: type[Exception], match: str, **changes: Any) -> None:
        with pytest.raises(error, match=match):
            train(dataclasses.replace(config, **changes), folder, folder / "run", "fail", Quiet())

    refused(ModelError, "neither an existing directory", model="no/such/model")
    refused(TaskError, "there is no such file", task="words.py:Words")
    refused(TaskError, r'problems\("train"\) is empty', task_options={"train": 0})
    assert not (folder / "run").exists()

    (folder / "run").mkdir()
    (folder / "run" / "thesis.tex").write_text("precious")
    refused(RunDirError, "neither empty nor a run directory")
    assert (folder / "run" / "thesis.tex").read_text() == "precious"


class Quiet:
    """A display for runs that do not get that far."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def message(self, text: str) -> None:
        self.said.append(text)

    def working(self, text: str) -> None:
        pass

    sampling = step = evaluation = course = None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 0}, r"^configuration: steps = 0, minutes = 0\.0: the run would never end\."),
        ({"steps": "2"}, r'^configuration: steps = "2" is a string, but an integer is expected\.'),
        ({"es": EsSettings(population=5, sigma=0.01, learning_rate=0.01)}, "pairs need an even population"),
    ],
    ids=["end", "type", "pairs"],
)
def test_a_configuration_that_was_changed_in_python_is_checked_before_the_task_is_loaded(
    config: RunConfig, folder: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr(session, "prepare", lambda *_: pytest.fail("the task was loaded"))
    with pytest.raises(ConfigError, match=said):
        train(dataclasses.replace(config, **changes), folder, folder / "run", "fail", Quiet())
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "qwen2"}, 'model was "{llama}" and is now "{qwen2}"'),
        (
            {"task": "tasks/other.py:Words"},
            'task was "{folder}/tasks/words.py:Words" and is now "{folder}/tasks/other.py',
        ),
        ({"es": EsSettings(population=6, sigma=0.01, learning_rate=0.01)}, "es.population was 4 and is now 6"),
        ({"es": EsSettings(population=4, sigma=0.02, learning_rate=0.01)}, "es.sigma was 0.01 and is now 0.02"),
        ({"seed": 1}, "seed was 0 and is now 1"),
        ({"task_options": {"chat": True}}, "task_options.chat was not set and is now true"),
        ({"eval": EvalConfig(problems=2)}, "eval.problems was 3 and is now 2"),
    ],
    ids=["model", "task", "population", "sigma", "seed", "task option", "evaluation"],
)
def test_a_run_with_other_settings_is_not_resumed(
    config: RunConfig,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_model: Callable[[str], Path],
    changes: dict[str, Any],
    said: str,
) -> None:
    monkeypatch.setattr(session, "start_engine", lambda *_, **__: pytest.fail("the engine was started"))
    (folder / "tasks" / "other.py").write_text(TASK)
    models = {kind: str(tiny_model(kind)) for kind in ("llama", "qwen2")}
    saved = to_toml(prepare(config, folder).config)
    with RunDir.create(folder / "run", saved) as run:
        run.journal.write_text("")
    if "model" in changes:
        changes = {"model": models[changes["model"]]}
    with pytest.raises(ConfigError, match="cannot resume with changed settings: ") as info:
        train(dataclasses.replace(config, **changes), folder, folder / "run", "resume", Quiet())
    assert said.format(folder=folder, **models) in str(info.value)
    assert (folder / "run" / "config.toml").read_text() == saved


class Started(BaseException):
    """The run has begun: its journal says what it is a run of."""


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('f"{split} {n}"', 'f"{split}  {n}"', "problems to train on and to evaluate on, or their prompts,"),
        ("else 4)]", 'else 4)][::1 if split == "test" else -1]', "problems to train on, or their prompts,"),
        ("else 4)]", 'else 4)][::1 if split == "train" else -1]', "problems to evaluate on, or their prompts,"),
        ('{"word":', '{"gold": n, "word":', "problems to train on and to evaluate on, or their prompts,"),
        ("Reverse {", "Say backwards {", "problems to train on and to evaluate on, or their prompts,"),
    ],
    ids=["words", "order of train", "order of test", "answers", "prompts"],
)
def test_a_run_whose_problems_have_changed_is_not_resumed(
    config: RunConfig, folder: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, said: str
) -> None:
    """In a file of the same name. Nothing is changed, and with the old content the run goes on."""

    def start(*_: Any, **__: Any) -> None:
        raise Started

    monkeypatch.setattr(session, "start_engine", start)
    task, path = folder / "tasks" / "words.py", folder / "run"
    with pytest.raises(Started):
        train(config, folder, path, "fail", Quiet())
    before = {file: file.read_bytes() for file in (path / "journal.jsonl", path / "config.toml")}
    edited = task.read_text().replace(old, new)
    assert edited != TASK
    task.write_text(edited)
    with pytest.raises(JournalError) as info:
        train(dataclasses.replace(config, steps=9), folder, path, "resume", Quiet())
    assert str(info.value).startswith(f"{path}/journal.jsonl:1: the {said} changed since the run started: restore ")
    assert {file: file.read_bytes() for file in before} == before
    task.write_text(TASK)
    with pytest.raises(Started):
        train(config, folder, path, "resume", Quiet())


def test_a_run_whose_score_has_changed_says_so_and_goes_on(
    config: RunConfig, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake in it may have been why the run was stopped."""

    def start(*_: Any, **__: Any) -> None:
        raise Started

    monkeypatch.setattr(session, "start_engine", start)
    task, display, said = folder / "tasks" / "words.py", Quiet(), []
    monkeypatch.setattr(display, "message", said.append)
    for on_existing, source in (("fail", TASK), ("resume", TASK), ("resume", TASK + "# edited\n"), ("resume", TASK)):
        task.write_text(source)
        said.append(f"{source == TASK}")
        with pytest.raises(Started):
            train(config, folder, folder / "run", on_existing, display)  # type: ignore[arg-type]
    changed = "the task file or a module it imports changed since the run started: rewards may differ"
    assert [text for text in said if text in ("True", "False", changed)] == ["True", "True", "False", changed, "True"]


def test_a_run_directory_that_cannot_be_used_is_refused_before_the_model_is_looked_for(
    config: RunConfig, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("resolve_model", "load_task", "Prompter"):
        monkeypatch.setattr(
            f"eggroll_llm.training.prepare.{name}", lambda *_, name=name: pytest.fail(f"{name} was called")
        )

    def refused(path: Path | str, on_existing: Any = "fail") -> str:
        before = sorted(folder.rglob("*"))
        with pytest.raises(RunDirError) as info:
            train(config, folder, Path(path), on_existing, Quiet())
        assert sorted(folder.rglob("*")) == before
        return str(info.value)

    (folder / "file").touch()
    assert refused(folder / "file").startswith(f"{folder}/file: is a file.")
    assert refused(folder / "file" / "run").startswith(f"{folder}/file/run: {folder}/file is not a folder.")
    assert "the folder" in refused(folder / "no" / "run")
    assert 'contains ".."' in refused(folder / ".." / "run")
    assert "not a path" in refused("a\0b")
    assert "File name too long" in refused(folder / ("x" * 300))
    assert "neither empty nor a run directory" in refused(folder)
    with RunDir.create(folder / "run", "") as run:
        run.append_metrics({"step": 0})
    assert "already holds a run" in refused(folder / "run")
    assert "journal.jsonl: missing" in refused(folder / "run", "resume")
    (folder / "readonly").mkdir()
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "is not writable" in refused(folder / "readonly")
    assert "is not writable" in refused(folder / "new")


def test_chat_needs_a_template(config: RunConfig, folder: Path, tiny_model: Callable[[str], Path]) -> None:
    base = shutil.copytree(tiny_model("llama"), folder / "base")
    (base / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer = json.loads((base / "tokenizer_config.json").read_text())
    tokenizer.pop("chat_template", None)
    (base / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    plain = dataclasses.replace(config, model=str(base))
    assert prepare(plain, folder).config.model == str(base)
    with pytest.raises(ModelError, match="no chat template"):
        prepare(dataclasses.replace(plain, task_options={"chat": True}), folder)


def test_outcome_is_read_from_the_directory(tmp_path: Path) -> None:
    with RunDir.create(tmp_path / "run", "") as run:
        for row in (
            {"step": 0, "wall_time": 0.0, "eval/accuracy": 0.25},
            {"step": 1, "wall_time": 10.0},
            {"step": 2, "wall_time": 20.5, "eval/accuracy": 0.5},
            {"step": 3, "wall_time": 31.0},
        ):
            run.append_metrics(row)
        found = outcome(run, RunConfig(task="countdown", steps=3))
    assert (found.steps, found.wall_time, len(found.metrics)) == (3, 31.0, 4)
    assert (found.first["eval/accuracy"], found.last["eval/accuracy"], found.last["step"]) == (0.25, 0.5, 2)
    assert (found.base_model, found.constant) == ("SmolLM2-135M-Instruct, 4-bit GGUF expanded to bfloat16", None)
    assert found.final == tmp_path / "run" / "final"
