"""PPO of stable-baselines3 on the tasks of learn.py: `python recipes/claims/rl/ppo.py cartpole` (extra `rl`).

Its defaults but for the network, that of learn.py, and eight environments at a time; observations are scaled as there.
After each rollout the policy plays 16 episodes with its likeliest actions, in neither time nor steps, and the task is
learned as it is in learn.py. Appends a line a run to ppo.jsonl. Its environments are gymnasium's, one step of one at a
time: part of the difference in time.
"""

import argparse
import time

import gymnasium
import numpy as np
import torch
from environments import ENVIRONMENTS, Environment
from learn import TESTED_ON, append, learned, parsed
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env


def scaled(environment: Environment) -> gymnasium.Env:
    """Return gymnasium's environment with observations as policies of learn.py see them."""
    scale = np.array(environment.scale, dtype=np.float32)
    bare = gymnasium.make(environment.name)
    space = gymnasium.spaces.Box(bare.observation_space.low * scale, bare.observation_space.high * scale)
    return gymnasium.wrappers.TransformObservation(bare, lambda observation: observation * scale, space)


class Tested(BaseCallback):
    """Tests the policy after each rollout, and ends the run when the task is learned or time is over."""

    def __init__(self, environment: Environment, budget: float) -> None:
        super().__init__()
        self.environment, self.budget = environment, budget
        self.seconds, self.history, self.begin = 0.0, [], time.process_time()
        self.going_on = True

    def _on_step(self) -> bool:
        return self.going_on

    def _on_rollout_start(self) -> None:
        """Test what the rollout before has taught: its update has been made by now."""
        self.seconds += time.process_time() - self.begin
        if self.num_timesteps:
            self.history.append((round(self.seconds, 3), self.num_timesteps, round(self._test(), 1)))
            self.going_on = not learned(self.history, self.environment) and self.seconds < self.budget
            print(self.environment.name, *self.history[-1], flush=True)
        self.begin = time.process_time()

    def _test(self) -> float:
        environments = make_vec_env(lambda: scaled(self.environment), TESTED_ON, seed=1000)
        observed, total, alive = environments.reset(), np.zeros(TESTED_ON), np.ones(TESTED_ON, dtype=bool)
        while alive.any():
            action, _ = self.model.predict(observed, deterministic=True)
            observed, reward, done, _ = environments.step(action)
            total += reward * alive
            alive &= ~done
        return float(total.mean())


def main() -> None:
    """Run every seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of the processor for a run")
    options = parsed(parser)
    environment = ENVIRONMENTS[options.task]
    for seed in options.seeds:
        network = {"net_arch": [options.width] * 3}
        vector = make_vec_env(lambda: scaled(environment), 8, seed=seed)
        model = PPO("MlpPolicy", vector, n_steps=256, seed=seed, policy_kwargs=network, device="cpu")
        tested = Tested(environment, options.budget)
        model.learn(10**9, callback=tested)
        line = {"task": options.task, "method": "PPO", "seed": seed, "width": options.width, "budget": options.budget}
        line |= {"solved": learned(tested.history, environment), "history": tested.history}
        append(options.out / "ppo.jsonl", line)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
