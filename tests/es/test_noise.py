"""The noise is Philox to the letter, normal, independent in every coordinate, the same however asked for."""

import math

import pytest
import torch
from factors import normal_factors
from parts import assert_parts_are_rows
from threads import threads

from eggroll_llm.es import noise as noise_module
from eggroll_llm.es.noise import (
    NoiseSpec,
    box_muller,
    check_parameter_ids,
    parameter_id,
    philox4x32,
    served_factors,
    served_factors_of,
)

WORD = 0xFFFFFFFF
NAME = "model.layers.0.self_attn.q_proj.weight"


def spec(**changes: float) -> NoiseSpec:
    return NoiseSpec(**({"seed": 7, "step": 3, "rank": 1, "sigma": 0.01} | changes))


def stream(noise: NoiseSpec, name: str = NAME, pair: int = 0, count: int = 4000) -> torch.Tensor:
    A_KOR, B_KIR = normal_factors(noise, torch.tensor([pair]), name, count // 2, count // 2)
    return torch.cat((A_KOR.flatten(), B_KIR.flatten()))


# From the known-answer file of Random123 (Salmon et al., SC 2011).
@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(counter, key, words):
    result = philox4x32(tuple(torch.tensor([word]) for word in counter), key)
    assert tuple(int(word) & WORD for word in result) == words


def test_philox_equals_the_definition_in_python_integers_when_counters_broadcast():
    def reference(counter, key):
        c, k = list(counter), list(key)
        for _ in range(10):
            p0, p2 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
            c = [(p2 >> 32) ^ c[1] ^ k[0], p2 & WORD, (p0 >> 32) ^ c[3] ^ k[1], p0 & WORD]
            k = [(k[0] + 0x9E3779B9) & WORD, (k[1] + 0xBB67AE85) & WORD]
        return tuple(c)

    pairs, ids, key = [0, 5, WORD], [parameter_id(NAME), 1 << 31], (0x89ABCDEF, 0xFEDCBA98)
    block = torch.arange(5)
    words = philox4x32((torch.tensor([9]), torch.tensor(pairs)[:, None, None], torch.tensor(ids)[:, None], block), key)
    for k, pair in enumerate(pairs):
        for n, number in enumerate(ids):
            for b in range(5):
                found = tuple(int(word.expand(3, 2, 5)[k, n, b]) & WORD for word in words)
                assert found == reference((9, pair, number, b), key)


def test_box_muller_is_the_formula_to_four_parts_in_ten_million():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randint(-(2**31), 2**31, (2, 1 << 18), generator=generator).to(torch.int32)
    edges = torch.tensor([0, 1, 2**31 - 1, -(2**31), -1], dtype=torch.int32)
    first, second = torch.cat((first, edges)), torch.cat((second, edges.flip(0)))
    uniform = ((first & 0x7FFFFFFF).float() + 1).double() / 2**31
    radius = (-2 * uniform.log()).sqrt() * torch.where(first < 0, -1.0, 1.0)
    angle = second.double() / 2**31 * math.pi / 2
    cosine, sine = box_muller(first, second)
    assert (cosine.double() - radius * angle.cos()).abs().max() < 4e-7 * 6.6
    assert (sine.double() - radius * angle.sin()).abs().max() < 4e-7 * 6.6
    assert torch.hypot(cosine.double(), sine.double()).max() <= math.sqrt(62 * math.log(2)) * (1 + 4e-7)


def test_box_muller_uses_only_operations_that_round_the_same_everywhere():
    # The reference does the same float32 operations one number at a time in numpy, whose scalars never fuse
    # or vectorise: bit equality shows that no library function and no position within a vector has a say.
    np = pytest.importorskip("numpy")
    generator = torch.Generator().manual_seed(1)
    first, second = torch.randint(-(2**31), 2**31, (2, 203), generator=generator).to(torch.int32)

    def horner(x, coefficients):
        value = np.float32(x * np.float32(coefficients[-1]))
        for coefficient in coefficients[-2:0:-1]:
            value = np.float32(np.float32(value + np.float32(coefficient)) * x)
        return np.float32(value + np.float32(coefficients[0]))

    cosines, sines = box_muller(first, second)
    for i in range(203):
        uniform = np.float32(np.float32(int(first[i]) & 0x7FFFFFFF) + np.float32(1))
        bits = int(uniform.view(np.int32)) - 0x3F3504F3 - (31 << 23)
        z = np.float32(np.int32((bits & 0x7FFFFF) + 0x3F3504F3).view(np.float32) - np.float32(1))
        square = np.float32(horner(z, noise_module.MINUS_TWO_LOG) * z)
        square = np.float32(square + np.float32(np.float32(bits >> 23) * np.float32(-2 * math.log(2))))
        radius = np.copysign(np.sqrt(square), np.float32(int(first[i])))
        x = np.float32(np.float32(int(second[i])) * np.float32(2.0**-31))
        y = np.float32(x * x)
        assert float(cosines[i]) == float(horner(y, noise_module.COSINE) * radius)
        assert float(sines[i]) == float(np.float32(horner(y, noise_module.SINE) * x) * radius)


def test_square_root_is_correctly_rounded():
    x = torch.rand(100_003, generator=torch.Generator().manual_seed(2)) * 43
    root = x.to(torch.float64).sqrt().to(torch.float32)
    # Correctly rounded: x lies between the squares of the midpoints to the neighbours, which float64 holds
    # exactly.
    up, down = (torch.nextafter(root, torch.tensor(limit)).double() for limit in (math.inf, 0.0))
    assert bool((((root.double() + down) / 2) ** 2 <= x).all())
    assert bool((x <= ((root.double() + up) / 2) ** 2).all())


def test_values_are_the_words_of_the_documented_counter_in_the_documented_order():
    noise = spec(seed=0x123456789ABCDEF0, rank=2)
    A_KOR, B_KIR = normal_factors(noise, torch.tensor([11]), NAME, 3, 2)
    values = torch.cat((A_KOR.flatten(), B_KIR.flatten()))
    counter = (torch.tensor([3]), torch.tensor([11]), torch.tensor([parameter_id(NAME)]), torch.arange(3))
    words = torch.stack([word.to(torch.int32) for word in philox4x32(counter, (0x9ABCDEF0, 0x12345678))])
    expected = torch.empty(3, 4)
    expected[:, 0], expected[:, 1] = box_muller(words[0], words[1])
    expected[:, 2], expected[:, 3] = box_muller(words[2], words[3])
    assert torch.equal(values, expected.flatten()[:10])


@pytest.mark.parametrize("rank", [1, 2, 3, 8])
def test_values_do_not_depend_on_tile_order_or_company(rank, monkeypatch):
    noise = spec(rank=rank)
    shapes = [("a", 10, 7), ("b", 10, 7), ("c", 33, 64), ("d", 10, 7)]
    pairs_K = torch.tensor([5, 0, 2**32 - 1, 17])
    whole = served_factors_of(noise, pairs_K, shapes, torch.bfloat16, "cpu")
    assert set(whole) == {"a", "b", "c", "d"}
    for tile in (1, 3, 7, 50):
        monkeypatch.setattr(noise_module, "TILE_BLOCKS_PER_CPU_THREAD", tile)
        for name, out_features, in_features in shapes:
            A_KOR, B_KIR = served_factors(noise, pairs_K, name, out_features, in_features, torch.bfloat16, "cpu")
            assert torch.equal(A_KOR, whole[name][0])
            assert torch.equal(B_KIR, whole[name][1])
    monkeypatch.undo()
    for k, pair in enumerate(pairs_K.tolist()):
        A_KOR, B_KIR = served_factors(noise, torch.tensor([pair]), "c", 33, 64, torch.bfloat16, "cpu")
        assert torch.equal(A_KOR[0], whole["c"][0][k])
        assert torch.equal(B_KIR[0], whole["c"][1][k])


@pytest.mark.parametrize("rank", [1, 3])
def test_a_part_has_the_rows_of_the_whole(rank, monkeypatch):
    """What devices of one engine make of a parameter: rows of A with all of B, and the other way round."""
    monkeypatch.setattr(noise_module, "TILE_BLOCKS_PER_CPU_THREAD", 5)
    assert_parts_are_rows(served_factors_of, rank, torch.float32, (37, 101))


def test_values_do_not_depend_on_the_number_of_threads():
    results = []
    for count in (1, 2):
        with threads(count):
            results.append(stream(spec(), count=300_000))
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rank", [1, 4])
def test_served_factors_are_the_normals_rounded_once(dtype, rank):
    noise = spec(rank=rank, sigma=0.012)
    pairs_K = torch.arange(3)
    A_KOR, B_KIR = normal_factors(noise, pairs_K, NAME, 20, 30)
    served_A, served_B = served_factors(noise, pairs_K, NAME, 20, 30, dtype, "cpu")
    assert served_A.shape == (3, 20, rank)
    assert served_B.shape == (3, 30, rank)
    assert torch.equal(served_A, (A_KOR * torch.tensor(0.012 / math.sqrt(rank), dtype=torch.float32)).to(dtype))
    assert torch.equal(served_B, B_KIR.to(dtype))


def test_twins_are_exact_negatives_and_the_sign_of_a_is_exact():
    A_KOR, B_KIR = served_factors(spec(), torch.arange(4), NAME, 12, 9, torch.bfloat16, "cpu")
    plus, minus = A_KOR @ B_KIR.transpose(1, 2), (-A_KOR) @ B_KIR.transpose(1, 2)
    assert torch.equal(plus, -minus)
    assert bool(plus.any())


def test_moments_and_tails_are_those_of_the_standard_normal():
    # Each bound is five standard errors of the statistic for n independent normals.
    n = 400_000
    x = stream(spec(), count=n).double()
    assert abs(x.mean()) < 5 / math.sqrt(n)
    assert abs(x.square().mean() - 1) < 5 * math.sqrt(2 / n)
    assert abs((x**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((x**4).mean() - 3) < 5 * math.sqrt(96 / n)
    for bound in (0.5, 1.0, 2.0, 3.0):
        p = math.erfc(bound / math.sqrt(2))
        assert abs((x.abs() > bound).double().mean() - p) < 5 * math.sqrt(p * (1 - p) / n)


def test_every_coordinate_gives_independent_noise():
    # Streams that differ in one coordinate: correlation within five standard errors, of squares too. The
    # control at the end shows that the statistic sees dependence.
    n = 4000
    base = stream(spec(), count=n)
    others = {
        "layer": stream(spec(), name=NAME.replace("layers.0", "layers.1"), count=n),
        "matrix": stream(spec(), name=NAME.replace("q_proj", "k_proj"), count=n),
        "pair": stream(spec(), pair=1, count=n),
        "step": stream(spec(step=4), count=n),
        "seed": stream(spec(seed=8), count=n),
        "seed, high word": stream(spec(seed=7 + (1 << 32)), count=n),
        "shift by a value": base.roll(1),
        "shift by a block": base.roll(4),
        "A against B": base.roll(n // 2),
    }

    def dependence(x: torch.Tensor, y: torch.Tensor) -> float:
        columns = torch.stack((x, y, x.square(), y.square()))
        return float(torch.corrcoef(columns)[(0, 2), (1, 3)].abs().max()) * math.sqrt(n)

    assert {name: value for name, other in others.items() if (value := dependence(base, other)) > 5} == {}
    assert dependence(base, base + stream(spec(seed=9), count=n)) > 5
    assert dependence(base, -base) > 5


def test_entries_of_the_perturbation_have_variance_one_for_every_rank():
    for rank in (1, 2, 4, 8):
        A_KOR, B_KIR = served_factors(spec(rank=rank), torch.arange(64), NAME, 60, 60, torch.float32, "cpu")
        E_KOI = A_KOR @ B_KIR.transpose(1, 2) / 0.01
        # Rows and columns share a factor: 64 * 60 independent values on each side, standard error about
        # 0.035.
        assert abs(float(E_KOI.square().mean()) - 1) < 0.15


def test_parameter_ids_are_stable_and_collisions_are_refused(monkeypatch):
    assert parameter_id("model.layers.0.self_attn.q_proj.weight") == 0xA373CDAF
    names = [f"model.layers.{layer}.mlp.{m}_proj.weight" for layer in range(64) for m in ("gate", "up", "down")]
    check_parameter_ids([*names, *names])
    monkeypatch.setattr(noise_module, "parameter_id", lambda name: len(name))
    with pytest.raises(ValueError, match=r"'ab' and 'cd' have the same noise id"):
        check_parameter_ids(["a", "ab", "cd"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, "seed = -1"),
        ({"seed": 1 << 64}, "seed = "),
        ({"step": -1}, "step = -1"),
        ({"step": 1 << 32}, "step = "),
        ({"rank": 0}, "rank = 0"),
        ({"sigma": 0.0}, "sigma = 0"),
        ({"sigma": -1.0}, "sigma = -1"),
        ({"sigma": math.nan}, "sigma = nan"),
        ({"sigma": math.inf}, "sigma = inf"),
    ],
)
def test_specs_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        spec(**change)
    assert spec(seed=(1 << 64) - 1, step=WORD).seed == (1 << 64) - 1
