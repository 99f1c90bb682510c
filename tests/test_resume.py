"""Training with the real engine on a tiny model: what a run leaves, and that resuming changes nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from eggroll_llm.config import RunConfig, load_recipe
from eggroll_llm.display import ConsoleDisplay
from eggroll_llm.errors import ConfigError, RunDirError
from eggroll_llm.replay import replay
from eggroll_llm.session import Outcome, train

pytestmark = pytest.mark.vllm

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
TIMES = ("time", "throughput", "wall_time", "memory")


@pytest.fixture(params=["float32", "bfloat16"])
def recipe(request: pytest.FixtureRequest, tmp_path: Path, tiny_model: Callable[[str], Path]) -> Path:
    (tmp_path / "letters.py").write_text(TASK)
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.format(model=tiny_model("qwen3"), dtype=request.param))
    return path


def run(recipe: Path, directory: str, on_existing: Any = "fail", **flags: str) -> tuple[RunConfig, Outcome]:
    config = load_recipe(recipe, [(key.replace("__", "."), value) for key, value in flags.items()])
    path = recipe.parent / directory
    return config, train(config, recipe.parent, path, on_existing, ConsoleDisplay())


def metrics(directory: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(TIMES)} for row in rows]


def test_two_halves_are_the_whole(recipe: Path, tmp_path: Path) -> None:
    """2 steps + resume + 2 steps = 4 steps: weights, fitness and metrics are bit-equal, with other slots as well."""
    run(recipe, "whole")
    run(recipe, "halves", steps="2")
    run(recipe, "halves", "resume", steps="4", engine__slots="2")
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    finals = [load_file(path / "final" / "model.safetensors") for path in (whole, halves)]
    assert finals[0].keys() == finals[1].keys()
    for name, tensor in finals[0].items():
        assert torch.equal(tensor, finals[1][name]), name
    # A checksum is also recorded where a process starts; everything else in the journal is the same text.
    assert (whole / "journal.jsonl").read_text() == (halves / "journal.jsonl").read_text()
    rows = metrics(whole)
    # The last step of a run is always evaluated, so step 2 is in both; nothing else may differ.
    assert rows == metrics(halves)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["step"] for row in rows if "eval/accuracy" in row] == [0, 2, 4]
    assert all(row["fitness/std"] == pytest.approx(1) for row in rows[1:])


def test_what_a_run_leaves_behind(recipe: Path, tmp_path: Path) -> None:
    """The directory, a checkpoint and a final model that transformers loads, and a replay with their bits."""
    from transformers import AutoModelForCausalLM

    config, outcome = run(recipe, "run")
    path = tmp_path / "run"
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
        run(recipe, "run")
    with pytest.raises(ConfigError, match=r"es\.sigma was 0\.05 and is now 0\.06"):
        run(recipe, "run", "resume", es__sigma="0.06")
