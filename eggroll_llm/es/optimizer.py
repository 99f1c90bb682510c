"""The step of one weight by a `torch.optim` optimizer."""

from typing import Any

import torch
from torch import Tensor

from eggroll_llm.es.settings import EsSettings

STATE_KEYS = {"sgd": (), "momentum": ("momentum_buffer",), "adam": ("step", "exp_avg", "exp_avg_sq")}


def take_step(
    settings: EsSettings, parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], learning_rate: float
) -> dict[str, Tensor]:
    """Move a parameter against its gradient, both on one device, and return the optimizer's new state.

    `state` is what the last step returned, empty before the first; its tensors may be changed in place.
    """
    optimizer: torch.optim.Optimizer
    if settings.optimizer == "adam":
        betas = (settings.adam_beta1, settings.adam_beta2)
        optimizer = torch.optim.Adam([parameter], learning_rate, betas=betas, eps=settings.adam_eps, foreach=False)
    else:
        optimizer = torch.optim.SGD([parameter], learning_rate, momentum=settings.momentum, foreach=False)
    parameter.grad = gradient
    kept: dict[str, Any] = optimizer.state[parameter]
    kept.update(state)
    optimizer.step()
    parameter.grad = None
    return kept
