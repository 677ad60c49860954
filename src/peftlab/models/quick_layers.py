"""Layers of transformers' models in fewer passes over memory, and frozen ones by the quicker product.

Which way a layer goes depends on what it is, never on whether gradients are asked for: policy and reference are the
same function of the same base bit for bit, with and without them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.activations import NewGELUActivation
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from ..ops.products import product


class FrozenProduct(torch.autograd.Function):
    """x W^T + b of a weight (E, D) and a bias without gradients. Keeps nothing of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return product(gradient, ctx.weight.t()), None, None


def _frozen(layer: nn.Linear | Conv1D, x: Tensor) -> bool:
    learns = any(parameter.requires_grad for parameter in layer.parameters())
    return not learns and x.dtype == layer.weight.dtype and not torch.is_autocast_enabled(x.device.type)


class QuickLinear(nn.Linear):
    """nn.Linear."""

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = FrozenProduct.apply(x, self.weight, self.bias) if _frozen(self, x) else super().forward(x)
        return made


class QuickConv1D(Conv1D):
    """GPT-2's linear layer, whose weight is (D, E)."""

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = FrozenProduct.apply(x, self.weight.t(), self.bias) if _frozen(self, x) else super().forward(x)
        return made


class QuickRMSNorm(LlamaRMSNorm):
    """The norm of Llama-class models in one kernel for transformers' six. Last bits differ."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight = self.weight.to(hidden_states.dtype)
        return F.rms_norm(hidden_states, weight.shape, weight, self.variance_epsilon)


QUICK = {nn.Linear: QuickLinear, Conv1D: QuickConv1D, LlamaRMSNorm: QuickRMSNorm}
LINEAR = (nn.Linear, Conv1D, QuickLinear, QuickConv1D)


def quicken_layers(model: nn.Module) -> nn.Module:
    """Make the plain layers of a model quick; names, parameters and files stay as they are.

    GELU by tanh, as GPT-2 and T5 have it, becomes torch's: one kernel for transformers' eight, other last bits.
    """
    for module in list(model.modules()):
        if type(module) in QUICK:
            module.__class__ = QUICK[type(module)]
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))
    return model
