"""The environments of recipes/claims/rl are gymnasium's, step for step, and a population in them learns."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from eggroll_llm import ES

FOLDER = Path(__file__).parents[2] / "recipes" / "claims" / "rl"


@pytest.fixture(scope="module")
def rl():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield importlib.import_module("environments")
    sys.modules.pop("environments")


@pytest.mark.parametrize("task", ["cartpole", "acrobot", "pendulum", "mountaincar"])
def test_environments_equal_those_of_gymnasium(rl, task):
    """From each of gymnasium's states, random actions lead all rows of a batch to gymnasium's next ones."""
    gymnasium = pytest.importorskip("gymnasium")
    ours = rl.ENVIRONMENTS[task]
    theirs = gymnasium.make(ours.name, max_episode_steps=ours.limit)
    assert gymnasium.spec(ours.name).max_episode_steps == ours.limit
    random, before, rows, ended = np.random.default_rng(0), [], [], 0
    for seed in range(5):
        theirs.reset(seed=seed)
        for step in range(200):
            before.append(np.array(theirs.unwrapped.state, dtype=np.float64))
            action = random.integers(ours.actions) if ours.discrete else random.uniform(-1, 1, ours.actions)
            gain = 2.0 if task == "pendulum" else 1.0  # its torque is up to 2
            given = int(action) if ours.discrete else gain * action
            if task == "mountaincar" and step == 50:
                theirs.unwrapped.state = before[-1] = np.array([0.44, 0.05])  # the goal is far from random actions
            observed, reward, done, _cut, _info = theirs.step(given)
            rows.append((action, observed, reward, done))
            if done:
                ended += 1
                break
    actions, observed, rewards, done = (np.array(column) for column in zip(*rows, strict=True))
    state, reward, ends = ours.step(torch.tensor(np.array(before)), torch.tensor(actions))
    np.testing.assert_allclose(ours.observe(state), observed, atol=1e-5)
    np.testing.assert_allclose(reward, rewards, atol=1e-5)
    assert ends.tolist() == done.tolist()
    assert ended == {"cartpole": 5, "acrobot": 0, "pendulum": 0, "mountaincar": 5}[task]


def test_starts_are_within_those_of_gymnasium(rl):
    gymnasium = pytest.importorskip("gymnasium")
    for ours in rl.ENVIRONMENTS.values():
        theirs = gymnasium.make(ours.name)
        seen = torch.tensor(np.array([theirs.reset(seed=seed)[0] for seed in range(50)]))
        state = ours.observe(ours.reset(50, torch.Generator().manual_seed(0)))
        torch.testing.assert_close(state.amin(0), seen.amin(0), atol=0.1, rtol=0.1)
        torch.testing.assert_close(state.amax(0), seen.amax(0), atol=0.1, rtol=0.1)


@pytest.mark.parametrize("rank", [1, None])
def test_a_population_learns_to_keep_the_pole_up(rl, rank):
    environment = rl.ENVIRONMENTS["cartpole"]
    policy = rl.build_policy(environment, width=32, layers=1, seed=0)
    es = ES(policy, population=64, rank=rank, sigma=0.2, lr=0.1)
    random = torch.Generator().manual_seed(0)
    tests = environment.reset(16, torch.Generator().manual_seed(1))
    before = rl.play(environment, policy, tests)[0].mean()
    for _ in range(15):
        state = environment.reset(2, random).repeat(es.population, 1)
        with es.ask(es.members().repeat_interleave(2)):
            returns, steps = rl.play(environment, policy, state)
        assert steps == returns.sum()  # one for each step that the pole is up
        es.tell(returns.view(-1, 2))
        after = rl.play(environment, policy, tests)[0].mean()
        if after > 300:
            break
    assert before < 60
    assert after > 300
