"""Fitness by hand, its invariances, and rewards that must not reach the update."""

import math

import pytest
import torch

from eggroll_llm.es.fitness import shape_fitness, shape_twins

METHODS = ["centered", "rank", "sign"]
# Multiples of 1/8, so that adding and scaling by powers of two is exact and ties stay ties.
REWARDS_MP = torch.randint(-8, 9, (12, 5), generator=torch.Generator().manual_seed(0)) / 8


def fitness(rewards_MP, method: str, antithetic: bool = True) -> torch.Tensor:
    return shape_fitness(torch.as_tensor(rewards_MP), method, antithetic=antithetic).fitness_M


def test_centered_by_hand():
    # Prompt means 2 and 5; centered [[-1, 1], [1, -1], [2, 5], [-2, -5]] with mean square
    # (1+1+1+1+4+25+4+25)/8 = 7.75. Averages over prompts 0, 0, 3.5, -3.5 (over the deviation, which the
    # z-score removes): z = 3.5 / sqrt(2 * 3.5^2 / 4).
    rewards_MP = [[1.0, 6.0], [3.0, 4.0], [4.0, 10.0], [0.0, 0.0]]
    assert torch.allclose(fitness(rewards_MP, "centered"), torch.tensor([0, 0, math.sqrt(2), -math.sqrt(2)]))


def test_centered_is_the_z_score_of_the_average_reward():
    average_M = REWARDS_MP.double().mean(dim=1)
    z_M = (average_M - average_M.mean()) / average_M.std(correction=0)
    assert torch.allclose(fitness(REWARDS_MP, "centered"), z_M.float())


def test_centered_weighs_prompts_by_their_spread_not_equally():
    # Prompt 0 is solved by half of the members, prompt 1 by one of them. Per-prompt standardisation would put
    # that one (0.25 * 4 / sqrt(3) against 0.5 * 2) on top; one global deviation leaves the order to the
    # rewards.
    rewards_MP = torch.zeros(4, 2)
    rewards_MP[:2, 0] = 1.0
    rewards_MP[2, 1] = 1.0
    result = fitness(rewards_MP, "centered")
    assert torch.allclose(result[0], result[2])
    per_prompt = ((rewards_MP - rewards_MP.mean(0)) / rewards_MP.std(0, correction=0)).mean(1)
    assert per_prompt[2] > per_prompt[0]


def test_ranks_by_hand_with_a_tie():
    # Means 5, 1, 1, 9: places 2, 0.5, 0.5, 3; centered 1/6, -1/3, -1/3, 1/2; mean square (1 + 4 + 4 + 9) / 36
    # / 4 = 1/8.
    expected = torch.tensor([1 / 6, -1 / 3, -1 / 3, 1 / 2]) * math.sqrt(8)
    assert torch.allclose(fitness([[5.0], [1.0], [1.0], [9.0]], "rank"), expected)


def test_ranks_ignore_how_far_apart_rewards_are():
    assert torch.equal(fitness([[0.0], [1.0], [2.0], [3.0]], "rank"), fitness([[0.0], [0.1], [0.2], [1e6]], "rank"))


def test_sign_by_hand():
    rewards_MP = [[3.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.0, 5.0], [1.0, 2.0], [2.0, 1.0]]
    assert fitness(rewards_MP, "sign").tolist() == [1, -1, -1, 1, 0, 0]


@pytest.mark.parametrize("method", ["centered", "rank"])
def test_mean_zero_and_variance_one(method):
    for antithetic in (True, False):
        result = fitness(REWARDS_MP, method, antithetic).double()
        assert abs(result.mean()) < 1e-7
        assert abs(result.square().mean() - 1) < 1e-6


