"""The integer model: compiled equals defined, no floating point in it, replay, learning, and memory of a generation."""

import ctypes
import errno
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from live_memory import LiveMemory
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from eggroll_llm.errors import ConfigError, JournalError
from eggroll_llm.integer import __main__ as command
from eggroll_llm.integer import model, native, pretrain, update
from eggroll_llm.integer.pretrain import Pretraining, Settings
from eggroll_llm.integer.text import load_text, unigram_bits
from eggroll_llm.kernels import build
from eggroll_llm.system.hardware import cxx_compiler

needs_library = pytest.mark.skipif(build.library() is None, reason="needs a C++ compiler")
GENERATOR = torch.Generator().manual_seed(1)


class NoFloats(TorchDispatchMode):
    """Within it, an operation that takes or makes a tensor of floating-point numbers fails."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **kwargs or {})
        for leaf in tree_leaves((args, kwargs, result)):
            assert not (isinstance(leaf, Tensor) and leaf.is_floating_point()), operation
        return result


def case(members: int) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor, Tensor]:
    """Return extreme weights, text, state, noise and coefficients."""
    weights = {name: random_int8(*weight.shape) for name, weight in model.initial_weights(0).items()}
    text_MT = torch.randint(256, (members, 6), generator=GENERATOR).to(torch.uint8)
    pairs = -(-members // 2)
    coefficient_K = torch.randint(-32, 33, (pairs,), generator=GENERATOR).int()
    return weights, text_MT, random_int8(members, 64), update.rows_of(3, 1, torch.arange(pairs)), coefficient_K


def random_int8(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, generator=GENERATOR).to(torch.int8)


@pytest.fixture(scope="module", params=["native", "-mno-avx512f", "-mno-avx2"])
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The functions as compiled for this processor, and for lesser ones: with AVX2 at most, and without."""
    if build.library() is None:
        pytest.skip("needs a C++ compiler")
    if request.param == "native":
        return native.functions()
    if platform.machine() != "x86_64":
        pytest.skip("a flag of x86-64")
    library, source = tmp_path_factory.mktemp("lesser") / "integer.so", build.HERE / "integer.cpp"
    compiler = cxx_compiler()
    assert compiler
    subprocess.run([compiler, *build.FLAGS, request.param, "-shared", source, "-o", library], check=True)
    return native.bind(ctypes.CDLL(str(library)))


@pytest.mark.parametrize("members", [1, 2, 7, 12])
@pytest.mark.parametrize("noisy", [True, False])
def test_compiled_and_torch_have_the_same_bits(members: int, noisy: bool, compiled: tuple[Any, Any]) -> None:
    weights, text_MT, state_MD, rows_KV, coefficient_K = case(members)
    forward, add_pairs = compiled
    states = state_MD.clone(), state_MD.clone()
    noise = rows_KV if noisy else None
    assert torch.equal(
        forward(weights, text_MT, states[0], noise), model.forward_with_torch(weights, text_MT, states[1], noise)
    )
    assert torch.equal(*states)
    assert not torch.equal(states[0], state_MD)
    sums = update.zero_sums(), update.zero_sums()
    add_pairs(sums[0], rows_KV, coefficient_K)
    update.add_pairs_with_torch(sums[1], rows_KV, coefficient_K)
    assert all(torch.equal(sums[0][name], sums[1][name]) for name in sums[0])


def test_forward_loss_and_update_have_no_floats() -> None:
    weights, text_MT, state_MD, rows_KV, coefficient_K = case(4)
    with NoFloats():
        model.forward_with_torch(weights, text_MT, state_MD, rows_KV)
        sums = update.zero_sums()
        update.add_pairs_with_torch(sums, rows_KV, coefficient_K)
        moved = update.move(weights, sums, int(coefficient_K.square().sum()), update.threshold(0.5))
        with pytest.raises(AssertionError):
            torch.zeros(1) + 1
    assert moved > 0
    assert all(weight.dtype is torch.int8 for weight in weights.values())


def test_noise_alone_moves_the_fraction_asked_for() -> None:
    weights, sums = model.initial_weights(0), update.zero_sums()
    coefficient_K = torch.randint(-32, 33, (256,), generator=GENERATOR).int()
    update.add_pairs_with_torch(sums, update.rows_of(0, 1, torch.arange(256)), coefficient_K)
    before = {name: weight.clone() for name, weight in weights.items()}
    moved = update.move(weights, sums, int(coefficient_K.square().sum()), update.threshold(0.25))
    assert 0.24 < moved / model.PARAMETERS < 0.26
    assert max(int((weights[name].int() - before[name].int()).abs().max()) for name in weights) == 1


