"""Environments of gymnasium in torch, for a whole population at once: CartPole-v1, Acrobot-v1, Pendulum-v1 and
MountainCarContinuous-v0, equal step for step (tests/recipes/test_rl.py).

An environment is pure functions over a state [N, S]: no object remembers anything, so that all members of a population
can start from the same states. `scale` brings observations to about 1; gymnasium does not have it.
"""

import math
from itertools import pairwise
from typing import Protocol

import torch
from torch import Generator, Tensor, nn

Step = tuple[Tensor, Tensor, Tensor]
"""State [N, S], reward [N] and whether the episode has ended [N]."""


class Environment(Protocol):
    """What a task is made of."""

    name: str
    """Its name in gymnasium."""
    actions: int
    """Choices, or dimensions of a continuous action in [-1, 1]."""
    discrete: bool
    limit: int
    """Steps after which an episode ends anyway."""
    scale: tuple[float, ...]
    """Factor of each observation where a policy sees it."""
    solved: float
    """Mean return of a policy that has learned the task."""

    def reset(self, count: int, generator: Generator) -> Tensor:
        """Return start states."""
        ...

    def observe(self, state: Tensor) -> Tensor:
        """Return observations."""
        ...

    def step(self, state: Tensor, action: Tensor) -> Step:
        """Return what an action, [N] or [N, actions], leads to."""
        ...


def uniform(low: tuple[float, ...], high: tuple[float, ...], count: int, generator: Generator) -> Tensor:
    """Return [count, len(low)] random values."""
    a, b = torch.tensor(low), torch.tensor(high)
    return a + (b - a) * torch.rand(count, len(low), generator=generator)


def wrapped(angle: Tensor) -> Tensor:
    """Return an angle between -pi and pi."""
    return (angle + math.pi) % (2 * math.pi) - math.pi


class CartPole:
    """Keep a pole upright on a cart by pushing it left or right."""

    name, actions, discrete, limit, solved = "CartPole-v1", 2, True, 500, 475.0
    scale = (1.0, 1.0, 1.0, 1.0)

    def reset(self, count: int, generator: Generator) -> Tensor:
        """Return start states (position, speed, angle, turn)."""
        return uniform((-0.05,) * 4, (0.05,) * 4, count, generator)

    def observe(self, state: Tensor) -> Tensor:
        """Return the state."""
        return state

    def step(self, state: Tensor, action: Tensor) -> Step:
        """Push by 10 N for 0.02 s."""
        x, speed, angle, turn = state.unbind(1)
        push = (20.0 * action - 10.0 + 0.05 * turn**2 * angle.sin()) / 1.1
        spin = (9.8 * angle.sin() - angle.cos() * push) / (0.5 * (4.0 / 3.0 - 0.1 * angle.cos() ** 2 / 1.1))
        pull = push - 0.05 * spin * angle.cos() / 1.1
        state = state + 0.02 * torch.stack((speed, pull, turn, spin), 1)
        done = (state[:, 0].abs() > 2.4) | (state[:, 2].abs() > 12 * 2 * math.pi / 360)
        return state, torch.ones_like(x), done


class Acrobot:
    """Swing the end of a double pendulum above a line by a torque between the links."""

    name, actions, discrete, limit, solved = "Acrobot-v1", 3, True, 500, -100.0
    scale = (1.0, 1.0, 1.0, 1.0, 0.25, 0.25)

    def reset(self, count: int, generator: Generator) -> Tensor:
        """Return start states (two angles, their two speeds)."""
        return uniform((-0.1,) * 4, (0.1,) * 4, count, generator)

    def observe(self, state: Tensor) -> Tensor:
        """Return cosines, sines and speeds."""
        a, b, speed_a, speed_b = state.unbind(1)
        return torch.stack((a.cos(), a.sin(), b.cos(), b.sin(), speed_a, speed_b), 1)

    def step(self, state: Tensor, action: Tensor) -> Step:
        """Integrate 0.2 s in one step of Runge and Kutta."""
        torque, h = action - 1.0, 0.2
        k1 = self._slope(state, torque)
        k2 = self._slope(state + h / 2 * k1, torque)
        k3 = self._slope(state + h / 2 * k2, torque)
        k4 = self._slope(state + h * k3, torque)
        a, b, speed_a, speed_b = (state + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)).unbind(1)
        a, b = wrapped(a), wrapped(b)
        limited = speed_a.clamp(-4 * math.pi, 4 * math.pi), speed_b.clamp(-9 * math.pi, 9 * math.pi)
        done = -a.cos() - (b + a).cos() > 1.0
        return torch.stack((a, b, *limited), 1), done.to(a.dtype) - 1.0, done

    @staticmethod
    def _slope(state: Tensor, torque: Tensor) -> Tensor:
        a, b, speed_a, speed_b = state.unbind(1)
        d1, d2 = 3.5 + b.cos(), 1.25 + 0.5 * b.cos()
        phi2 = 4.9 * (a + b - math.pi / 2).cos()
        phi1 = -(0.5 * speed_b**2 + speed_b * speed_a) * b.sin() + 14.7 * (a - math.pi / 2).cos() + phi2
        spin_b = (torque + d2 / d1 * phi1 - 0.5 * speed_a**2 * b.sin() - phi2) / (1.25 - d2**2 / d1)
        return torch.stack((speed_a, speed_b, -(d2 * spin_b + phi1) / d1, spin_b), 1)


