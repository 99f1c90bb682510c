"""Fitness from probabilities, against what it estimates: a softmax over a few completions can be summed up exactly."""

import math
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eggroll_llm.es.likelihood import Candidates, Weighting, advantages, candidates, divergence, returns

WEIGHTINGS = get_args(Weighting)
PROMPT = (7, 7)


def of_one_prompt(counts: list[int], rewards: list[float], lengths: list[int] | None = None) -> Candidates:
    """Completion j was sampled counts[j] times and earned rewards[j]."""
    lengths = lengths or [1] * len(counts)
    samples = [(j + 1,) * lengths[j] for j, count in enumerate(counts) for _ in range(count)]
    earned = [rewards[j] for j, count in enumerate(counts) for _ in range(count)]
    return candidates([PROMPT], [samples], torch.tensor([earned]))


def test_advantages_are_relative_to_the_prompt() -> None:
    rewards_PS = torch.tensor([[1.0, 0, 0, 1], [3, 3, 3, 3], [math.nan, 0, 1, math.inf], [math.nan] * 4, [0.1] * 4])
    right = torch.tensor([[0.5, -0.5, -0.5, 0.5], [0] * 4, [0, -0.5, 0.5, 0], [0] * 4, [0] * 4], dtype=torch.float64)
    assert torch.equal(advantages(rewards_PS), right)


def test_a_completion_is_scored_once_per_prompt_and_not_without_an_advantage() -> None:
    found = candidates(
        [(1,), (2,), (3,)],
        [[(4,), (5,), (4,)], [(4,), (4,), (5, 6)], [(4,), (5,), (6,)]],
        torch.tensor([[1.0, 0, 1], [0, 0, 1], [2, 2, 2]]),
    )
    assert found.completions == [((1,), (4,)), ((1,), (5,)), ((2,), (4,)), ((2,), (5, 6))]
    assert found.prompt_J.tolist() == [0, 0, 1, 1]
    assert found.count_J.tolist() == [2, 1, 2, 1]
    assert found.advantage_J.tolist() == pytest.approx([1 / 3, -2 / 3, -1 / 3, 2 / 3])
    assert candidates([(1,)], [[(4,), (5,)]], torch.tensor([[1.0, 1.0]])).completions == []


@given(st.lists(st.tuples(st.integers(1, 5), st.floats(-2, 2), st.floats(-2, 2)), min_size=2, max_size=6))
def test_the_ratio_s_return_is_what_the_member_earns_above_the_weights(drawn) -> None:
    """Completions as often as they are probable: sum_y p_m(y) r(y) - sum_y p(y) r(y), exactly."""
    counts, rewards, logits = (list(column) for column in zip(*drawn, strict=True))
    p = torch.tensor(counts, dtype=torch.float64) / sum(counts)
    p_m = torch.tensor(logits, dtype=torch.float64).softmax(0)
    reward = torch.tensor(rewards, dtype=torch.float64)
    found = of_one_prompt(counts, rewards)
    if not found.completions:
        assert float((p_m - p) @ reward) == pytest.approx(0, abs=1e-6)
        return
    scored = [token_ids[0] - 1 for _, token_ids in found.completions]
    log_p_m, log_p = p_m[scored].log()[None], p[scored].log()
    value = returns(found, log_p_m, log_p, "ratio", prompts=1, samples=sum(counts))
    assert float(value) == pytest.approx(float((p_m - p) @ reward), abs=1e-6)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_near_the_weights_it_points_along_the_policy_gradient(weighting: Weighting) -> None:
    """d R / d logits where the member equals the weights: sum_y p(y) A(y) d log p(y), for completions of one token."""
    counts, rewards = [1, 3, 4], [1.0, 0.0, 0.5]
    p = torch.tensor(counts, dtype=torch.float64) / sum(counts)
    logits = p.log().requires_grad_()
    found = of_one_prompt(counts, rewards)
    log_p_m = logits.log_softmax(0)
    returns(found, log_p_m[None], log_p_m.detach(), weighting, prompts=1, samples=sum(counts)).sum().backward()
    reward = torch.tensor(rewards, dtype=torch.float64)
    advantage = reward - p @ reward
    right = p * advantage
    if weighting == "probability":  # the gradient of sum_y p(y) A(y) over distinct completions, without their counts
        each = advantage / sum(counts)
        right = p * (each - p @ each)
    assert logits.grad is not None
    assert torch.allclose(logits.grad, right, atol=1e-12)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_prompts_and_members_are_kept_apart(weighting: Weighting) -> None:
    """What a member makes of one prompt does not depend on the others, nor on other members."""
    prompts = [(1,), (2,)]
    samples, rewards_PS = [[(4, 4), (5,)], [(6,), (7, 7, 7)]], torch.tensor([[1.0, 0], [0, 3]])
    both = candidates(prompts, samples, rewards_PS)
    generator = torch.Generator().manual_seed(0)
    logprob_MN, base_N = -torch.rand(3, 7, generator=generator), -torch.rand(7, generator=generator)
    together = returns(both, logprob_MN, base_N, weighting, prompts=2, samples=2)
    assert together.shape == (3, 2)
    for p, tokens in ((0, slice(0, 3)), (1, slice(3, 7))):
        one = candidates(prompts[p : p + 1], samples[p : p + 1], rewards_PS[p : p + 1])
        for m in range(3):
            alone = returns(one, logprob_MN[m : m + 1, tokens], base_N[tokens], weighting, prompts=1, samples=2)
            assert float(alone) == pytest.approx(float(together[m, p]))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_long_completions_neither_overflow_nor_make_nan(weighting: Weighting) -> None:
    found = of_one_prompt([1, 1], [1.0, 0.0], lengths=[3000, 2000])
    base_N = torch.full((5000,), -2.0)
    logprob_MN = torch.stack((base_N - 3, base_N + 1.9, base_N.clone()))
    assert returns(found, logprob_MN, base_N, weighting, prompts=1, samples=2).isfinite().all()


