"""Scalar heads: one number per position from the model's final states."""

from __future__ import annotations

from torch import Tensor, nn


class ScalarHead(nn.Module):
    """Linear map D -> 1 in float32. Zero at first, so a fresh critic says 0 everywhere; (..., D) -> (...)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, states: Tensor) -> Tensor:
        scores: Tensor = self.linear(states.float()).squeeze(-1)
        return scores