@pytest.mark.parametrize("method", METHODS)
class TestInvariances:
    def test_adding_a_constant_changes_nothing(self, method):
        assert torch.allclose(fitness(REWARDS_MP + 1024, method), fitness(REWARDS_MP, method), rtol=1e-6, atol=1e-7)

    def test_adding_a_constant_to_a_prompt_changes_nothing(self, method):
        shifts_P = torch.tensor([3.0, 0.0, -7.5, 100.0, 0.25])
        assert torch.allclose(fitness(REWARDS_MP + shifts_P, method), fitness(REWARDS_MP, method), rtol=1e-6, atol=1e-7)

    @pytest.mark.parametrize("scale", [3.0, 1e-30, 1e300])
    def test_multiplying_by_a_positive_constant_changes_nothing(self, method, scale):
        scaled_MP = REWARDS_MP.double() * scale
        assert torch.allclose(fitness(scaled_MP, method), fitness(REWARDS_MP, method), rtol=1e-6, atol=1e-7)

    def test_multiplying_by_a_negative_constant_turns_the_sign(self, method):
        assert torch.allclose(fitness(-REWARDS_MP, method), -fitness(REWARDS_MP, method), rtol=1e-6, atol=1e-7)
        assert bool(fitness(REWARDS_MP, method).any())

    def test_permuting_pairs_permutes_fitness(self, method):
        order_K = torch.tensor([3, 0, 5, 1, 4, 2])
        order_M = torch.stack((2 * order_K, 2 * order_K + 1), dim=1).flatten()
        expected = fitness(REWARDS_MP, method)[order_M]
        assert torch.allclose(fitness(REWARDS_MP[order_M], method), expected, rtol=1e-6, atol=1e-7)

    def test_swapping_twins_with_their_rewards_swaps_their_fitness(self, method):
        order_M = torch.arange(12)
        order_M[[4, 5]] = order_M[[5, 4]]
        expected = fitness(REWARDS_MP, method)[order_M]
        assert torch.allclose(fitness(REWARDS_MP[order_M], method), expected, rtol=1e-6, atol=1e-7)

    def test_order_of_prompts_does_not_matter(self, method):
        reordered = fitness(REWARDS_MP[:, [4, 2, 0, 1, 3]], method)
        assert torch.allclose(reordered, fitness(REWARDS_MP, method), rtol=1e-6, atol=1e-7)


def test_members_without_pairs_may_be_permuted_freely():
    order_M = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    for method in ("centered", "rank"):
        expected = fitness(REWARDS_MP, method, False)[order_M]
        assert torch.allclose(fitness(REWARDS_MP[order_M], method, False), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [0.0, 0.1, -1e300, 1 / 3])
def test_all_tied_is_exactly_zero(method, value):
    result = shape_fitness(torch.full((6, 7), value, dtype=torch.float64), method)
    assert result.fitness_M.tolist() == [0.0] * 6
    assert (result.dropped, result.tied, result.all_tied) == ((), tuple(range(7)), True)


@pytest.mark.parametrize("method", METHODS)
def test_equal_averages_are_tied_although_sums_round(method):
    # Every member has the same three rewards in another order; sums of thirds and tenths differ in the last
    # place.
    row = torch.tensor([0.1, 1 / 3, 0.7], dtype=torch.float64)
    shifts = [row.roll(k) for k in range(3)]
    rewards_MP = torch.stack([shifts[k % 3] + 100 for k in range(6)])
    result = shape_fitness(rewards_MP, method)
    assert result.fitness_M.tolist() == [0.0] * 6
    assert (result.tied, result.all_tied) == ((), True)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "rewards", [[[1], [1], [0], [0]], [[1, 0, 1], [1, 1, 0], [1, 0, 0], [0, 0, 1], [0] * 3, [0] * 3]]
)
def test_where_every_pair_of_twins_ties_nothing_is_learned(method, rewards):
    """Also where pairs differ, and where a pair at the mean differs by a rounding error, which would be all."""
    for seed in range(20):  # sums in different orders
        order = torch.randperm(len(rewards[0]), generator=torch.Generator().manual_seed(seed))
        result = shape_fitness(torch.tensor(rewards, dtype=torch.float64)[:, order] / 3, method)
        assert result.fitness_M.tolist() == [0.0] * len(rewards)
        assert result.all_tied
    alone = shape_fitness(torch.tensor(rewards, dtype=torch.float64), "centered", antithetic=False)
    assert not alone.all_tied  # members that are no twins differ


@pytest.mark.parametrize("method", METHODS)
def test_small_real_differences_are_not_tied(method):
    rewards_MP = torch.zeros(4, 2, dtype=torch.float64) + 1
    rewards_MP[0, 0] += 1e-6
    result = shape_fitness(rewards_MP, method)
    assert not result.all_tied
    assert len(result.tied) == 1
    assert result.fitness_M[0] > 0 >= result.fitness_M[1]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_member_with_a_reward_that_is_not_finite_is_dropped_with_its_twin(method, bad):
    rewards_MP = REWARDS_MP.clone()
    rewards_MP[5, 2] = bad
    result = shape_fitness(rewards_MP, method)
    kept_M = [m for m in range(12) if m not in (4, 5)]
    assert result.dropped == (4, 5)
    assert result.fitness_M[[4, 5]].tolist() == [0.0, 0.0]
    assert torch.equal(result.fitness_M[kept_M], fitness(REWARDS_MP[kept_M], method))


