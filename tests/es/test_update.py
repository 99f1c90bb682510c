"""The update is the dense sum, in the promised size, in the same bits every time, and none of it is lost."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from factors import estimate
from live_memory import LiveMemory

from eggroll_llm.es.estimate import (
    LARGEST_GRADIENT,
    LARGEST_PRODUCT,
    NonFiniteUpdate,
    UpdateSpec,
    pair_coefficients,
)
from eggroll_llm.es.masters import MasterWeights
from eggroll_llm.es.noise import served_factors, served_factors_of, shape_of
from eggroll_llm.es.settings import EsSettings

NAME = "model.layers.0.mlp.up_proj.weight"
SHAPE = (24, 40)
SHAPES = {NAME: SHAPE, "b.weight": (40, 24), "c.weight": (24, 40), "d.weight": (7, 5), "d.bias": (9,)}
METHODS = ["sgd", "momentum", "adam"]


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def spec(population: int = 16, **changes) -> UpdateSpec:
    fields = {
        "step": 5,
        "noise_step": 5,
        "seed": 3,
        "rank": 1,
        "sigma": 0.01,
        "learning_rate": 1e-3,
        "fitness_M": tuple(gaussian(population, seed=population).tolist()),
    }
    return UpdateSpec(**(fields | changes))


def weights(scale: float = 0.05) -> dict[str, torch.Tensor]:
    return {name: (gaussian(*shape, seed=i) * scale).bfloat16() for i, (name, shape) in enumerate(SHAPES.items())}


def masters(method: str = "sgd", dtype: torch.dtype = torch.bfloat16, **changes) -> MasterWeights:
    return MasterWeights(weights(), EsSettings(optimizer=method, **changes), dtype)


def dense_estimate(name: str, shape: tuple[int, ...], update: UpdateSpec, dtype: torch.dtype) -> torch.Tensor:
    """The definition: each member's dense perturbation, weighted with its fitness and sign, in float64."""
    total = torch.zeros(shape, dtype=torch.float64)
    for member, fitness in enumerate(update.fitness_M):
        pair, sign = (member // 2, 1 - 2 * (member % 2)) if update.antithetic else (member, 1)
        A_KOR, B_KIR = served_factors(update.noise, torch.tensor([pair]), *shape_of(name, shape), dtype, "cpu")
        B_IR = B_KIR[0].double() if len(shape) == 2 else torch.ones(1, update.rank, dtype=torch.float64)
        total += fitness * sign * (A_KOR[0].double() @ B_IR.T).view(shape) / update.sigma
    if update.scale == "literature":
        return total / math.sqrt(len(update.fitness_M))
    return total / pair_coefficients(update.fitness_M, update.antithetic).norm()


def test_pair_coefficients_by_hand():
    assert pair_coefficients((1.0, -0.5, 0.25, 0.25), antithetic=True).tolist() == [1.5, 0.0]
    assert pair_coefficients((1.0, -0.5, 0.25), antithetic=False).tolist() == [1.0, -0.5, 0.25]
    with pytest.raises(ValueError, match="3 members"):
        pair_coefficients((1.0, 2.0, 3.0), antithetic=True)


@pytest.mark.parametrize("rank", [1, 2, 4, 8])
@pytest.mark.parametrize("scale", ["rms", "literature"])
@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [SHAPE, (50,)])
def test_update_from_factors_equals_the_dense_sum_over_members(rank, scale, antithetic, dtype, shape):
    update = spec(rank=rank, scale=scale, antithetic=antithetic)
    dense = dense_estimate(NAME, shape, update, dtype)
    found = estimate(NAME, shape, update, dtype)
    assert found.dtype == torch.float32
    # 16 terms of size about 1 in float32: errors are a few 1e-7. Another step's noise is not even close.
    assert (found - dense).abs().max() < 3e-6
    other = dense_estimate(NAME, shape, replace(update, noise_step=6), dtype)
    assert (found - other).abs().max() > 0.5


