"""A module inside `ask` is W + sigma E of each row's member; parts, processes, resume and replay give the same bits."""

import contextlib
import copy
import math
import multiprocessing
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factors import normal_factors
from torch import Tensor, nn

from eggroll_llm import ES
from eggroll_llm.errors import ConfigError, JournalError, ModelError, PopulationError
from eggroll_llm.es.noise import NoiseSpec, served_factors

ROOT = Path(__file__).parents[2]
SIGMA = 0.05


class Net(nn.Module):
    """Every kind of layer, biased and not, and activations [N, T, features]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 12)
        self.norm = nn.LayerNorm(12)
        self.up = nn.Linear(12, 20)
        self.grid_norm = nn.LayerNorm((4, 5))
        self.rms = nn.RMSNorm(20)
        self.down = nn.Linear(20, 3, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        h = torch.tanh(self.up(self.norm(self.embed(tokens))))
        h = self.grid_norm(h.unflatten(-1, (4, 5))).flatten(-2)
        return self.down(self.rms(h))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def es_of(module: nn.Module, **changes: Any) -> ES:
    return ES(module, **{"population": 8, "sigma": SIGMA, "lr": 0.02, "seed": 5} | changes)


def inputs(rows: int) -> Tensor:
    return torch.randint(7, (rows, 6), generator=torch.Generator().manual_seed(1))


def fitness(step: int, population: int = 8) -> Tensor:
    return torch.randn(population, generator=torch.Generator().manual_seed(step))


def member(module: nn.Module, number: int, rank: int | None, step: int = 1) -> nn.Module:
    """Return the module with the weights of a member, by the definition of the method."""
    own = copy.deepcopy(module).double()
    noise = NoiseSpec(seed=5, step=step, rank=rank or 1, sigma=SIGMA)
    pair, sign = torch.tensor([number // 2]), 1 - 2 * (number % 2)
    for name, parameter in own.named_parameters():
        if parameter.ndim == 2 and rank is not None and "norm" not in name:
            A_KOR, B_KIR = normal_factors(noise, pair, name, *parameter.shape)
            E = A_KOR[0].double() @ B_KIR[0].double().T
        else:
            A_KOR, _ = normal_factors(noise, pair, name, parameter.numel(), 0)
            E = A_KOR[0].double().sum(1).view(parameter.shape)
        parameter.data += sign * SIGMA * E / math.sqrt(noise.rank)
    return own


@pytest.mark.parametrize("rank", [1, 3, None])
@pytest.mark.parametrize(
    "members",
    [list(range(8)), [5], [6, 1, 6, 0, 1], [0, 0, 1, 1, 4, 4], [3, 3, 3, 2]],
    ids=["all", "one", "any order", "several rows each", "uneven rows"],
)
def test_inside_ask_a_row_goes_through_the_weights_of_its_member(rank: int | None, members: list[int]) -> None:
    module, x = net(), inputs(len(members))
    es, before = es_of(module, rank=rank), module(x)
    with es.ask(members):
        found = module(x)
    for i, number in enumerate(members):
        expected = member(module, number, rank)(x[i])
        assert (found[i] - expected).abs().max() < 1e-6
        assert (found[i] - before[i]).abs().max() > 1e-2
    assert torch.equal(module(x), before)  # outside, the module is as it was


@pytest.mark.parametrize("rank", [1, 3, None])
def test_the_update_is_the_dense_sum_over_members(rank: int | None) -> None:
    module = net()
    es, before, shaped = es_of(module, rank=rank, fitness="sign"), copy.deepcopy(module), fitness(1)
    es.tell(shaped)
    sign_K = (shaped[0::2] - shaped[1::2]).sign()
    for name, parameter in module.named_parameters():
        weight = before.get_parameter(name)
        E_K = [(member(before, 2 * k, rank).get_parameter(name) - weight) / SIGMA for k in range(4)]
        step = 0.02 / 2 * sum(sign * E for sign, E in zip(sign_K, E_K, strict=True))  # ||c|| of four pairs is 2 x 2
        assert (parameter - weight - step).abs().max() < 2e-6, name


@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("rank", [2, None])
def test_factors_are_the_same_bits_in_any_parts_and_those_of_the_forward_pass(
    rank: int | None, antithetic: bool
) -> None:
    module, x = net(), inputs(8)
    es = es_of(module, rank=rank, antithetic=antithetic)
    with es.ask():
        found = module(x)
    dense = [copy.deepcopy(module) for _ in range(8)]
    for name, parameter in module.named_parameters():
        A_MOR, B_MIR = es.factors(name)
        for part in ([7, 2, 2], [4], [1, 0]):
            A_part, B_part = es.factors(name, part)
            assert torch.equal(A_part, A_MOR[part])
            assert torch.equal(B_part, B_MIR[part])
        for m in range(8):
            dense[m].get_parameter(name).data += (A_MOR[m] @ B_MIR[m].T).view(parameter.shape)
    for m in range(8):
        assert (dense[m](x[m]) - found[m]).abs().max() < 1e-6


def trained(es: ES, to: int, checksums: dict[int, str] | None = None) -> dict[int, str]:
    """Return the checksum after each step from now on."""
    seen = {} if checksums is None else checksums
    while es.step < to:
        es.tell(fitness(es.step))
        seen[es.step] = es.checksum()
    return seen


WAYS = [{}, {"optimizer": "adam", "noise_reuse": 3}, {"rank": None, "optimizer": "momentum"}]


@pytest.mark.parametrize("settings", WAYS, ids=["sgd", "adam", "full rank"])
def test_resume_replay_and_state_end_in_the_same_bits(tmp_path: Path, settings: dict[str, Any]) -> None:
    journal = tmp_path / "journal.jsonl"
    through = es_of(net(), learning_rate_schedule="linear", steps=20, **settings)
    wanted = trained(through, 14)
    assert len(set(wanted.values())) == 14

    first = es_of(net(), learning_rate_schedule="linear", steps=20, journal=journal, **settings)
    trained(first, 11)
    saved, x = first.state_dict(), inputs(8)
    trained(first, 12)
    first.close()
    torch.save(saved, tmp_path / "es.pt")

    module = net()
    resumed = es_of(module, learning_rate_schedule="linear", steps=20, journal=journal, **settings)
    assert (resumed.step, resumed.checksum()) == (12, wanted[12])
    trained(resumed, 14)
    resumed.close()
    assert resumed.checksum() == wanted[14]
    assert torch.equal(module(x), through.module(x))

    for step in (0, 5, None):
        again = es_of(net(), learning_rate_schedule="linear", steps=20, **settings)
        before = again.checksum()
        again.replay(journal, step)
        assert again.checksum() == (wanted | {0: before})[14 if step is None else step]

    restored = es_of(Net(), learning_rate_schedule="linear", steps=20, **settings)
    restored.load_state_dict(torch.load(tmp_path / "es.pt"))
    assert restored.step == 11
    trained(restored, 14)
    assert restored.checksum() == wanted[14]


def _work(pipe: Connection, part: int) -> None:
    """Evaluate half of the members, send their fitness and be told that of all."""
    module = net()
    es = es_of(module, population=6)
    for step in range(3):
        members = es.members().chunk(2)[part]
        with es.ask(members):
            pipe.send(module(inputs(1).expand(len(members), -1)).square().mean(dim=(1, 2)).tolist())
        es.tell(torch.tensor(pipe.recv()))
        assert es.step == step + 1
    pipe.send(es.checksum())


def test_processes_that_exchange_only_fitness_end_with_equal_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2])  # where a process that is started finds this module
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for part in range(2):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=_work, args=(theirs, part)))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)
    for _ in range(3):
        halves = [pipe.recv() for pipe in pipes]
        assert [len(half) for half in halves] == [3, 3]
        for pipe in pipes:
            pipe.send(halves[0] + halves[1])
    first, second = (pipe.recv() for pipe in pipes)
    for process in processes:
        process.join()
    assert first == second != es_of(net(), population=6).checksum()


def test_frozen_parameters_stay_and_bfloat16_is_served_from_float32() -> None:
    module = net().bfloat16()
    module.embed.requires_grad_(False)
    module.up.bias.requires_grad_(False)
    es, before = es_of(module, lr=1e-4), copy.deepcopy(module)
    with es.ask():
        found = module(inputs(8))
    assert found.dtype == torch.bfloat16
    own = copy.deepcopy(before).double()
    for name, parameter in member(before, 3, 1).named_parameters():
        if before.get_parameter(name).requires_grad:
            own.get_parameter(name).data = parameter.data
    assert (found[3] - own(inputs(8)[3])).abs().max() < 0.1
    for step in range(20):
        es.tell(torch.tensor([1.0, -1.0, 0, 0, 0, 0, 0, 0]) if step == 0 else fitness(step))
    assert torch.equal(module.embed.weight, before.embed.weight)
    assert torch.equal(module.up.bias, before.up.bias)
    master = es.state_dict()["weights"]["master/up.weight"]
    assert torch.equal(module.up.weight, master.bfloat16())
    assert not torch.equal(master, master.bfloat16().float())


def test_it_climbs() -> None:
    module = nn.Linear(6, 4)
    target = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    es = ES(module, population=64, sigma=0.02, lr=0.02)
    x, losses = torch.randn(32, 6, generator=torch.Generator().manual_seed(1)), []
    for _ in range(60):
        with es.ask():
            fitness_MP = -(module(x.expand(64, -1, -1)) - x @ target.T).square().mean(dim=2)
        es.tell(fitness_MP)
        losses.append(-float(fitness_MP.mean()))
    assert losses[-1] < 0.05 * losses[0]


def _tied() -> nn.Module:
    module = nn.Sequential(nn.Embedding(4, 6), nn.Linear(6, 4))
    module[1].weight = module[0].weight
    return module


def _overlapping() -> nn.Module:
    module = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    module[1].weight = nn.Parameter(module[0].weight.data)
    return module


def _not_finite() -> nn.Module:
    module = nn.Linear(2, 2)
    module.weight.data[0, 0] = math.inf
    return module


class _Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (nn.Tanh(), "Tanh has no parameters to perturb"),
        (nn.Linear(2, 2).requires_grad_(False), "Linear has no parameters to perturb: all are frozen"),
        (_tied(), "'0.weight' and '1.weight' are one and the same"),
        (_overlapping(), "'0.weight' and '1.weight' are one and the same"),
        (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), "layer '1' is BatchNorm1d: its statistics"),
        (nn.Sequential(nn.Linear(2, 2), nn.Conv1d(2, 2, 1)), "'1.weight' is of a kind of layer .*nn.Linear, nn.Embed"),
        (nn.MultiheadAttention(4, 2), "'in_proj_weight' is of a kind of layer"),
        (nn.Sequential(_Scaled(2, 2)), "'0.weight' is of a kind of layer"),
        (nn.LazyLinear(2), "'weight' is of a kind of layer"),
        (nn.Embedding(4, 2, padding_idx=0), "padding_idx"),
        (nn.Linear(2, 2).double(), r"'weight' is torch.float64: convert the module with \.float\(\)"),
        (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).bfloat16()), "'1.weight' is torch.bfloat16 on cpu, but"),
        (_not_finite(), "'weight' of shape .* must be a finite"),
    ],
)
def test_modules_that_cannot_be_trained_are_refused(module: nn.Module, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        es_of(module)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"population": 7}, "7 members: antithetic pairs need an even number"),
        ({"population": 1}, "population = 1: must be at least 2"),
        ({"sigma": 0.0}, "sigma = 0.0: must be positive"),
        ({"lr": math.nan}, "learning_rate = nan"),
        ({"rank": 0}, "rank = 0: must be at least 1"),
        ({"seed": -1}, "seed = -1: must be from 0"),
        ({"fitness": "best"}, "fitness = 'best': must be one of centered, rank, sign"),
        ({"fitness": "sign", "antithetic": False}, "needs antithetic pairs"),
        ({"optimizer": "lion"}, "optimizer = 'lion': must be one of sgd, momentum, adam"),
        ({"update_scale": "mean"}, "update_scale = 'mean': must be one of rms, literature"),
        ({"sigma_schedule": "linear"}, "needs steps above 0"),
        ({"sigma_schedule": "exponential", "steps": 3}, "must be one of constant, linear, cosine"),
        ({"sigma_schedule": "linear", "schedule_end": 0.0, "steps": 3}, "sigma = 0.0: must be positive"),
        ({"sigma_schedule": "cosine", "schedule_end": 0.0, "steps": 3}, "sigma = "),
        ({"lr": 0.0}, "lr = 0.0: must be positive"),
        ({"optimizer": "momentum", "momentum": 0.0}, "is plain SGD"),
        ({"masters": "split"}, "masters: is not a setting of ES, which are adam_beta1, "),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        es_of(nn.Linear(2, 2), **settings)


def test_a_setting_without_effect_is_a_warning() -> None:
    """No more: with the settings of its journal, a run goes on."""
    for settings, said in (
        ({"momentum": 0.95}, "momentum = 0.95 has no effect without optimizer = "),
        ({"optimizer": "momentum", "adam_eps": 1e-6}, 'adam_eps = 1e-06 has no effect without optimizer = "adam"'),
        ({"schedule_end": 0.5}, "schedule_end = 0.5 has no effect without a schedule"),
    ):
        with pytest.warns(UserWarning, match=said):
            es_of(nn.Linear(2, 2), **settings)


def test_a_list_of_fitness_is_as_exact_as_an_array() -> None:
    """Differences below what float32 holds, and numbers beyond it."""
    base = [1e6 + 0.01 * i for i in range(4)]
    weights = []
    for fitness in (base, [1e33 * f for f in base], np.array(base), torch.tensor(base, dtype=torch.float64)):
        torch.manual_seed(0)
        module = nn.Linear(2, 2)
        es_of(module, population=4).tell(fitness)
        weights.append(module.weight.detach().clone())
    assert all(torch.equal(weight, weights[0]) for weight in weights)


def test_members_have_the_vectors_that_the_update_adds() -> None:
    """Columns of a rank are added before they are rounded."""
    layer = nn.Linear(4, 300, dtype=torch.bfloat16)
    A_MO1, _ = es_of(layer, population=4, rank=8).factors("bias")
    noise = NoiseSpec(seed=5, step=1, rank=8, sigma=SIGMA)
    A_KOR, _ = served_factors(noise, torch.arange(2), "bias", 300, 0, torch.bfloat16, "cpu")
    assert torch.equal(A_MO1[0::2, :, 0], A_KOR.float().sum(2))


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (torch.zeros(8, 4), r"layer '0' got a batch of shape \[8, 4\] inside ask\(\) of 3 members"),
        (torch.zeros(6, 4), "of 3 members"),
        (torch.zeros(1, 4), "of 3 members"),
        (torch.zeros(4), "of 3 members"),
        (torch.zeros(5, 3, 4), "of 3 members"),
    ],
)
def test_a_batch_of_other_rows_than_the_members_is_refused(x: Tensor, said: str) -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    es, plain = es_of(module), module(torch.ones(2, 4))
    with pytest.raises(PopulationError, match=said), es.ask([0, 1, 5]):
        module(x)
    assert torch.equal(module(torch.ones(2, 4)), plain)
    with es.ask([0, 1, 5]):  # and nothing is left of it
        assert module(torch.zeros(3, 4)).shape == (3, 2)


@pytest.mark.parametrize(
    ("members", "said"),
    [([0, 8], "members from 0 to 8: must be from 0 to 7"), ([-1], "from -1 to -1"), ([], "must be a list"),
     ([0.0], "whole numbers"), (3, "must be a list"), ([True], "whole numbers")],
)  # fmt: skip
def test_members_that_do_not_exist_are_refused(members: Any, said: str) -> None:
    es = es_of(nn.Linear(2, 2))
    with pytest.raises(PopulationError, match=said), es.ask(members):
        pass
    with pytest.raises(PopulationError, match=said):
        es.factors("weight", members)


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (torch.zeros(7), r"fitness of shape \[7\]: must be \[8\]"),
        (torch.zeros(4, 2), r"fitness of shape \[4, 2\]: must be \[8\]"),
        (torch.zeros(8, 2, 1), "must be"),
        (torch.zeros(8, 0), "must be"),
        (torch.tensor([0.0, 1, math.nan, 2, math.inf, 0, 0, 0]), "fitness of member 2 is not finite, one of 2"),
    ],
)
def test_fitness_that_is_not_a_number_for_each_member_changes_nothing(tmp_path: Path, told: Tensor, said: str) -> None:
    es = es_of(nn.Linear(2, 2), journal=tmp_path / "journal.jsonl")
    size, checksum = (tmp_path / "journal.jsonl").stat().st_size, es.checksum()
    with pytest.raises(PopulationError, match=said):
        es.tell(told)
    assert (es.step, es.checksum(), (tmp_path / "journal.jsonl").stat().st_size) == (0, checksum, size)
    es.close()


def _calls(es: ES) -> Iterator[Any]:
    yield lambda: es.tell(torch.zeros(8))
    yield lambda: es.load_state_dict(es.state_dict())
    yield lambda: es.replay("none")
    yield es.ask().__enter__


def test_what_belongs_outside_of_ask_is_refused_inside() -> None:
    module = nn.Linear(2, 2)
    es = es_of(module)
    with es.ask():
        for call in _calls(es):
            with pytest.raises(PopulationError, match=r"inside ask\(\)"):
                call()
        assert not module(torch.zeros(8, 2)).requires_grad
    with pytest.raises(PopulationError, match="no layer of this Linear was called inside"), es.ask():
        nn.Linear(2, 2)(torch.zeros(8, 2))
    assert module(torch.zeros(1, 2)).requires_grad


def test_weights_that_noise_alone_would_move_are_refused() -> None:
    """A layer counts as called once members have called it, in whichever part of a step."""
    module = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    es, checksum = es_of(module), es_of(module).checksum()
    for part, layer in ((range(4), "b"), (range(4, 8), "a")):
        with es.ask(part):
            module[layer](torch.zeros(4, 2))
        if layer == "b":
            with pytest.raises(PopulationError, match=r"layer 'a' was not called inside ask\(\)"):
                es.tell(fitness(1))
            assert es.checksum() == checksum
    es.tell(fitness(1))
    with es.ask():
        module["b"](torch.zeros(8, 2))
    es.tell(fitness(2))


@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.load_state_dict(nn.Linear(2, 2).state_dict()),
        lambda module: module.load_state_dict(nn.Linear(2, 2).state_dict(), assign=True),
        lambda module: setattr(module, "weight", nn.Parameter(torch.zeros(2, 2))),
        lambda module: nn.utils.vector_to_parameters(torch.zeros(6), module.parameters()),
        nn.Module.bfloat16,
    ],
    ids=["loaded", "assigned", "replaced", "from a vector", "converted"],
)
def test_weights_that_an_update_would_overwrite_are_refused(change: Callable[[nn.Module], Any]) -> None:
    module = nn.Linear(2, 2)
    es = es_of(module)
    es.tell(fitness(1))
    change(module)
    with pytest.raises(ModelError, match=r"ask\(\): parameter 'weight' was changed, moved or replaced"), es.ask():
        pass
    with pytest.raises(ModelError, match=r"tell\(\): parameter 'weight' was changed, moved or replaced"):
        es.tell(fitness(2))


def test_a_buffer_may_be_there_but_not_change() -> None:
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.register_buffer("mask", torch.tensor([1.0, 0.0]))
            self.register_buffer("calls", torch.zeros(()))
            self.counts = False

        def forward(self, x: Tensor) -> Tensor:
            if self.counts:
                self.calls += 1
            return self.linear(x * self.mask)

    module = Counted()
    es = es_of(module)
    with es.ask():
        module(torch.ones(8, 2))
    module.counts = True
    with pytest.raises(ModelError, match="buffer 'calls' changed while members computed"), es.ask():
        module(torch.ones(8, 2))


def test_a_buffer_that_is_replaced_has_changed() -> None:
    """Also where memory of the one before is used again, as after an even number of passes."""

    class Running(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.register_buffer("mean", torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            self.mean = self.mean + x.mean(0)
            return self.layer(x - self.mean)

    module = Running()
    es = es_of(module)
    twice = nn.Sequential(module, module)
    with pytest.raises(ModelError, match="buffer 'mean' changed while members computed"), es.ask():
        twice(torch.ones(8, 2))


@pytest.mark.parametrize("journal", ["", "journal.jsonl"])
def test_after_an_interrupted_update_nothing_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, journal: str
) -> None:
    """Ctrl-C in a notebook, when some layers have moved: the same update again would move them twice."""
    name = tmp_path / journal if journal else None
    module, other = net(), net()
    es, before = es_of(module, journal=name), es_of(other)
    saved = es.state_dict()
    expected = before.tell(fitness(1)) and before.checksum()
    fold, folded = es._masters._fold, []

    def interrupted(*arguments: Any) -> None:
        folded.append(1)
        if len(folded) == 3:
            raise KeyboardInterrupt
        fold(*arguments)

    monkeypatch.setattr(es._masters, "_fold", interrupted)
    with pytest.raises(KeyboardInterrupt):
        es.tell(fitness(1))
    monkeypatch.undo()
    replay = lambda: es.replay(tmp_path / "none")  # noqa: E731
    for call in (lambda: es.tell(fitness(1)), lambda: es.ask().__enter__(), es.state_dict, replay):
        with pytest.raises(PopulationError, match="an update after step 0 was interrupted"):
            call()
    if name:
        es.close()
        with contextlib.closing(es_of(net(), journal=name)) as again:
            assert again.checksum() == expected
    else:
        es.load_state_dict(saved)
        es.tell(fitness(1))
        assert es.checksum() == expected


def test_a_journal_has_one_writer(tmp_path: Path) -> None:
    first = es_of(net(), journal=tmp_path / "journal.jsonl")
    with pytest.raises(JournalError, match="is being written by another process, or another object of this one"):
        es_of(net(), journal=tmp_path / "journal.jsonl")
    first.close()
    es_of(net(), journal=tmp_path / "journal.jsonl").close()


def test_a_line_that_was_not_finished_is_said_to_be_dropped(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with contextlib.closing(es_of(net(), journal=path)) as es:
        es.tell(fitness(1))
    path.write_bytes(path.read_bytes() + b'{"step":')
    with pytest.warns(UserWarning, match="last line dropped"):
        es_of(net(), journal=path).close()


def test_journals_and_states_of_another_run_are_refused(tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    es = es_of(net(), journal=journal)
    trained(es, 3)
    states = {0: es_of(net()).state_dict(), 3: es.state_dict()}
    with pytest.raises(PopulationError, match=r"state of step 0: the journal .* ends at step 3"):
        es.load_state_dict(states[0])
    es.load_state_dict(states[3])
    other = es_of(net())
    trained(other, 2)
    other.tell(fitness(77))
    with pytest.raises(PopulationError, match=r"other weights than those of step 3 in the journal .*journal\.jsonl"):
        es.load_state_dict(other.state_dict())
    es.close()
    with pytest.raises(JournalError, match="other settings"):
        es_of(net(), journal=journal, seed=6)
    with pytest.raises(JournalError, match=r"base model is module [0-9a-f]{16}, now it is module"):
        es_of(Net(), journal=journal)
    with pytest.raises(JournalError, match="other settings"):
        es_of(net(), lr=0.03).replay(journal)
    with pytest.raises(JournalError, match="ends at step 3, ES is at 0"):
        es_of(net()).replay(journal, 4)
    (tmp_path / "empty").touch()
    with pytest.raises(JournalError, match="is empty"):
        es_of(net()).replay(tmp_path / "empty")
    for state, said in (
        ({}, "is not from"),
        (states[3] | {"step": 3, "weights": {}}, "missing"),
        (es_of(net(), rank=None).state_dict(), "other settings"),
        ({key: value for key, value in es_of(net(), rank=None).state_dict().items() if key != "settings"}, "expected"),
    ):
        with pytest.raises(PopulationError, match=said):
            es_of(net()).load_state_dict(state)


def test_a_journal_is_of_one_frozen_backbone(tmp_path: Path) -> None:
    """And of one set of buffers; what is trained may start from the same zeros."""

    def model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        backbone, head = nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        return nn.Sequential(backbone, head)

    es = es_of(model(0), journal=tmp_path / "journal.jsonl")
    es.tell(fitness(1))
    es.close()
    es_of(model(0), journal=tmp_path / "journal.jsonl").close()
    with pytest.raises(JournalError, match="base model is module"):
        es_of(model(1), journal=tmp_path / "journal.jsonl")


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_norms_in_bfloat16_see_perturbations_beside_their_weight_of_1(kind: Any) -> None:
    """Of which bfloat16 has nothing between 1 and 1.0078: most members would be alike."""
    norm = kind(64).bfloat16()
    es = ES(norm, population=64, sigma=0.002, lr=0.01)
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)).bfloat16().expand(64, 64)
    with es.ask():
        y_MI = norm(x)
    assert y_MI.dtype == torch.bfloat16
    right = kind(64).double()
    for member in range(64):
        A, B = es.factors("weight", [member])
        with torch.no_grad():
            weight = 1 + (A[0] @ B[0].T).view(-1).double()
            expected = right(x[:1].double()) * weight
            if kind is nn.LayerNorm:
                A, B = es.factors("bias", [member])
                expected += (A[0] @ B[0].T).view(-1).double()
        assert torch.allclose(y_MI[member].double(), expected[0], rtol=2**-8, atol=1e-6)
        assert (y_MI[member].double() - expected[0]).abs().mean() < 2**-9 * expected.abs().mean()


def test_a_replay_that_its_own_journal_would_lack_is_refused(tmp_path: Path) -> None:
    recorded = es_of(net(), journal=tmp_path / "recorded.jsonl")
    trained(recorded, 3)
    recorded.close()
    es = es_of(net(), journal=tmp_path / "own.jsonl")
    trained(es, 1)
    before = es.checksum()
    with pytest.raises(JournalError, match=r"replay to step 3: .*own\.jsonl, ends at step 1 .* ES without a journal"):
        es.replay(tmp_path / "recorded.jsonl")
    assert (es.step, es.checksum()) == (1, before)
    es.replay(tmp_path / "recorded.jsonl", 1)
    assert trained(es, 3)[3] == recorded.checksum()
    es.close()


def test_it_needs_torch_only_and_the_page_learns_as_it_stands() -> None:
    (code,) = re.findall(r"```python\n(import torch.*?)```", (ROOT / "docs" / "your_own_model.md").read_text(), re.S)
    others = "{'vllm', 'transformers', 'triton', 'numba'}"
    program = f"{code}\nimport sys; print(sorted({others} & set(sys.modules)))"
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    *rows, loaded = printed.stdout.splitlines()
    assert loaded == "[]"
    policy = [float(row.split()[2]) for row in rows]
    assert len(policy) == 16
    assert policy[0] < 100
    assert max(policy) > 300  # 500 here; where a rounding differs, another path
