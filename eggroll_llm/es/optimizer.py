"""The step of one weight by an optimizer of `torch.optim`, whose state may be kept anywhere between steps."""

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from eggroll_llm.es.settings import EsSettings

STATE_KEYS = {"sgd": (), "momentum": ("momentum_buffer",), "adam": ("step", "exp_avg", "exp_avg_sq")}


def take_step(
    settings: EsSettings, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], learning_rate: float
) -> dict[str, Tensor]:
    """Move a weight against its gradient, both on one device, and return the optimizer's new state.

    `state` is what the last step returned, empty before the first; its tensors may be changed in place.
    """
    if settings.optimizer == "adam":
        if not state:
            state = {"step": torch.zeros(()), "exp_avg": gradient.new_zeros(gradient.shape)}
            state["exp_avg_sq"] = state["exp_avg"].clone()
        adam(
            *([weight], [gradient], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]]),
            foreach=False,
            amsgrad=False,
            beta1=settings.adam_beta1,
            beta2=settings.adam_beta2,
            lr=learning_rate,
            weight_decay=0.0,
            eps=settings.adam_eps,
            maximize=False,
        )
        return state
    buffers = [state.get("momentum_buffer")]
    sgd(
        *([weight], [gradient], buffers),
        foreach=False,
        weight_decay=0.0,
        momentum=settings.momentum,
        lr=learning_rate,
        dampening=0.0,
        nesterov=False,
        maximize=False,
    )
    (buffer,) = buffers
    assert buffer is not None
    return {"momentum_buffer": buffer}
