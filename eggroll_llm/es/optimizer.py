"""The optimizer that takes the step, and schedules of sigma and the learning rate."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

STATE_KEYS = {"sgd": (), "momentum": ("momentum_buffer",), "adam": ("step", "exp_avg", "exp_avg_sq")}


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """The `torch.optim` optimizer that takes the step. Raises ValueError on values out of range."""

    name: Literal["sgd", "momentum", "adam"] = "sgd"
    """Plain SGD, SGD with momentum, or Adam."""
    momentum: float = 0.9
    """Momentum of "momentum"."""
    adam_beta1: float = 0.9
    """Decay of Adam's mean of gradients."""
    adam_beta2: float = 0.999
    """Decay of Adam's mean of squared gradients."""
    adam_eps: float = 1e-8
    """Added to Adam's denominator."""

    def __post_init__(self) -> None:
        if self.name not in STATE_KEYS:
            raise ValueError(f"optimizer = {self.name!r}: must be one of {', '.join(STATE_KEYS)}")
        for key in ("momentum", "adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"{key} = {getattr(self, key)}: must be at least 0 and less than 1")
        if not 1e-16 <= self.adam_eps < math.inf:
            raise ValueError(f"adam_eps = {self.adam_eps}: must be finite and at least 1e-16")

    def build(self, parameter: Tensor) -> torch.optim.Optimizer:
        """Return an optimizer of one parameter; its learning rate is set before each step. Plain SGD does without."""
        if self.name == "adam":
            betas = (self.adam_beta1, self.adam_beta2)
            return torch.optim.Adam([parameter], lr=1.0, betas=betas, eps=self.adam_eps, foreach=False)
        return torch.optim.SGD([parameter], lr=1.0, momentum=self.momentum, foreach=False)


def schedule(
    kind: Literal["constant", "linear", "cosine"], start: float, step: int, steps: int, end_fraction: float
) -> float:
    """Return the value at `step` (from 0) of `steps`: first `start`, at the last `start * end_fraction`.

    "linear" goes there in a straight line, "cosine" along half a period. Raises ValueError on an unknown
    kind, and when a kind other than "constant" is asked for in a run without a number of steps.
    """
    if kind == "constant":
        return start
    if steps < 1:
        raise ValueError(f"schedule = {kind!r}: needs steps above 0; set steps, or the schedule to constant")
    progress = min(step / max(1, steps - 1), 1.0)
    if kind == "linear":
        return start * (1 - (1 - end_fraction) * progress)
    if kind == "cosine":
        return start * (end_fraction + (1 - end_fraction) * (1 + math.cos(math.pi * progress)) / 2)
    raise ValueError(f"schedule = {kind!r}: must be one of constant, linear, cosine")