@needs_library
def test_it_learns_and_its_journal_gives_the_same_weights(tmp_path: Path) -> None:
    train_T, held_out_T = load_text()
    settings = Settings(population=256, length=20, steps=20)
    run = Pretraining(train_T, settings, tmp_path / "journal.jsonl")
    before = run.bits_per_byte(held_out_T)
    for _ in range(settings.steps):
        run.take_step()
    run.close()
    assert run.bits_per_byte(held_out_T) < before - 0.5
    assert 4.5 < unigram_bits(train_T, held_out_T) < 5
    again = Pretraining(train_T, settings)
    again.replay(tmp_path / "journal.jsonl")
    assert (again.step, again.checksum()) == (settings.steps, run.checksum())
    again.take_step()  # which begins new texts
    with pytest.raises(JournalError, match="20 steps already"):
        Pretraining(train_T, settings, tmp_path / "journal.jsonl")
    with pytest.raises(JournalError, match="other settings"):
        Pretraining(train_T, Settings(seed=0, steps=21, population=256)).replay(tmp_path / "journal.jsonl")


def test_a_run_does_not_go_on_in_the_middle_of_a_text(tmp_path: Path) -> None:
    train_T, settings = torch.arange(2000) % 251, Settings(population=4, length=3, steps=9)
    run = Pretraining(train_T.byte(), settings, tmp_path / "journal.jsonl")
    for _ in range(3):
        run.take_step()
    run.close()
    for steps_before in (0, 1):
        again = Pretraining(train_T.byte(), settings)
        for _ in range(steps_before):
            again.take_step()
        again.replay(tmp_path / "journal.jsonl")
        with pytest.raises(JournalError, match=r"step 3 lies within a text: go on from a multiple of 20 steps"):
            again.take_step()
    own = Pretraining(train_T.byte(), settings, tmp_path / "new.jsonl")
    with pytest.raises(JournalError, match=r"new\.jsonl would lack its steps"):
        own.replay(tmp_path / "journal.jsonl")
    own.close()


def test_nor_where_a_full_disk_came_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Members have read the bytes of a step that is not in the journal."""
    run = Pretraining((torch.arange(2000) % 251).byte(), Settings(population=4, length=3, steps=9), tmp_path / "j")
    run.take_step()

    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(JournalError, match="No space left"):
            run.take_step()
    with pytest.raises(JournalError, match=r"step 1 lies within a text"):
        run.take_step()


def test_the_threshold_of_any_fraction_is_a_number() -> None:
    found = [update.threshold(10.0**-n) for n in (0, 1, 2, 10, 16, 100, 300)]
    assert found == sorted(found)
    assert found[:3] == [0, 1684, 2638]


def test_runs_of_different_seeds_read_different_texts() -> None:
    train_T, starts = torch.arange(2000).byte(), []
    for seed in (0, 1, 2):
        run = Pretraining(train_T, Settings(population=16, length=3, steps=9, seed=seed))
        run.take_step()
        starts.append(run._start_K.tolist())
    assert all(starts[i] != starts[j] for i in range(3) for j in range(i))


def test_a_text_that_is_too_short_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"length = 50: 20 pieces of it are more than the 1000 bytes"):
        Pretraining(torch.zeros(1000, dtype=torch.uint8), Settings(population=4))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--generation 8 --tokens 60000000", "--tokens: --generation is one step of its own population"),
        ("--generation 8 --population 1024", "--population: --generation is"),
        ("--generation 8 --fitness centered", "--fitness: --generation is"),
        ("--generation 8 --reference 6400", "--reference: --generation is"),
        ("--generation 8 --last-fraction 0.5", "--last-fraction: --generation is"),
        ("--last-fraction 0", "--last-fraction: 0: must be above 0 and at most 1"),
        ("--seed -1", "--seed: -1: must be from 0 to 4294967295"),
        ("--seed 4294967296", "--seed: 4294967296: must be from 0 to 4294967295"),
        ("--reference 6399", "--reference: 6399: must be at least 6400, the tokens of one step"),
    ],
)
def test_flags_that_would_do_nothing_or_fail_are_refused(
    words: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["integer", *words.split()])
    with pytest.raises(SystemExit, match="2"):
        command._options()
    assert said in capsys.readouterr().err


def test_flags_at_their_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["integer", "--seed", "4294967295", "--reference", "6400"])
    options = command._options()
    assert (options.tokens, options.population, options.fitness) == (60_000_000, 1024, "centered")
    run = Pretraining(load_text()[0], Settings(seed=options.seed, population=2, length=2, steps=1))
    run.take_step()
    assert run.step == 1


@needs_library
def test_memory_of_a_generation_is_that_of_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Besides a few bytes a member: its state of 64, its loss and its fitness."""
    monkeypatch.setattr(pretrain, "PART", 256)
    train_T, _ = load_text()
    peaks = []
    for population in (512, 4096):
        run = Pretraining(train_T, Settings(population=population, length=2, steps=1, fitness="sign"))
        with LiveMemory() as memory:
            run.take_step()
        peaks.append(memory.peak)
    assert peaks[1] - peaks[0] < 150 * (4096 - 512)