def test_the_logarithm_of_a_long_completion_s_ratio_stays_linear() -> None:
    """Members that make it e^30 and e^60 times less probable are as far apart as e^0 and e^30."""
    found = of_one_prompt([1, 1], [1.0, 0.0], lengths=[300, 1])
    base_N = torch.full((301,), -2.0)
    logprob_MN = base_N - torch.tensor([[0.0], [0.1], [0.2]]) * (torch.arange(301) < 300)
    value = returns(found, logprob_MN, base_N, "logprob", prompts=1, samples=2).flatten()
    assert value.tolist() == pytest.approx([0, -30 / 4, -60 / 4], rel=1e-4)


def test_a_clipped_ratio_gains_nothing_beyond_its_range() -> None:
    """PPO's pessimistic objective: a good completion counts 1.2 at most, a bad one at least 0.8 and without bound."""
    found = of_one_prompt([1, 1], [1.0, -1.0])  # advantages 1 and -1
    ratio = torch.tensor([[1.5, 1.0], [0.5, 1.0], [1.0, 1.5], [1.0, 0.5]], dtype=torch.float64)
    value = returns(found, ratio.log(), torch.zeros(2), "clipped", prompts=1, samples=2).flatten()
    assert (2 * value).tolist() == pytest.approx([1.2 - 1, 0.5 - 1, 1 - 1.5, 1 - 0.8])


def test_divergence_is_that_of_the_distribution_sampled_from() -> None:
    """A completion that came nine times counts nine times, and each of its tokens."""
    found = of_one_prompt([9, 1], [0.0, 1.0], lengths=[2, 1])
    p, p_m = torch.tensor([0.9, 0.9, 0.1]), torch.tensor([0.8, 0.8, 0.2])
    k3 = p_m / p - 1 - (p_m / p).log()
    assert found.count_N.tolist() == [9, 9, 1]
    assert divergence(p_m.log()[None], p.log(), found.count_N) == pytest.approx(float((18 * k3[0] + k3[2]) / 19))


def test_divergence_is_zero_for_equals_and_positive_else() -> None:
    base_N = torch.tensor([-1.0, -2.0])
    assert divergence(base_N[None].repeat(3, 1), base_N) == 0
    assert divergence(torch.tensor([[-1.5, -2.0], [-1.0, -1.5]]), base_N) == pytest.approx(
        (math.exp(-0.5) - 1 + 0.5 + math.exp(0.5) - 1 - 0.5) / 4
    )
