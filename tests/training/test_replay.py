"""Base model and journal give the weights of any step, to the bit; anything that does not fit together is refused."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from eggroll_llm.config.schema import EngineConfig, RunConfig
from eggroll_llm.errors import JournalError
from eggroll_llm.es.estimate import UpdateSpec
from eggroll_llm.es.fitness import shape_fitness
from eggroll_llm.es.masters import MasterWeights
from eggroll_llm.es.settings import EsSettings
from eggroll_llm.models.files import model_identity
from eggroll_llm.models.targets import trained_parameters
from eggroll_llm.records.journal import Journal, JournalHeader
from eggroll_llm.records.updates import journal_entry
from eggroll_llm.training.plan import plan_of
from eggroll_llm.training.replay import load_trained, replay

STEPS = 4


@pytest.fixture
def base(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("qwen2")


def config(base: Path, **changes: Any) -> RunConfig:
    es = EsSettings(
        population=6,
        sigma=0.02,
        learning_rate=0.01,
        rank=2,
        optimizer="momentum",
        noise_reuse=2,
        sigma_schedule="linear",
    )
    return dataclasses.replace(
        RunConfig(model=str(base), task="countdown", seed=4, steps=STEPS, es=es, engine=EngineConfig(dtype="bfloat16")),
        **changes,
    )


def record(path: Path, base: Path, run: RunConfig, checksums: dict[int, str] | None = None) -> list[MasterWeights]:
    """Train on random rewards, keeping a journal; the masters after 0, 1, 2... updates.

    Every other step records the checksum that it starts from, or the ones given.
    """
    dtype = getattr(torch, run.engine.dtype)
    after = [MasterWeights(load_trained(base, dtype), run.es, dtype)]
    generator = torch.Generator().manual_seed(0)
    header = JournalHeader(frozen_hash="hash", base_model=model_identity(base))
    with Journal.open(path, header) as journal:
        for step in range(1, STEPS + 1):
            masters = MasterWeights(load_trained(base, dtype), run.es, dtype)
            masters.load_state(after[-1].state())
            fitness = shape_fitness(torch.randn((6, 3), generator=generator, dtype=torch.float64), "centered")
            checksum = masters.checksum() if step % 2 else ""
            update = UpdateSpec.of(plan_of(run, step), fitness.fitness_M.tolist())
            recorded = (checksums or {}).get(step, checksum)
            journal.append(journal_entry(update, dropped=fitness.dropped, checksum=recorded))
            masters.apply(update)
            after.append(masters)
    return after


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_step_is_rebuilt_to_the_bit(base: Path, tmp_path: Path, dtype: Any) -> None:
    run = config(base, engine=EngineConfig(dtype=dtype))
    after = record(tmp_path / "journal.jsonl", base, run)
    assert len({masters.checksum() for masters in after}) == STEPS + 1
    trained = {name for name, _, _ in trained_parameters(base)}
    original = load_file(base / "model.safetensors")
    for step in (0, 1, STEPS):
        directory = tmp_path / f"at-{step}"
        checksum = replay(run, base, tmp_path / "journal.jsonl", step, directory)
        assert checksum == after[step].checksum()
        for name, tensor in load_file(directory / "model.safetensors").items():
            expected = after[step].served(name) if name in trained else original[name].to(tensor.dtype)
            assert torch.equal(tensor, expected), (step, name)


def test_a_replay_that_disagrees_with_a_recorded_checksum_stops(base: Path, tmp_path: Path) -> None:
    run = config(base)
    after = record(tmp_path / "journal.jsonl", base, run, {3: "0123456789abcdef"})
    for step in (2, STEPS):  # of step 2 no other checksum tells whether it is right
        with pytest.raises(JournalError) as info:
            replay(run, base, tmp_path / "journal.jsonl", step, tmp_path / "out")
        assert str(info.value).startswith(
            f"{tmp_path / 'journal.jsonl'}: before step 3 the weights had checksum 0123456789abcdef, "
            f"but the replay gives {after[2].checksum()}: replay on a machine like the one that trained"
        )
        assert not (tmp_path / "out").exists()


def test_steps_before_a_checksum_that_disagrees_are_rebuilt_where_another_tells(base: Path, tmp_path: Path) -> None:
    run = config(base)
    after = record(tmp_path / "right.jsonl", base, run)
    second = after[1].checksum()
    record(tmp_path / "journal.jsonl", base, run, {2: second, 3: "0123456789abcdef"})
    assert replay(run, base, tmp_path / "journal.jsonl", 2, tmp_path / "two") == after[2].checksum()


def test_other_settings_than_those_of_the_run_are_noticed(base: Path, tmp_path: Path) -> None:
    record(tmp_path / "journal.jsonl", base, config(base))
    with pytest.raises(JournalError, match="before step 3 the weights had checksum"):
        replay(config(base, seed=5), base, tmp_path / "journal.jsonl", STEPS, tmp_path / "out")


def test_other_settings_are_noticed_also_before_the_first_checksum_that_tells(base: Path, tmp_path: Path) -> None:
    """Of steps 1 and 2, which the checksum of step 3 tells; step 0 has nothing to tell."""
    after = record(tmp_path / "journal.jsonl", base, config(base))
    other = config(base, seed=5)
    for step in (1, 2):
        with pytest.raises(JournalError, match="before step 3 the weights had checksum"):
            replay(other, base, tmp_path / "journal.jsonl", step, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert replay(other, base, tmp_path / "journal.jsonl", 0, tmp_path / "out") == after[0].checksum()


def test_another_base_model_is_refused(base: Path, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    record(tmp_path / "journal.jsonl", base, config(base))
    other = tiny_model("llama")
    with pytest.raises(JournalError) as info:
        replay(config(other), other, tmp_path / "journal.jsonl", 1, tmp_path / "out")
    assert str(info.value) == (
        f"{tmp_path / 'journal.jsonl'}: was recorded on base model {model_identity(base)}, "
        f"but {other} is {model_identity(other)}: use the recorded one"
    )
    # The same model somewhere else will do.
    moved = Path(shutil.copytree(base, tmp_path / "moved"))
    replay(config(moved), moved, tmp_path / "journal.jsonl", 1, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_step_beyond_the_journal_is_refused(base: Path, tmp_path: Path) -> None:
    record(tmp_path / "journal.jsonl", base, config(base))
    with pytest.raises(JournalError, match=r"--step 5 is beyond its 4 updates: lower --step"):
        replay(config(base), base, tmp_path / "journal.jsonl", 5, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_trained_tensors_are_all_there_in_the_served_dtype(base: Path) -> None:
    original = load_file(base / "model.safetensors")
    loaded = load_trained(base, torch.float32)
    assert set(loaded) == {name for name, _, _ in trained_parameters(base)}
    for name, tensor in loaded.items():
        assert torch.equal(tensor, original[name].float())


def test_layers_that_are_not_trained_stay_those_of_the_base(base: Path, tmp_path: Path) -> None:
    run = config(base)
    run = dataclasses.replace(run, es=dataclasses.replace(run.es, layers=(1, 1)))
    dtype = torch.bfloat16
    masters = MasterWeights(load_trained(base, dtype, run.es.layers), run.es, dtype)
    with Journal.open(
        tmp_path / "journal.jsonl", JournalHeader(frozen_hash="hash", base_model=model_identity(base))
    ) as journal:
        update = UpdateSpec.of(plan_of(run, 1), [1.0, -1.0, 0.5, 0.0, 0.0, 0.25])
        journal.append(journal_entry(update, dropped=(), checksum=masters.checksum()))
        masters.apply(update)
    assert replay(run, base, tmp_path / "journal.jsonl", 1, tmp_path / "out") == masters.checksum()
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name, _, _ in trained_parameters(base, (1, 1))}
