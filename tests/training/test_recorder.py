"""Which completions of a step are shown first."""

import math

import pytest

from eggroll_llm.engine.interface import Completion
from eggroll_llm.training.recorder import in_order_of_interest
from eggroll_llm.training.scorer import ScoredRollout
from rewards import Score

SAID = Completion(text="", token_ids=(1,), truncated=False, prompt_tokens=1)


def rollout(member: int, prompt: int, sample: int = 0, reward: float = 0.0) -> ScoredRollout:
    score = Score(reward, False, "")
    return ScoredRollout(member=member, prompt=prompt, sample=sample, completion=SAID, score=score)


@pytest.mark.parametrize("prompts", [1, 2, 3, 4, 6, 7])
@pytest.mark.parametrize("members", [1, 2, 4, 6])
def test_members_and_prompts_both_change_from_one_to_the_next(members: int, prompts: int) -> None:
    """They advance together, and a member is skipped where the same would meet again; a later step begins elsewhere."""
    rollouts = [rollout(m, p) for m in range(members) for p in range(prompts)]
    together = math.lcm(members, prompts)
    for step in (1, 5):
        shown = [(r.member, r.prompt) for r in in_order_of_interest(rollouts, step)]
        turns = range(members * prompts)
        assert shown == [((step + turn + turn // together) % members, turn % prompts) for turn in turns]


def test_a_population_whose_pairs_have_problems_of_their_own_is_ordered_in_no_time() -> None:
    """4,096 members, of which each meets 2 of 4,096 problems: what is not there is not looked for."""
    rollouts = [rollout(m, m // 2 * 2 + p) for m in range(4096) for p in range(2)]
    shown = in_order_of_interest(rollouts, 3)
    assert sorted((r.member or 0, r.prompt) for r in shown) == [(r.member, r.prompt) for r in rollouts]
    first = shown[:8]
    assert len({r.member for r in first}) == len({r.prompt for r in first}) == 8


def test_a_step_that_sampled_nothing_shows_nothing() -> None:
    assert in_order_of_interest([], 3) == []


def test_of_samples_one_is_shown_and_the_first_that_could_not_be_scored() -> None:
    rollouts = [rollout(0, 0, 0), rollout(0, 0, 1, math.nan), rollout(0, 0, 2, math.nan), rollout(1, 0, 0)]
    assert [(r.member, r.sample) for r in in_order_of_interest(rollouts, 0)] == [(0, 1), (1, 0)]