def test_only_the_noise_step_matters_for_the_noise():
    reused = estimate(NAME, SHAPE, spec(step=9), torch.bfloat16)
    assert torch.equal(reused, estimate(NAME, SHAPE, spec(), torch.bfloat16))
    assert not torch.equal(reused, estimate(NAME, SHAPE, spec(noise_step=9), torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_single_pair_is_credited_with_the_very_bits_it_was_sampled_with(dtype):
    # c = 2, ||c|| = 2: the estimate is A B^T / sigma, and sigma a power of two makes the division exact.
    update = spec(fitness_M=(1.0, -1.0), sigma=2.0**-7)
    A_KOR, B_KIR = served_factors(update.noise, torch.tensor([0]), NAME, *SHAPE, dtype, "cpu")
    dW_OI = estimate(NAME, SHAPE, update, dtype)
    assert torch.equal(dW_OI, (A_KOR[0].float() * 2.0**7) * B_KIR[0].float().T)
    assert torch.equal(estimate(NAME, SHAPE, replace(update, fitness_M=(-1.0, 1.0)), dtype), -dW_OI)


def test_rounded_factors_are_used_not_the_exact_ones():
    update = spec()
    served, exact = (estimate(NAME, SHAPE, update, dtype) for dtype in (torch.bfloat16, torch.float32))
    assert 1e-4 < float((served - exact).abs().max()) < 0.1


@pytest.mark.parametrize("rank", [1, 3])
def test_chunks_change_the_last_place_only_and_the_same_chunk_not_even_that(rank):
    update = spec(population=200, rank=rank)
    whole = estimate(NAME, SHAPE, update, torch.bfloat16)
    assert torch.equal(whole, estimate(NAME, SHAPE, update, torch.bfloat16))
    for chunk in (1, 7, 100):
        # 100 float32 additions of partial sums of size about 1.
        assert (estimate(NAME, SHAPE, update, torch.bfloat16, chunk=chunk) - whole).abs().max() < 1e-5


def test_batches_of_parameters_do_not_change_the_bits(monkeypatch):
    together = masters()
    together.apply(spec())
    monkeypatch.setattr("eggroll_llm.es.estimate.FACTOR_BATCH", 1)
    alone = masters()
    alone.apply(spec())
    assert together.checksum() == alone.checksum()
    assert all(torch.equal(x, y) for x, y in zip(together.state().values(), alone.state().values(), strict=True))


def test_factors_still_at_hand_from_sampling_may_be_handed_in():
    calls = []

    def remembered(noise, pairs_K, shapes, dtype, device):
        calls.append((noise, pairs_K.tolist(), dtype))
        return served_factors_of(noise, pairs_K, shapes, dtype, device)

    given, rebuilt = masters(), masters()
    assert given.apply(spec(), factors_of=remembered) == rebuilt.apply(spec())
    assert given.checksum() == rebuilt.checksum()
    assert calls == [(spec().noise, list(range(8)), torch.bfloat16)]


def test_pairs_without_a_say_do_not_change_the_estimate():
    few = spec(fitness_M=(1.0, -0.5, 0.0, 2.0))
    many = replace(few, fitness_M=(*few.fitness_M, *[0.0] * 300, *[0.7, 0.7]))
    difference = estimate(NAME, SHAPE, few, torch.bfloat16) - estimate(NAME, SHAPE, many, torch.bfloat16)
    assert difference.abs().max() < 1e-6


@pytest.mark.parametrize(
    ("rank", "population", "sigma", "antithetic"),
    [(1, 2, 1e-4, True), (1, 32, 1e-2, True), (4, 2, 1e-2, False), (4, 32, 0.3, True), (1, 12, 1e-4, False)],
)
def test_rms_of_a_step_is_the_learning_rate(rank, population, sigma, antithetic):
    # The entries of E have variance 1. Three matrices of 256 x 256 with at least one pair of rank one: the
    # mean square averages 6 * 256 squared normals, standard error sqrt(2 * 2 / (3 * 256)) = 0.07 of it, 0.036
    # of its root.
    # A vector's entries are independent.
    base = {f"{i}.weight": torch.zeros(256, 256) for i in range(3)} | {"bias": torch.zeros(768)}
    master = MasterWeights(base, EsSettings(), torch.float32)
    update = spec(population, rank=rank, sigma=sigma, antithetic=antithetic, learning_rate=2e-3)
    report = master.apply(update)
    assert abs(report.rms / 2e-3 - 1) < 0.12
    assert report.finite
    change = torch.cat([master.served(name).flatten() for name in base])
    assert abs(float(change.square().mean().sqrt()) / 2e-3 - 1) < 0.12
    assert abs(float(change.square().mean().sqrt()) / report.rms - 1) < 1e-6  # so few rows are all measured
    assert abs(float(master.served("bias").square().mean().sqrt()) / 2e-3 - 1) < 0.12


def test_literature_scale_is_the_published_formula_and_between_0_and_root_2():
    disagree, agree, mixed = (1.0, -1.0) * 8, (1.0, 1.0) * 4 + (-1.0, -1.0) * 4, (1.0, -1.0, 1.0, 1.0) * 4
    sizes = []
    for fitness_M in (disagree, mixed, agree):
        update = spec(fitness_M=fitness_M)
        rms, literature = (
            estimate(NAME, SHAPE, replace(update, scale=s), torch.bfloat16) for s in ("rms", "literature")
        )
        norm = float(pair_coefficients(fitness_M, True).norm())
        if norm:
            assert torch.allclose(literature, rms * norm / 4, rtol=1e-5, atol=1e-6)
        sizes.append(norm / 4)
    assert sizes == [math.sqrt(2), 1.0, 0.0]


def test_scaling_fitness_does_not_change_an_rms_step():
    update = spec()
    scaled = replace(update, fitness_M=tuple(4 * f for f in update.fitness_M))
    assert torch.equal(estimate(NAME, SHAPE, update, torch.bfloat16), estimate(NAME, SHAPE, scaled, torch.bfloat16))


@pytest.mark.parametrize("antithetic", [True, False])
def test_permuting_members_with_their_noise_is_the_same_estimate(antithetic):
    # Members are their noise: moving fitness together with the pair number gives the sum in another order.
    update = spec(antithetic=antithetic)
    c_K = pair_coefficients(update.fitness_M, antithetic)
    order_K = torch.randperm(len(c_K), generator=torch.Generator().manual_seed(1))
    A_KOR, B_KIR = served_factors(update.noise, order_K, NAME, *SHAPE, torch.bfloat16, "cpu")
    permuted = torch.einsum("k,kor,kir->oi", c_K[order_K], A_KOR.double(), B_KIR.double()) / 0.01 / c_K.norm()
    assert (estimate(NAME, SHAPE, update, torch.bfloat16) - permuted).abs().max() < 3e-6


@pytest.mark.parametrize("method", METHODS)
def test_optimizers_agree_with_torch_on_the_dense_gradient(method):
    settings = EsSettings(optimizer=method, momentum=0.8, adam_beta1=0.7, adam_beta2=0.95, adam_eps=1e-4)
    master = MasterWeights(weights(), settings, torch.float32)
    parameters = {name: weight.double().requires_grad_() for name, weight in weights().items()}
    if method == "adam":
        reference = torch.optim.Adam(parameters.values(), betas=(0.7, 0.95), eps=1e-4)
    else:
        reference = torch.optim.SGD(parameters.values(), momentum=0.8 if method == "momentum" else 0.0)
    for step in range(4):
        update = spec(step=step, noise_step=step, learning_rate=1e-3 * (step + 1))
        master.apply(update)
        reference.param_groups[0]["lr"] = update.learning_rate
        for name, parameter in parameters.items():
            parameter.grad = -dense_estimate(name, SHAPES[name], update, torch.float32)
        reference.step()
    for name, parameter in parameters.items():
        assert (master.served(name) - parameter).abs().max() < 2e-7
        assert (master.served(name) - weights()[name]).abs().max() > 1e-3


def test_the_step_goes_up_the_fitness():
    # Maximise -|W - target|^2 by its definition: the distance must fall, with the first steps taken by plain
    # SGD.
    target = gaussian(*SHAPE)
    master = MasterWeights({NAME: torch.zeros(SHAPE)}, EsSettings(), torch.float32)
    distances = []
    for step in range(20):
        update = spec(step=step, noise_step=step, learning_rate=0.05, sigma=0.05)
        A_KOR, B_KIR = served_factors(update.noise, torch.arange(32), NAME, *SHAPE, torch.float32, "cpu")
        E_KOI = A_KOR @ B_KIR.transpose(1, 2)
        members = torch.stack((master.served(NAME) + E_KOI, master.served(NAME) - E_KOI), dim=1).flatten(0, 1)
        fitness_M = tuple((-(members - target).square().sum(dim=(1, 2))).tolist())
        distances.append(float((master.served(NAME) - target).norm()))
        master.apply(replace(update, fitness_M=fitness_M))
    assert distances[-1] < 0.93 * distances[0]
    assert all(later < earlier for earlier, later in pairwise(distances))


def test_masters_keep_what_bf16_would_swallow():
    # A published step size on weights of an ordinary size. After fifty equal steps the masters have moved
    # fifty times as far, while weights that are added to in bf16 have lost most of the way.
    update = spec(population=2, learning_rate=6e-6, fitness_M=(1.0, -1.0))
    start = (gaussian(256, 256) * 0.1).bfloat16()
    master = MasterWeights({NAME: start}, EsSettings(), torch.bfloat16)
    direction = estimate(NAME, (256, 256), update, torch.bfloat16) * 6e-6
    swallowing = start.clone()
    for _ in range(50):
        master.apply(update)
        swallowing += direction.bfloat16()

    def share_of_the_way(moved: torch.Tensor) -> float:
        return float(((moved.float() - start.float()) * direction).sum() / (50 * direction.square().sum()))

    assert abs(share_of_the_way(master.state()[f"master/{NAME}"]) - 1) < 1e-3
    assert abs(share_of_the_way(master.served(NAME)) - 1) < 0.1
    assert share_of_the_way(swallowing) < 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_report_counts_served_weights_that_changed(dtype):
    master = masters(dtype=dtype)
    before = {name: master.served(name).clone() for name in SHAPES}
    report = master.apply(spec(learning_rate=3e-5))
    changed = sum(int((master.served(name) != before[name]).sum()) for name in SHAPES)
    assert report.changed == changed / sum(weight.numel() for weight in before.values())
    assert 0 < report.changed < 1 if dtype == torch.bfloat16 else report.changed > 0.9


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fitness_M", [(0.0,) * 4, (0.5, 0.5, -0.5, -0.5), (-0.0, 0.0)])
def test_a_tied_step_changes_nothing_not_even_the_optimizer(method, fitness_M):
    master = masters(method)
    master.apply(spec())
    before = {key: value.clone() for key, value in master.state().items()}
    report = master.apply(spec(fitness_M=fitness_M))
    assert (report.rms, report.changed, report.finite) == (0.0, 0.0, True)
    assert report.weights_rms > 0
    after = master.state()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "changes",
    [
        {"fitness_M": (math.nan, 1.0)},
        {"fitness_M": (1.0, math.inf)},
        {"learning_rate": math.nan},
        {"learning_rate": math.inf},
        {"learning_rate": 1e38},
        {"fitness_M": (1e30, 0.0), "scale": "literature"},
        {"sigma": 1e-40},
    ],
)
def test_an_update_that_might_not_be_finite_is_not_applied(method, changes):
    master = masters(method)
    master.apply(spec())
    before = {key: value.clone() for key, value in master.state().items()}
    with pytest.raises(NonFiniteUpdate, match="update of step 8 not applied"):
        master.apply(spec(step=8, **changes))
    after = master.state()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("method", METHODS)
def test_the_largest_update_let_through_leaves_everything_finite(method):
    master = masters(method, adam_eps=1e-16, momentum=0.999)
    largest = LARGEST_GRADIENT / LARGEST_PRODUCT / 2
    for step in range(3):
        report = master.apply(spec(step=step, fitness_M=(largest, -largest), scale="literature", learning_rate=1e6))
        assert report.finite
    assert all(bool(value.isfinite().all()) for value in master.state().values())
    assert all(bool(master.served(name).isfinite().all()) for name in SHAPES)


def test_a_tiny_sigma_with_a_large_learning_rate_is_refused():
    with pytest.raises(NonFiniteUpdate, match="over sigma"):
        masters("sgd").apply(spec(sigma=1e-37, learning_rate=100.0))


@pytest.mark.parametrize("method", METHODS)
def test_restore_is_exact_and_continues_in_the_same_bits(method):
    through, first, second = masters(method), masters(method), masters(method)
    for step in range(6):
        through.apply(spec(step=step, noise_step=step))
    for step in range(3):
        first.apply(spec(step=step, noise_step=step))
    saved = {key: value.clone() for key, value in first.state().items()}
    first.apply(spec(step=77, noise_step=77))
    second.load_state(saved)
    assert second.state().keys() == saved.keys()
    assert all(torch.equal(second.state()[key], value) for key, value in saved.items())
    for step in range(3, 6):
        second.apply(spec(step=step, noise_step=step))
    assert second.checksum() == through.checksum()
    assert all(torch.equal(second.state()[key], value) for key, value in through.state().items())
    # The loaded tensors were copied, not adopted.
    assert not torch.equal(second.state()[f"master/{NAME}"], saved[f"master/{NAME}"])


def test_state_has_flat_names_and_a_fresh_one_no_optimizer():
    assert set(masters("adam").state()) == {f"master/{name}" for name in SHAPES}
    for method, keys in (
        ("sgd", ()),
        ("momentum", ("momentum_buffer",)),
        ("adam", ("step", "exp_avg", "exp_avg_sq")),
    ):
        master = masters(method)
        master.apply(spec())
        expected = {f"master/{name}" for name in SHAPES} | {f"optimizer/{n}/{key}" for n in SHAPES for key in keys}
        assert set(master.state()) == expected
    fresh = masters("momentum")
    master = masters("momentum")
    master.apply(spec())
    master.load_state(fresh.state())
    assert set(master.state()) == set(fresh.state())


def test_state_that_does_not_fit_is_refused_and_nothing_changes():
    master = masters("momentum")
    master.apply(spec())
    good, before = dict(master.state()), master.checksum()
    key = f"master/{NAME}"
    bad = [
        ({k: v for k, v in good.items() if k != key}, "is missing"),
        (good | {"master/other": torch.zeros(2)}, "'master/other' is not expected"),
        (good | {key: torch.zeros(2, 2)}, r"expected torch.float32 \(24, 40\)"),
        (good | {key: good[key].bfloat16()}, "torch.bfloat16"),
        ({k: v for k, v in good.items() if k != f"optimizer/{NAME}/momentum_buffer"}, "is missing"),
    ]
    for state, message in bad:
        shifted = {k: v + 1 if k in good and v.shape == good[k].shape else v for k, v in state.items()}
        with pytest.raises(ValueError, match=message):
            master.load_state(shifted)
        assert master.checksum() == before


def test_checksum_is_of_the_served_bits_in_name_order():
    master = masters()
    checksum = master.checksum()
    assert len(checksum) == 16
    reordered = MasterWeights(dict(reversed(weights().items())), EsSettings(), torch.bfloat16)
    assert reordered.checksum() == checksum
    reordered.apply(spec(learning_rate=1e-12))
    assert reordered.checksum() == checksum
    one_bit = weights()
    one_bit[NAME].view(torch.int16)[3, 4] ^= 1
    assert MasterWeights(one_bit, EsSettings(), torch.bfloat16).checksum() != checksum
    swapped = weights()
    swapped[NAME], swapped["c.weight"] = swapped["c.weight"], swapped[NAME]
    assert MasterWeights(swapped, EsSettings(), torch.bfloat16).checksum() != checksum


def test_masters_are_a_copy_and_serve_their_rounding():
    given = weights()
    master = MasterWeights(given, EsSettings(), torch.bfloat16)
    assert all(torch.equal(master.served(name), weight) for name, weight in weights().items())
    master.apply(spec())
    assert all(torch.equal(given[name], weight) for name, weight in weights().items())
    assert torch.equal(master.served(NAME), master.state()[f"master/{NAME}"].bfloat16())
    float32 = {NAME: torch.zeros(SHAPE)}
    MasterWeights(float32, EsSettings(), torch.float32).apply(spec())
    assert not bool(float32[NAME].any())


def test_inference_mode_around_any_call_makes_no_difference():
    with torch.inference_mode():
        inside = masters("adam")
    inside.apply(spec())
    with torch.inference_mode():
        inside.apply(spec(step=6, noise_step=6))
        saved = {key: value.clone() for key, value in inside.state().items()}
    outside = masters("adam")
    outside.load_state(saved)
    for master in (inside, outside):
        master.apply(spec(step=7, noise_step=7))
    assert inside.checksum() == outside.checksum()


def test_a_process_that_allows_fast_matmuls_gets_full_precision_and_keeps_its_setting(monkeypatch):
    # What the setting does depends on the processor (on many nothing), so the setting itself is observed.
    original, seen = torch.Tensor.addmm_, []

    def observed(*args, **kwargs):
        seen.append(torch.get_float32_matmul_precision())
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "addmm_", observed)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        estimate(NAME, SHAPE, spec(population=300), torch.float32)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == ["highest"] * 3


