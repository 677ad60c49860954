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

from ..ops.split import SplitRows, SplitWeight, in_tf32, splits_pay
from .lean import recompute


def quicken(model: nn.Module) -> None:
    """Make the plain LoRA layers of a PeftModel `QuickLora`; parameters, names and files stay peft's."""
    for module in model.modules():
        if type(module) is Linear and type(module.base_layer) in (nn.Linear, Conv1D):
            module.__class__ = QuickLora


def split_products(model: nn.Module) -> None:
    """From now on the `QuickLora` of a frozen float32 model multiply by bfloat16 in parts, where that is sooner.

    It takes half again the bytes of their weights. Gradients are made in TF32. `ops/split.py` says what is left out.
    """
    rows = SplitRows(remember=True)
    for module in model.modules():
        base: Any = getattr(module, "base_layer", None)
        if isinstance(module, QuickLora) and base.weight.dtype == torch.float32 and splits_pay(base.weight.device):
            module.split = SplitWeight(_weight(base), base.bias, rows)


def _weight(base: Any) -> Tensor:
    """The weight (E, D) of a linear layer of either kind."""
    weight: Tensor = base.weight.t() if isinstance(base, Conv1D) else base.weight
    return weight


class QuickLora(Linear):
    """peft's LoRA on a frozen linear layer, adding in place where peft makes three tensors (T, E) and keeps them.

    Whatever is not one plain LoRA (several at once, DoRA and other variants, dropout that acts, a base that learns,
    other dtypes, autocast) is peft's to compute. Where `split_products` was called, so is the base without a LoRA here:
    a policy and its reference differ by the LoRA alone.
    """

    split: SplitWeight | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        own = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.lora_A]
        if self.merged or args or kwargs or not self._plain(x, own):
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        if own:
            down, up = self.lora_A[own[0]].weight, self.lora_B[own[0]].weight
            made: Tensor = _LowRank.apply(x, down, up, self, self.scaling[own[0]])
        else:
            made = _Frozen.apply(x, self)
        return made

    def _plain(self, x: Tensor, own: list[str]) -> bool:
        """Whether what acts is one plain LoRA, or none and the base multiplies in parts."""
        if len(own) > 1 or not own and self._parts(x) is None:
            return False
        weights = [self.base_layer.weight]
        for name in own:
            dropout = self.lora_dropout[name]
            if name in self.lora_variant or self.lora_bias[name]:
                return False
            if not isinstance(dropout, nn.Identity) and dropout.training:
                return False
            weights += [self.lora_A[name].weight, self.lora_B[name].weight]
        learns = any(parameter.requires_grad for parameter in self.base_layer.parameters())
        same = all(weight.dtype == x.dtype for weight in weights)
        return same and not learns and not torch.is_autocast_enabled(x.device.type)

    def _parts(self, x: Tensor) -> SplitWeight | None:
        """The base in parts, where x is to be multiplied so."""
        return self.split if x.dtype == torch.float32 else None

    def base(self, x: Tensor) -> Tensor:
        """What the frozen layer makes of x (..., D)."""
        parts = self._parts(x)
        made: Tensor = self.base_layer(x) if parts is None else parts(x)
        return made

    def down(self, x: Tensor, weight: Tensor) -> Tensor:
        """x (..., D) by a LoRA's weight (r, D), (T, r)."""
        parts = self._parts(x)
        made = x @ weight.t() if parts is None else parts.beside(weight, x)
        return made.view(-1, len(weight))

    def gradients(self) -> in_tf32:
        """The context in which gradients are made."""
        return in_tf32(self.split is not None)


class _LowRank(torch.autograd.Function):
    """y = base(x) + s (x A^T) B^T, with A (r, D) and B (E, r). Keeps x A^T, and x or what x is made of."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, up: Tensor, layer: QuickLora, scale: float) -> Tensor:
        result = layer.base(x)
        low = layer.down(x, down)
        result.view(-1, result.shape[-1]).addmm_(low, up.t(), alpha=scale)
        ctx.make, made_of = recompute(x)
        ctx.save_for_backward(low, down, up, *made_of)
        ctx.layer, ctx.scale, ctx.shape = layer, scale, x.shape
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None]:
        low, down, up, *made_of = ctx.saved_tensors
        states = ctx.make(*made_of).reshape(-1, down.shape[1])
        gradient = gradient.reshape(-1, gradient.shape[-1])
        with ctx.layer.gradients():
            back = (gradient @ up) * ctx.scale
            of_up = (gradient.t() @ low) * ctx.scale
            of_x = None
            if ctx.needs_input_grad[0]:
                of_x = (gradient @ _weight(ctx.layer.base_layer)).addmm_(back, down).view(ctx.shape)
            return of_x, back.t() @ states, of_up, None, None


class _Frozen(torch.autograd.Function):
    """y = base(x). Keeps nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuickLora) -> Tensor:
        ctx.layer = layer
        return layer.base(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        with ctx.layer.gradients():
            return gradient @ _weight(ctx.layer.base_layer), None
