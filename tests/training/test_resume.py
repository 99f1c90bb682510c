"""Resuming: what a kill, damage or a hand has left is passed over, put right or refused, and changes nothing.

With the stand-in engine, but for the last part, which is training with the real one on tiny models, and what it leaves.
"""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grpo_stub
import pytest
import torch
from fake_engine import CONFIG, Bench, Near, same_run, timeless, train_once
from safetensors.torch import load_file

from eggroll_llm.cli.display import ConsoleDisplay
from eggroll_llm.cli.main import main
from eggroll_llm.config.compare import applies, flat, may_change
from eggroll_llm.config.help import field_help
from eggroll_llm.config.recipe import load_recipe
from eggroll_llm.config.schema import CheckpointConfig, EvalConfig, RunConfig
from eggroll_llm.engine.vllm.text import TextRules
from eggroll_llm.errors import CheckpointError, ConfigError, JournalError, RunDirError
from eggroll_llm.records.answers import read_samples
from eggroll_llm.records.checkpoint import load_training_state, save_checkpoint, verify_checkpoint
from eggroll_llm.records.journal import Journal, read_journal
from eggroll_llm.records.run_dir import LOCK, RunDir
from eggroll_llm.system.invocation import command
from eggroll_llm.tasks.load import load_task
from eggroll_llm.tasks.task import Answer, Score
from eggroll_llm.training import es as trainer
from eggroll_llm.training import session
from eggroll_llm.training.replay import replay
from eggroll_llm.training.session import Outcome, train

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