def test_without_pairs_only_the_member_itself_is_dropped():
    rewards_MP = REWARDS_MP.clone()
    rewards_MP[5, 2] = math.nan
    result = shape_fitness(rewards_MP, "centered", antithetic=False)
    kept_M = [m for m in range(12) if m != 5]
    assert result.dropped == (5,)
    assert torch.equal(result.fitness_M[kept_M], fitness(REWARDS_MP[kept_M], "centered", False))


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_left_when_all_are_dropped(method):
    result = shape_fitness(torch.full((4, 2), math.nan), method)
    assert result.fitness_M.tolist() == [0.0] * 4
    assert (result.dropped, result.tied, result.all_tied) == ((0, 1, 2, 3), (0, 1), True)


def test_result_is_float32_whatever_the_rewards_are():
    for dtype in (torch.float64, torch.float32, torch.int64):
        assert shape_fitness((REWARDS_MP * 8).to(dtype), "centered").fitness_M.dtype == torch.float32
    assert torch.equal(fitness((REWARDS_MP * 8).to(torch.int64), "centered"), fitness(REWARDS_MP * 8, "centered"))


@pytest.mark.parametrize(
    ("rewards_MP", "method", "antithetic", "message"),
    [
        (torch.zeros(4), "centered", True, r"must be \[members, prompts\]"),
        (torch.zeros(4, 0), "centered", True, r"\(4, 0\)"),
        (torch.zeros(3, 2), "centered", True, "3 members: antithetic pairs need an even number"),
        (torch.zeros(4, 2), "sign", False, "needs antithetic pairs"),
        (torch.zeros(4, 2), "softmax", True, "'softmax': must be one of centered, rank, sign"),
    ],
)
def test_impossible_input_is_refused(rewards_MP, method, antithetic, message):
    with pytest.raises(ValueError, match=message):
        shape_fitness(rewards_MP, method, antithetic=antithetic)


def twins(rewards_MP, method="centered"):
    return shape_twins(torch.as_tensor(rewards_MP, dtype=torch.float64), method)


def test_twins_are_compared_with_each_other_alone():
    # Differences of the means: 1, -2, 0; root mean square sqrt(5/3).
    rewards_MP = [[2.0, 4.0], [1.0, 3.0], [0.0, 0.0], [3.0, 1.0], [100.0, 100.0], [100.0, 100.0]]
    found = twins(rewards_MP)
    size = math.sqrt(5 / 3)
    assert found.fitness_M.tolist() == pytest.approx([1 / size, -1 / size, -2 / size, 2 / size, 0, 0])
    assert (found.tied, found.all_tied, found.dropped) == ((4, 5), False, ())
    assert twins(rewards_MP, "sign").fitness_M.tolist() == [1, -1, -1, 1, 0, 0]


def test_problems_of_dropped_twins_are_not_tied():
    found = twins([[math.nan, 1.0], [0.0, 0.0], [1.0, 2.0], [1.0, 0.0]])
    assert (found.tied, found.dropped) == ((2,), (0, 1))


def test_what_twins_have_in_common_does_not_count():
    """Another constant for each problem of each pair, or a common scale, changes nothing."""
    other = REWARDS_MP + torch.arange(30.0).view(6, 1, 5).expand(6, 2, 5).reshape(12, 5)
    assert torch.equal(twins(other).fitness_M, twins(REWARDS_MP).fitness_M)
    assert torch.equal(twins(8 * REWARDS_MP).fitness_M, twins(REWARDS_MP).fitness_M)
    fitness_M = twins(REWARDS_MP).fitness_M
    assert fitness_M.square().mean() == pytest.approx(1)
    assert torch.equal(fitness_M[0::2], -fitness_M[1::2])


def test_a_twin_with_a_reward_that_is_not_finite_drops_its_pair():
    found = twins([[1.0], [0.0], [math.nan], [5.0], [0.0], [math.inf], [0.0], [1.0]])
    assert found.fitness_M.tolist() == [1, -1, 0, 0, 0, 0, -1, 1]
    assert found.dropped == (2, 3, 4, 5)
    nothing = twins([[math.nan], [0.0]])
    assert nothing.all_tied
    assert nothing.fitness_M.tolist() == [0, 0]


def test_ranks_of_twins_and_lone_members_are_refused():
    with pytest.raises(ValueError, match="no common ranks"):
        twins(REWARDS_MP, "rank")
    with pytest.raises(ValueError, match="members even"):
        twins([[1.0]])