class Pendulum:
    """Swing a pendulum up with a torque that cannot lift it, and hold it there."""

    name, actions, discrete, limit, solved = "Pendulum-v1", 1, False, 200, -250.0
    scale = (1.0, 1.0, 0.25)

    def reset(self, count: int, generator: Generator) -> Tensor:
        """Return start states (angle, speed)."""
        return uniform((-math.pi, -1.0), (math.pi, 1.0), count, generator)

    def observe(self, state: Tensor) -> Tensor:
        """Return cosine, sine and speed."""
        return torch.stack((state[:, 0].cos(), state[:, 0].sin(), state[:, 1]), 1)

    def step(self, state: Tensor, action: Tensor) -> Step:
        """Turn by up to 2 N m for 0.05 s."""
        angle, speed = state.unbind(1)
        torque = 2 * action[:, 0].clamp(-1, 1)
        cost = wrapped(angle) ** 2 + 0.1 * speed**2 + 0.001 * torque**2
        speed = (speed + (15 * angle.sin() + 3 * torque) * 0.05).clamp(-8, 8)
        return torch.stack((angle + 0.05 * speed, speed), 1), -cost, torch.zeros_like(angle, dtype=torch.bool)


class MountainCarContinuous:
    """Drive an engine that is too weak out of a valley, by swinging."""

    name, actions, discrete, limit, solved = "MountainCarContinuous-v0", 1, False, 999, 90.0
    scale = (1.0, 14.0)

    def reset(self, count: int, generator: Generator) -> Tensor:
        """Return start states (position, speed)."""
        return uniform((-0.6, 0.0), (-0.4, 0.0), count, generator)

    def observe(self, state: Tensor) -> Tensor:
        """Return the state."""
        return state

    def step(self, state: Tensor, action: Tensor) -> Step:
        """Drive one step; the goal is worth 100, each step costs 0.1 of the action's square."""
        position, speed = state.unbind(1)
        force = action[:, 0].clamp(-1, 1)
        speed = (speed + 0.0015 * force - 0.0025 * (3 * position).cos()).clamp(-0.07, 0.07)
        position = (position + speed).clamp(-1.2, 0.6)
        speed = torch.where((position == -1.2) & (speed < 0), 0.0, speed)
        done = (position >= 0.45) & (speed >= 0)
        return torch.stack((position, speed), 1), 100.0 * done - 0.1 * force**2, done


ENVIRONMENTS: dict[str, Environment] = {
    "cartpole": CartPole(),
    "acrobot": Acrobot(),
    "pendulum": Pendulum(),
    "mountaincar": MountainCarContinuous(),
}


def build_policy(environment: Environment, width: int, layers: int, seed: int) -> nn.Sequential:
    """Return a network of hidden layers with tanh, orthogonal, whose first actions are all about the same."""
    torch.manual_seed(seed)
    sizes = [len(environment.scale), *[width] * layers]
    parts: list[nn.Module] = []
    for inside, out in pairwise(sizes):
        parts += [nn.Linear(inside, out), nn.Tanh()]
    parts.append(nn.Linear(width, environment.actions))
    if not environment.discrete:
        parts.append(nn.Tanh())
    for layer in parts:
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight, 0.1 if layer.out_features == environment.actions else 1.0)
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*parts)


@torch.no_grad()
def play(environment: Environment, policy: nn.Module, state: Tensor) -> tuple[Tensor, int]:
    """Return the return [N] of an episode from each state, and the steps of all until their ends.

    The rows of ended episodes are computed until the last one has ended: a batch keeps its rows.
    """
    scale = torch.tensor(environment.scale)
    total, alive, steps = torch.zeros(len(state)), torch.ones(len(state), dtype=torch.bool), 0
    for _ in range(environment.limit):
        action = policy(environment.observe(state) * scale)
        state, reward, done = environment.step(state, action.argmax(1) if environment.discrete else action)
        total += reward * alive
        steps += int(alive.sum())
        alive = alive & ~done
        if not alive.any():
            break
    return total, steps
