"""Frozen linear layers by the quicker product, wherever no gradient is asked for."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..ops.products import product


class QuickLinear(nn.Linear):
    """nn.Linear."""

    def forward(self, x: Tensor) -> Tensor:
        plain = torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type) or x.dtype != self.weight.dtype
        return super().forward(x) if plain else product(x, self.weight, self.bias)


class QuickConv1D(Conv1D):
    """GPT-2's linear layer, whose weight is (D, E)."""

    def forward(self, x: Tensor) -> Tensor:
        plain = torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type) or x.dtype != self.weight.dtype
        made: Tensor = super().forward(x) if plain else product(x, self.weight.t(), self.bias)
        return made


QUICK = {nn.Linear: QuickLinear, Conv1D: QuickConv1D}


def quicken_linears(model: nn.Module) -> nn.Module:
    """Make the plain linear layers of a model quick; names, parameters and files stay as they are."""
    for module in model.modules():
        if type(module) in QUICK:
            module.__class__ = QUICK[type(module)]
    return model