@pytest.fixture
def grpo(tmp_path: Path, tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> grpo_stub.Bench:
    return grpo_stub.Bench(tmp_path, tiny_model("llama"), monkeypatch)


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def every(steps: int, keep: int = 2) -> dict[str, Any]:
    """Checkpoints for no other reason."""
    return {"checkpoint": CheckpointConfig(every=steps, keep=keep, best=False)}


def cut_off_a_byte(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def test_the_command_goes_on_with_the_runs_own_settings(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """But for those that may change and are given; with others nothing is started."""
    bench.train("whole", steps=4)
    bench.train("run", steps=2)
    run, asked, train_ = bench.folder / "run", [], session.train

    def train(config: RunConfig, recipe_dir: Path, *rest: Any) -> Outcome:
        asked.append((config, recipe_dir, *rest[:2]))
        return train_(config, recipe_dir, *rest)

    monkeypatch.setattr(session, "train", train)
    with bench.standing_in("run", dataclasses.replace(CONFIG, steps=4), Near()):
        assert main(["resume", str(run), "--es.sigma", "0.1", "--steps", "4"]) == 2
        assert "cannot resume with changed settings: es.sigma was 0.05 and is now 0.1." in capsys.readouterr().err
        assert asked == []
        assert main(["resume", str(run), "--steps", "4"]) == 0
    assert asked == [(dataclasses.replace(CONFIG, steps=4), run, run, "resume")]
    same_run(run, bench.folder / "whole")
    assert f"continue: {command('resume', run, '--steps', 8)}" in capsys.readouterr().out.splitlines()


def test_a_run_is_not_called_shorter_than_it_is(bench: Bench) -> None:
    bench.train("run", steps=3)
    before = (bench.folder / "run" / "config.toml").read_bytes()
    with pytest.raises(ConfigError) as info:
        bench.train("run", "resume", steps=2)
    run = bench.folder / "run"
    assert str(info.value) == (
        f"steps = 2: {run} has done 3 steps. Set steps to 3 or more; the model of an earlier step is rebuilt by: "
        + command("replay", run, "--step", 2, "--out", "DIR")
    )
    assert (run / "config.toml").read_bytes() == before


@pytest.mark.parametrize("where", ["truncate_logs", "truncate_after"])
def test_a_resume_that_ends_early_leaves_what_the_next_one_needs(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """The damaged last line of a journal, whose update the metrics have, until what follows from it is done."""
    bench.train("whole", steps=4)
    bench.train("halves", steps=3)
    cut_off_a_byte(bench.folder / "halves" / "journal.jsonl")
    owner: Any = RunDir if where == "truncate_logs" else Journal
    with monkeypatch.context() as patch:
        patch.setattr(owner, where, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            bench.train("halves", "resume", steps=4)
    bench.train("halves", "resume", steps=4)
    same_run(bench.folder / "whole", bench.folder / "halves")


def test_a_run_that_a_schedule_holds_to_its_steps_offers_no_more(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(CONFIG, steps=2, es=dataclasses.replace(CONFIG.es, sigma_schedule="linear"))
    bench.train("run", **{"steps": 2, "es": config.es})
    with bench.standing_in("run", config, Near()):
        assert main(["resume", str(bench.folder / "run")]) == 0
    assert "continue: " not in capsys.readouterr().out


def test_a_half_written_checkpoint_is_gone_after_resuming(bench: Bench) -> None:
    bench.train("run", steps=2, **every(1))
    root = bench.folder / "run" / "checkpoints"
    shutil.copytree(root / "step-000002", root / ".tmp-step-000003-1")
    (root / ".tmp-step-000003-1" / "manifest.json").unlink()
    bench.train("run", "resume", steps=3, **every(0))
    assert checkpoints(bench.folder / "run") == ["step-000001", "step-000002"]


def test_what_a_kill_left_is_said(bench: Bench) -> None:
    """Half a line of the journal, and a lock that nobody gave back."""
    bench.train("whole")
    bench.train("halves", steps=2)
    path = bench.folder / "halves"
    cut_off_a_byte(path / "journal.jsonl")
    (path / LOCK).write_text('{"pid": 12345, "host": "elsewhere"}')
    bench.display.messages.clear()
    bench.train("halves", "resume")
    assert bench.display.messages[:2] == [
        "the last process that trained here did not shut down cleanly: process 12345 on elsewhere",
        f"{path}/journal.jsonl:3: last line dropped, incomplete line; its update is done again",
    ]
    same_run(bench.folder / "whole", path)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda lines: [lines[0], lines[1].replace(b":", b";", 1), *lines[2:]], ":2: damaged line (its CRC"),
        (lambda lines: [*lines[:2], *lines[1:]], ":3: step 1 where step 2 belongs: repeats an earlier line"),
        (lambda lines: [lines[0], *lines[2:]], ":2: step 2 where step 1 belongs: lines are missing before it"),
        (lambda lines: [b"", *lines[1:]], ":1: the header line is missing"),
    ],
    ids=["changed", "repeated", "missing", "no header"],
)
def test_a_run_with_damage_in_the_middle_of_its_journal_is_refused_and_left_alone(
    bench: Bench, damage: Callable[[list[bytes]], list[bytes]], said: str
) -> None:
    bench.train("run", steps=3)
    path = bench.folder / "run"
    journal = path / "journal.jsonl"
    journal.write_bytes(b"".join(damage(journal.read_bytes().splitlines(keepends=True))))
    before = contents(path)
    bench.prepare_engine = lambda engine: pytest.fail("the engine was started")
    with pytest.raises(JournalError) as info:
        bench.train("run", "resume", steps=4)
    assert str(info.value).startswith(f"{journal}{said}")
    assert contents(path) == before


def contents(run: Path) -> dict[Path, bytes]:
    """All files of a run but those that every start of it changes."""
    files = [file for file in run.rglob("*") if file.is_file() and file.name not in ("environment.json", LOCK)]
    return {file: file.read_bytes() for file in files}


def another(key: str, value: Any) -> Any:
    """Another value that makes sense, of a setting that a resumed run may change."""
    if key == "engine.max_model_len":
        return 300
    if isinstance(value, bool):
        return not value
    return {int: lambda: value + 1, float: lambda: value / 2 or 60.0, str: lambda: f"{value}x"}[type(value)]()


MAY_CHANGE = [
    row.key for row in field_help(RunConfig) if may_change(row.key) and applies(row.key, CONFIG) and row.key != "steps"
]


@pytest.fixture(scope="module")
def whole_and_half(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run without an interruption, and one that ended after half of its steps."""
    folder = train_once(tmp_path_factory.mktemp("runs"), whole={}, half={"steps": 2})
    return folder / "whole", folder / "half"


@pytest.mark.parametrize("key", MAY_CHANGE)
def test_a_setting_that_may_change_on_resume_changes_no_weight(
    bench: Bench, whole_and_half: tuple[Path, Path], key: str
) -> None:
    table, _, name = key.rpartition(".")
    value = another(key, flat(CONFIG)[key])
    more = {"replicas": value} if key == "engine.min_replicas" else {}  # of which no more may be needed
    changes = {table: dataclasses.replace(getattr(CONFIG, table), **{name: value}, **more)} if table else {name: value}
    one, other = whole_and_half[0], shutil.copytree(whole_and_half[1], bench.folder / "halves")
    bench.train("halves", "resume", **changes)
    assert (one / "journal.jsonl").read_text() == (other / "journal.jsonl").read_text()
    finals = [(path / "final" / "model.safetensors").read_bytes() for path in (one, other)]
    assert finals[0] == finals[1]
    assert flat(load_recipe(other / "config.toml"))[key] == value


class Other(Near):
    """The same problems and another reward: another course."""

    def reward(self, member: int, value: float, problem: Mapping[str, Any]) -> float:
        return value


def test_checkpoints_of_a_course_that_was_given_up_are_removed(bench: Bench) -> None:
    """Journal and metrics were cut back by hand. Left there, that of step 4 would be taken once there are 4 again."""
    bench.train("whole", steps=5, **every(0))
    bench.train("cut", steps=2, **every(1, keep=4))
    bench.train("cut", "resume", task=Other(), steps=4, **every(1, keep=4))
    path = bench.folder / "cut"
    assert checkpoints(path) == [f"step-00000{step}" for step in (1, 2, 3, 4)]
    for name in ("journal.jsonl", "metrics.jsonl"):  # header or base model, and two steps
        (path / name).write_bytes(b"".join((path / name).read_bytes().splitlines(keepends=True)[:3]))
    final_at_start: list[bool] = []
    bench.prepare_engine = lambda _: final_at_start.append((path / "final").exists())
    bench.train("cut", "resume", steps=4, **every(0))
    removed = f"{path}/checkpoints: step-000003, step-000004 removed: the journal ends at step 2"
    assert bench.display.messages.count(removed) == 1
    assert final_at_start == [False]
    said = f"{path}/final: removed, it is of step 4 and the run goes on after step 2"
    assert bench.display.messages.count(said) == 1
    assert checkpoints(path) == ["step-000001", "step-000002"]
    bench.train("cut", "resume", steps=5, **every(0))
    assert "resuming after step 4: checkpoint of step 2 and 2 updates from the journal" in bench.display.messages
    same_run(bench.folder / "whole", path)


@pytest.mark.parametrize("lines", [0, 1, 2])
def test_a_journal_that_lost_steps_is_no_reason_to_delete_them(bench: Bench, lines: int) -> None:
    bench.train("run", steps=2, **every(1, keep=4))
    path = bench.folder / "run"
    journal = path / "journal.jsonl"
    whole = journal.read_bytes()
    journal.write_bytes(b"".join(whole.splitlines(keepends=True)[:lines]))
    before = {file: file.read_bytes() for file in path.rglob("*.*") if file.is_file()}
    del before[path / "environment.json"], before[path / "config.toml"]  # of the last start
    with pytest.raises(JournalError) as info:
        bench.train("run", "resume")
    before[journal] = journal.read_bytes()  # that of no lines has got its header
    assert str(info.value) == (
        f"{path}: journal.jsonl ends at step {max(0, lines - 1)}, metrics.jsonl at step 2, which no interruption "
        "explains. Restore journal.jsonl from a backup, or "
    ) + ("cut metrics.jsonl after step 1 too and lose what came later." if lines == 2 else "start a new run directory.")
    assert {file: file.read_bytes() for file in before} == before
    journal.write_bytes(whole)
    bench.train("run", "resume")
    bench.train("whole")
    same_run(bench.folder / "whole", path)


def test_without_any_update_checkpoints_are_not_deleted(bench: Bench) -> None:
    bench.train("run", steps=2, **every(1))
    path = bench.folder / "run"
    for name in ("journal.jsonl", "metrics.jsonl"):
        (path / name).write_text("")
    with pytest.raises(
        JournalError, match=r"journal\.jsonl ends at step 0, checkpoints at step 2, which no interruption"
    ):
        bench.train("run", "resume")
    assert checkpoints(path) == ["step-000001", "step-000002"]


def test_metrics_that_lost_steps_are_not_made_up(bench: Bench) -> None:
    bench.train("run", steps=3)
    path = bench.folder / "run"
    metrics = path / "metrics.jsonl"
    metrics.write_bytes(b"".join(metrics.read_bytes().splitlines(keepends=True)[:2]))  # of the base model and one step
    with pytest.raises(JournalError) as info:
        bench.train("run", "resume")
    assert str(info.value) == (
        f"{path}: journal.jsonl ends at step 3, metrics.jsonl at step 1, which no interruption explains. "
        "Restore metrics.jsonl from a backup, or cut journal.jsonl after step 1 too and lose what came later."
    )


def test_a_state_that_is_not_that_of_its_weights_is_refused(bench: Bench) -> None:
    """With hashes that fit: what was saved was wrong already. Without that checkpoint the run goes on."""
    bench.train("whole", **every(1))
    bench.train("halves", steps=2, **every(1))
    path = bench.folder / "halves"
    first, second = (verify_checkpoint(path / "checkpoints" / name) for name in checkpoints(path))

    def write(folder: Path) -> None:
        shutil.copyfile(second.path / "model.safetensors", folder / "model.safetensors")

    save_checkpoint(second.path.parent, 2, write, load_training_state(first), second.metadata)
    verify_checkpoint(second.path)
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(second.path))}: its training state does not match its"):
        bench.train("halves", "resume", **every(1))
    assert bench.engine.closed
    shutil.rmtree(second.path)
    bench.train("halves", "resume", **every(1))
    same_run(bench.folder / "whole", path)


def test_a_replay_that_disagrees_with_a_recorded_checksum_stops_the_run(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "CHECKSUM_EVERY", 2)
    bench.train("run", steps=3, **every(0))
    path = bench.folder / "run"
    contents = read_journal(path / "journal.jsonl")
    assert contents.header is not None
    entries = list(contents.entries)
    assert entries[2].checksum
    (path / "journal.jsonl").unlink()
    with Journal.open(path / "journal.jsonl", contents.header) as journal:
        for entry in entries:
            journal.append(dataclasses.replace(entry, checksum="0" * 16) if entry.step == 3 else entry)
    before = {file: file.read_bytes() for file in path.glob("*.jsonl")}
    with pytest.raises(JournalError) as info:
        bench.train("run", "resume", steps=4, **every(0))
    assert str(info.value).startswith(
        f"{path}/journal.jsonl: before step 3 the weights had checksum {'0' * 16}, but the replay gives "
        f"{entries[2].checksum}: "
    )
    assert bench.engine.closed
    assert {file: file.read_bytes() for file in path.glob("*.jsonl")} == before


def test_the_checkpoint_that_a_run_was_resumed_from_stays(bench: Bench) -> None:
    bench.train("run", steps=2, **every(2, keep=1))
    bench.train("run", "resume", steps=8, **every(2, keep=1))
    assert checkpoints(bench.folder / "run") == ["step-000002", "step-000008"]
    bench.train("run", "resume", steps=10, **every(2, keep=1))
    assert checkpoints(bench.folder / "run") == ["step-000008", "step-000010"]


def test_a_damaged_checkpoint_takes_the_place_of_none(bench: Bench) -> None:
    bench.train("run", steps=3, **every(1))
    path = bench.folder / "run"
    cut_off_a_byte(path / "checkpoints" / "step-000003" / "model.safetensors")
    bench.train("run", "resume", steps=4, **every(1))
    assert checkpoints(path) == ["step-000002", "step-000003", "step-000004"]
    bench.train("run", "resume", steps=6, **every(1))
    assert checkpoints(path) == ["step-000004", "step-000005", "step-000006"]


class Rising(Near):
    """Every evaluation is better than the one before."""

    answers = 0

    def score(self, answer: Answer) -> Score:
        score = super().score(answer)
        if not answer.text.startswith("-1 "):
            return score
        evaluation, number = divmod(self.answers, 5)
        self.answers += 1
        return Score(score.reward, number < evaluation, "rising")


def test_a_damaged_best_checkpoint_is_written_again(bench: Bench) -> None:
    options: dict[str, Any] = {"eval": EvalConfig(every=1), "checkpoint": CheckpointConfig(every=0)}
    bench.train("run", task=Rising(), steps=2, **options)
    best = bench.folder / "run" / "checkpoints" / "step-000002"
    before = verify_checkpoint(best)
    cut_off_a_byte(best / "model.safetensors")
    bench.train("run", "resume", task=Rising(), steps=2, **options)
    assert verify_checkpoint(best).metadata["checksum"] == before.metadata["checksum"]


def test_grpo_passes_over_a_damaged_checkpoint(grpo: grpo_stub.Bench) -> None:
    flags = {"checkpoint__every": 1, "checkpoint__best": "false"}
    grpo.train("whole", **flags)
    grpo.train("halves", steps=2, **flags)
    path = grpo.folder / "halves"
    damaged = path / "checkpoints" / "step-000002" / "trainer" / "checkpoint-2" / "optimizer.pt"
    cut_off_a_byte(damaged)
    grpo.train("halves", "resume", **flags)
    assert [text for text in grpo.display.messages if text.startswith(f"{damaged}: ")]
    assert "resuming from the checkpoint of step 1; later steps are repeated" in grpo.display.messages
    grpo_stub.same_run(grpo.folder / "whole", path)


def test_grpo_without_a_valid_checkpoint_begins_again_and_leaves_one(grpo: grpo_stub.Bench) -> None:
    flags = {"steps": 1, "checkpoint__every": 0, "checkpoint__best": "false"}
    grpo.train("whole", **flags)
    grpo.train("run", **flags)
    checkpoint = grpo.folder / "run" / "checkpoints" / "step-000001"
    cut_off_a_byte(checkpoint / "model.safetensors")
    path = grpo.folder / "run"
    before = {file: file.read_bytes() for file in path.glob("*.jsonl")}
    with pytest.raises(CheckpointError, match="/run/checkpoints: no checkpoint is valid: restore one"):
        grpo.train("run", "resume", **flags)
    assert {file: file.read_bytes() for file in before} == before
    shutil.rmtree(checkpoint)
    grpo.train("run", "resume", **flags)
    assert "no checkpoint yet: starting from the beginning" in grpo.display.messages
    verify_checkpoint(checkpoint)
    grpo_stub.same_run(grpo.folder / "whole", grpo.folder / "run")


# The more often the letter that a problem names is written, the better: every answer differs, and no two members tie.
TASK = """
from rewards import Score

class Letters:
    stop = ()
    notes = ()
    def problems(self, split):
        letters = "abcdefgh" if split == "train" else "ijkl"
        return [{"id": f"{split}-{letter}", "letter": letter} for letter in letters]
    def prompt(self, problem):
        return "Question: how many are left? Make 9 from 4 and 5 with " + problem["letter"]
    def score(self, completion, problem, *, truncated=False):
        values = [ord(c) % 17 for c in completion]
        return Score(sum(values) / (17 * max(1, len(values))), len(values) > 12, "letters")

TASK = Letters()
"""
RECIPE = """
model = "{model}"
task = "letters.py:TASK"
seed = 5
steps = 4
[sampling]
prompts_per_step = 3
max_tokens = 12
[es]
population = 6
sigma = 0.05
learning_rate = 0.02
rank = 2
optimizer = "momentum"
[engine]
dtype = "{dtype}"
slots = 4
kv_cache_gib = 0.05
max_sequences = 16
[eval]
every = 2
problems = 4
[checkpoint]
every = 3
"""


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def recipe(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[[str], Path]
) -> Path:
    folder = tmp_path_factory.mktemp("real")
    (folder / "letters.py").write_text(TASK)
    path = folder / "recipe.toml"
    path.write_text(RECIPE.format(model=tiny_model("qwen3"), dtype=request.param))
    return path


def run(recipe: Path, directory: str, on_existing: Any = "fail", **flags: str) -> tuple[RunConfig, Outcome]:
    config = load_recipe(recipe, [(key.replace("__", "."), value) for key, value in flags.items()])
    path = recipe.parent / directory
    return config, train(config, recipe.parent, path, on_existing, ConsoleDisplay())


@pytest.fixture(scope="module")
def served_whole(recipe: Path) -> tuple[RunConfig, Outcome]:
    """The run "whole" of the real engine, without an interruption."""
    return run(recipe, "whole", checkpoint__best="false")  # which it is depends on the machine


@pytest.mark.vllm
@pytest.mark.parametrize("recipe", ["float32"], indirect=True)  # the updates of bfloat16: test_engine.py
def test_two_halves_are_the_whole(recipe: Path, served_whole: tuple[RunConfig, Outcome]) -> None:
    """2 steps + resume + 2 steps = 4 steps: weights, fitness and metrics are bit-equal, with other slots as well."""
    run(recipe, "halves", steps="2")
    run(recipe, "halves", "resume", steps="4", engine__slots="2")
    whole, halves = recipe.parent / "whole", recipe.parent / "halves"
    finals = [load_file(path / "final" / "model.safetensors") for path in (whole, halves)]
    assert finals[0].keys() == finals[1].keys()
    for name, tensor in finals[0].items():
        assert torch.equal(tensor, finals[1][name]), name
    # A checksum is also recorded where a process starts; everything else in the journal is the same text.
    assert (whole / "journal.jsonl").read_text() == (halves / "journal.jsonl").read_text()
    rows = timeless(whole)
    # The last step of a run is always evaluated, so step 2 is in both; nothing else may differ.
    assert rows == timeless(halves)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["step"] for row in rows if "eval/accuracy" in row] == [0, 2, 4]
    assert all(row["fitness/std"] == pytest.approx(1) for row in rows[1:])


@pytest.mark.vllm
def test_what_a_run_leaves_behind(recipe: Path, served_whole: tuple[RunConfig, Outcome], tmp_path: Path) -> None:
    """The directory, a checkpoint and a final model that transformers loads, and a replay with their bits."""
    from transformers import AutoModelForCausalLM

    config, outcome = served_whole
    path = recipe.parent / "whole"
    assert outcome.steps == 4
    files = "config.toml environment.json metrics.jsonl completions.jsonl journal.jsonl checkpoints final"
    assert {entry.name for entry in path.iterdir()} >= set(files.split())
    assert [entry.name for entry in (path / "checkpoints").iterdir()] == ["step-000003"]
    for step, directory in ((3, path / "checkpoints" / "step-000003"), (4, path / "final")):
        replay(
            load_recipe(path / "config.toml"),
            Path(config.model),
            path / "journal.jsonl",
            step,
            tmp_path / f"at-{step}",
        )
        rebuilt = load_file(tmp_path / f"at-{step}" / "model.safetensors")
        for name, tensor in load_file(directory / "model.safetensors").items():
            assert torch.equal(tensor, rebuilt[name]), (step, name)
        model = AutoModelForCausalLM.from_pretrained(directory)
        assert str(model.dtype).removeprefix("torch.") == config.engine.dtype
    base = load_file(Path(config.model) / "model.safetensors")
    final = load_file(path / "final" / "model.safetensors")
    moved = {name for name in base if not torch.equal(base[name].float(), final[name].float())}
    assert moved == {name for name in base if "proj.weight" in name}
    with pytest.raises(RunDirError, match="--on-existing"):
        run(recipe, "whole")
    with pytest.raises(ConfigError, match=r"es\.sigma was 0\.05 and is now 0\.06"):
        run(recipe, "whole", "resume", es__sigma="0.06")


PLAIN_VLLM = """
import json, sys
import eggroll_llm.engine.vllm
from eggroll_llm.engine.vllm.weights import keep_linear_weights
keep_linear_weights()  # which vLLM packs for the CPU and drops
from safetensors.torch import save_file
from vllm import LLM, SamplingParams

def save(model, loaded):
    tensors = {name: parameter.data for name, parameter in model.named_parameters()}
    for name, module in model.named_modules():
        if hasattr(module, "es_loaded_weight"):
            tensors[name + ".weight"] = module.es_loaded_weight
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, loaded)

answers = []
for job in json.loads(sys.argv[1]):
    llm = LLM(job["model"], dtype="float32", max_model_len=128, kv_cache_memory_bytes=2**26, enforce_eager=True)
    llm.apply_model(lambda model: save(model, job["loaded"]))
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
    answers.append([output.outputs[0].token_ids for output in outputs])
    llm.llm_engine.engine_core.shutdown()  # or it would be when the next one is there
print("RESULT" + json.dumps(answers))
"""
PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


FINALS = {"es": "qwen2", "grpo": "llama"}


@dataclasses.dataclass
class Final:
    """A final model, what it was asked, and what our engine after the last update and plain vLLM answered."""

    path: Path
    prompts: list[list[int]]
    ours: list[str]
    loaded: Path
    """The tensors of plain vLLM."""
    plain: list[list[int]] = dataclasses.field(default_factory=list)


@pytest.fixture(scope="module")
def finals(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[[str], Path]) -> dict[str, Final]:
    """Of a run of each method. One process loads both: most of its time is the import of vLLM."""
    from transformers import AutoTokenizer

    finals = {}
    for method, kind in FINALS.items():
        folder = tmp_path_factory.mktemp(method)
        recipe = grpo_stub.write_recipe(folder, tiny_model(kind), method)
        flags = {"eval.problems": "20", "eval.every": "0", "checkpoint.every": "0", "grpo.learning_rate": "2e-3"}
        config = load_recipe(recipe, [*flags.items()])
        train(config, folder, folder / "run", "fail", grpo_stub.Recorder())
        path = folder / "run" / "final"
        samples = read_samples(folder / "run" / "evaluations" / "step-000004.jsonl")[1]
        task, tokenizer = load_task(config.task, {}, base_dir=folder), AutoTokenizer.from_pretrained(path)
        finals[method] = Final(
            path=path,
            prompts=[tokenizer(task.prompt(sample.doc))["input_ids"] for sample in samples],
            ours=[sample.completion for sample in samples],
            loaded=folder / "loaded.safetensors",
        )
    jobs = [
        {"model": str(final.path), "prompts": final.prompts, "loaded": str(final.loaded)} for final in finals.values()
    ]
    command = [sys.executable, "-c", PLAIN_VLLM, json.dumps(jobs)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    for final, plain in zip(finals.values(), json.loads(result.stdout.rpartition("RESULT")[2]), strict=True):
        final.plain = plain
    return finals


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("method", FINALS)
def test_the_final_model_is_the_same_in_transformers_and_vllm(
    finals: dict[str, Final], tiny_model: Callable[[str], Path], method: str
) -> None:
    """Of 20 greedy answers in float32 all: of our engine after the last update, of plain vLLM, and of transformers.

    And the tensors that those two load are those of the files, which are not those of the base model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    final = finals[method]
    model = AutoModelForCausalLM.from_pretrained(final.path)
    found = [
        model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
        for ids in final.prompts
    ]
    assert len(set(final.ours)) >= 15  # of 20, or little would be proven
    turn = TextRules(AutoTokenizer.from_pretrained(final.path)).turn
    assert final.ours == [turn(ids)[0] for ids in final.plain]
    assert final.ours == [turn(ids)[0] for ids in found]

    stored, state = load_file(final.path / "model.safetensors"), model.state_dict()
    base = load_file(tiny_model(FINALS[method]) / "model.safetensors")
    in_vllm = load_file(final.loaded)
    assert [name for name in stored if not torch.equal(stored[name], base[name].float())]
    for name, tensor in stored.items():
        assert torch.equal(state[name], tensor), name
        module, _, leaf = name.rpartition(".")
        fused = next((whole for whole, parts in PARTS.items() if module.endswith(parts)), None)
        if fused is None:
            assert torch.equal(in_vllm[name][: len(tensor)], tensor), name  # it pads the vocabulary
        else:
            parent = module.rpartition(".")[0]
            rows_of = torch.cat([stored[f"{parent}.{part}.{leaf}"] for part in PARTS[fused]])
            assert torch.equal(in_vllm[f"{parent}.{fused}.{leaf}"], rows_of), name