@pytest.mark.parametrize(
    "settings",
    [{"optimizer": "lion"}, {"momentum": 1.0}, {"adam_beta1": -0.1}, {"adam_beta2": math.nan}, {"adam_eps": 0.0}],
)
def test_impossible_optimizers_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        MasterWeights(weights(), EsSettings(**settings), torch.bfloat16)


def test_impossible_weights_are_refused():
    settings = EsSettings()
    for given, dtype, message in (
        ({}, torch.bfloat16, "no weights"),
        ({"a": torch.zeros(3, 2, 2)}, torch.bfloat16, "'a' of shape"),
        ({"a": torch.full((2, 2), math.nan)}, torch.bfloat16, "finite matrix or vector"),
        ({"a": torch.zeros(2, 2)}, torch.float16, "float16"),
    ):
        with pytest.raises(ValueError, match=message):
            MasterWeights(given, settings, dtype)
    with pytest.raises(ValueError, match="'median': must be one of rms, literature"):
        estimate(NAME, SHAPE, spec(scale="median"), torch.bfloat16)


def test_an_update_needs_no_more_memory_for_a_larger_population():
    def ones(noise, pairs_K, shapes, dtype, device):
        return {name: (torch.ones(len(pairs_K), o, 1), torch.ones(len(pairs_K), i, 1)) for name, o, i in shapes}

    peaks = []
    for population in (1 << 16, 1 << 18):
        master = MasterWeights({"a": torch.zeros(64, 448), "b": torch.zeros(448, 64)}, EsSettings(), torch.float32)
        update = spec(fitness_M=(1.0, -1.0) * (population // 2))
        with LiveMemory() as memory:
            master.apply(update, ones)
        peaks.append(memory.peak)
        assert torch.allclose(master.served("a"), torch.tensor(0.1 * (population / 2) ** 0.5), rtol=1e-4)
    # A few numbers a pair are its coefficient and number; its factors would be 512, of 4 bytes each.
    assert peaks[1] - peaks[0] < 64 * (3 << 15)
