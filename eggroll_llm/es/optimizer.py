"""The `torch.optim` optimizer that takes the step of one weight."""

import torch
from torch import Tensor

from eggroll_llm.es.settings import EsSettings

STATE_KEYS = {"sgd": (), "momentum": ("momentum_buffer",), "adam": ("step", "exp_avg", "exp_avg_sq")}


def build_optimizer(settings: EsSettings, parameter: Tensor) -> torch.optim.Optimizer:
    """Return an optimizer of one parameter; its learning rate is set before each step. Plain SGD does without."""
    if settings.optimizer == "adam":
        betas = (settings.adam_beta1, settings.adam_beta2)
        return torch.optim.Adam([parameter], lr=1.0, betas=betas, eps=settings.adam_eps, foreach=False)
    return torch.optim.SGD([parameter], lr=1.0, momentum=settings.momentum, foreach=False)
