"""Scalar heads: one number per position from the model's final states."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ScalarHead(nn.Module):
    """Linear map D -> 1 in float32, under autocast too; (..., D) -> (...).

    With `std` 0 it is zero at first, so a fresh critic says 0 everywhere; else its weights are drawn from N(0, std).
    """

    def __init__(self, width: int, std: float = 0.0) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1)
        if std:
            nn.init.normal_(self.linear.weight, std=std)
        else:
            nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, states: Tensor) -> Tensor:
        with torch.autocast(states.device.type, enabled=False):
            scores: Tensor = self.linear(states.float()).squeeze(-1)
        return scores


def reward_head(width: int) -> ScalarHead:
    """A head whose first scores differ: weights from N(0, 1 / sqrt(D + 1)) (Ziegler et al. 2019, section 2.1)."""
    return ScalarHead(width, (width + 1) ** -0.5)
