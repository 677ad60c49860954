"""peft's LoRA layers in fewer passes over memory.

Shapes: T tokens, D inputs and E outputs of a layer, r the rank of its LoRA.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D


def quicken(model: nn.Module) -> None:
    """Make the plain LoRA layers of a PeftModel `QuickLora`; parameters, names and files stay peft's."""
    for module in model.modules():
        if type(module) is Linear and type(module.base_layer) in (nn.Linear, Conv1D):
            module.__class__ = QuickLora


class QuickLora(Linear):
    """peft's LoRA on a frozen linear layer, adding in place where peft makes three tensors (T, E) and keeps them.

    Whatever is not one plain LoRA (several at once, DoRA and other variants, dropout that acts, a base that learns,
    other dtypes, autocast) is peft's to compute.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = self._plain(x, args, kwargs)
        if name is None:
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        made: Tensor = _LowRank.apply(x, down, up, self.base_layer, self.scaling[name])
        return made

    def _plain(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """The one adapter that acts, where it is a plain LoRA."""
        own = [name for name in self.active_adapters if name in self.lora_A]
        if len(own) != 1 or self.disable_adapters or self.merged or args or kwargs:
            return None
        (name,) = own
        dropout, weights = self.lora_dropout[name], (self.lora_A[name].weight, self.lora_B[name].weight)
        odd = name in self.lora_variant or self.lora_bias[name]
        idle = isinstance(dropout, nn.Identity) or not dropout.training
        learns = any(parameter.requires_grad for parameter in self.base_layer.parameters())
        same = all(weight.dtype == x.dtype for weight in (*weights, self.base_layer.weight))
        cast = torch.is_autocast_enabled(x.device.type)
        return name if idle and same and not (odd or learns or cast) else None


class _LowRank(torch.autograd.Function):
    """y = base(x) + s (x A^T) B^T, with A (r, D) and B (E, r). Keeps x and x A^T."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, up: Tensor, base: Any, scale: float) -> Tensor:
        result: Tensor = base(x)
        states = x.reshape(-1, x.shape[-1])
        low = states @ down.t()
        result.view(-1, result.shape[-1]).addmm_(low, up.t(), alpha=scale)
        ctx.save_for_backward(states, low, down, up)
        ctx.base, ctx.scale, ctx.shape = base, scale, x.shape
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None]:
        states, low, down, up = ctx.saved_tensors
        gradient = gradient.reshape(-1, gradient.shape[-1])
        back = (gradient @ up) * ctx.scale
        of_up = (gradient.t() @ low) * ctx.scale
        of_x = None
        if ctx.needs_input_grad[0]:
            weight = ctx.base.weight
            of_x = gradient @ (weight.t() if isinstance(ctx.base, Conv1D) else weight)
            of_x = of_x.addmm_(back, down).view(ctx.shape)
        return of_x, back.t() @ states, of_up, None, None
