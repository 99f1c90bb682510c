"""What back-propagation reaches in floating point with a model of the same kind and size: the number beside ours."""

import torch
from torch import Tensor, nn

from eggroll_llm.integer.model import BYTES, WIDTH

_TEXTS, _LENGTH = 64, 100
STEP = _TEXTS * _LENGTH
"""Tokens of a step."""


class FloatModel(nn.Module):
    """A GRU and an MLP, 91,200 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(BYTES, WIDTH)
        self.recurrent = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.mlp = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.ReLU(), nn.Linear(4 * WIDTH, WIDTH)
        )
        self.head = nn.Linear(WIDTH, BYTES)

    def forward(self, text_BT: Tensor) -> Tensor:
        """Return the mean loss of the next byte in bits."""
        x_BTD = self.embed(text_BT[:, :-1])
        x_BTD = x_BTD + self.recurrent(x_BTD)[0]
        logits_BTV = self.head(x_BTD + self.mlp(x_BTD))
        return nn.functional.cross_entropy(logits_BTV.flatten(0, 1), text_BT[:, 1:].flatten()) / torch.log(
            torch.tensor(2.0)
        )


def float_bits_per_byte(train_T: Tensor, held_out_T: Tensor, *, seed: int, tokens: int) -> float:
    """Return bits per held-out byte after so many tokens of AdamW, rounded down to whole steps."""
    torch.manual_seed(seed)
    model = FloatModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01)
    for _ in range(tokens // STEP):
        start_B1 = torch.randint(len(train_T) - _LENGTH - 1, (_TEXTS, 1))
        loss = model(train_T[start_B1 + torch.arange(_LENGTH + 1)].long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(model(held_out_T[: len(held_out_T) // 64 * 64].view(64, -1).long()))
