"""peft's LoRA layers in fewer passes over memory.

Shapes: T tokens, D inputs and E outputs of a layer, r the rank of its LoRA.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ..ops.split import SplitRows, SplitWeight, in_tf32, product_dtype, splits_pay
from .lean import recompute
from .packed import matrix

CASTABLE = {torch.float32, torch.bfloat16, torch.float16}  # what autocast rounds


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
            module.split = SplitWeight(matrix(base), base.bias, rows)


def round_gradients(model: nn.Module, dtype: torch.dtype) -> None:
    """From now on the gradients of what goes into the `QuickLora` of a frozen float32 model are products in `dtype`."""
    for module in model.modules():
        if isinstance(module, QuickLora):
            module.gradient_dtype = dtype


@dataclass
class Merged:
    """A layer's weight (E, D) with the adapter in it, and the same in parts: what the layer multiplies by while this
    `acts`, in place of base and LoRA. Whoever changes the adapter writes it there."""

    weight: Tensor
    split: SplitWeight
    acts: bool = False


class QuickLora(Linear):
    """peft's LoRA on a frozen linear layer, adding in place where peft makes three tensors (T, E) and keeps them.

    Whatever is not one plain LoRA (several at once, DoRA and other variants, dropout that acts, a base that learns,
    other dtypes) is peft's to compute. Under autocast all products are of its dtype, of an input that is rounded once.
    There, and where `split_products` was called, the base without a LoRA is computed here too: a policy and its
    reference differ by the LoRA alone.
    """

    split: SplitWeight | None = None
    merged_weight: Merged | None = None
    gradient_dtype: torch.dtype | None = None  # by default that of the gradient
    _rounded: tuple[tuple[int, int, torch.dtype], Tensor] | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        own = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.lora_A]
        if self.merged or args or kwargs or not self._plain(x, own):
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        if own:
            down, up = self.lora_A[own[0]].weight, self.lora_B[own[0]].weight
            merged = self.merged_weight
            if merged is not None and merged.acts and self._parts(x) is not None:
                return _ReadMerged.apply(x, down, up, self, self.scaling[own[0]], merged)
            made: Tensor = _LowRank.apply(x, down, up, self, self.scaling[own[0]])
        else:
            made = _Frozen.apply(x, self)
        return made

    def _plain(self, x: Tensor, own: list[str]) -> bool:
        """Whether what acts is one plain LoRA, or none and the base is not multiplied as peft would."""
        autocast = torch.is_autocast_enabled(x.device.type)
        if len(own) > 1 or not own and self._parts(x) is None and not autocast:
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
        fitting = CASTABLE if autocast else {x.dtype}
        return not learns and all(tensor.dtype in fitting for tensor in (x, *weights))

    def _parts(self, x: Tensor) -> SplitWeight | None:
        """The base in parts, where x is to be multiplied so."""
        return self.split if product_dtype(x) == torch.float32 else None

    def base(self, x: Tensor) -> Tensor:
        """What the frozen layer makes of x (..., D), in the dtype of x."""
        layer: Any = self.base_layer
        parts = self._parts(x)
        if parts is not None:
            return parts(x)
        if x.dtype != layer.weight.dtype:
            return F.linear(x, self.weight_in(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))
        made: Tensor = layer(x)
        return made

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """The frozen weight (E, D), rounded once for all passes."""
        weight = matrix(self.base_layer)
        if weight.dtype == dtype:
            return weight
        of = weight.data_ptr(), weight._version, dtype
        if self._rounded is None or self._rounded[0] != of:
            self._rounded = of, weight.to(dtype)
        return self._rounded[1]

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
        states = x.to(product_dtype(x))
        with torch.autocast(x.device.type, enabled=False):
            result = layer.base(states)
            low = layer.down(states, down.to(states.dtype))
            result.view(-1, result.shape[-1]).addmm_(low, up.to(states.dtype).t(), alpha=scale)
        ctx.make, made_of = recompute(states)
        ctx.save_for_backward(low, down, up, *made_of)
        ctx.layer, ctx.scale, ctx.shape, ctx.dtype = layer, scale, x.shape, x.dtype
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None]:
        low, down, up, *made_of = ctx.saved_tensors
        states = ctx.make(*made_of).reshape(-1, down.shape[1])
        gradient = gradient.reshape(-1, gradient.shape[-1])
        with ctx.layer.gradients():
            back = _scaled(gradient, up.to(gradient.dtype), ctx.scale)
            of_up = _scaled(gradient.t(), low, ctx.scale)
            of_x = None
            if ctx.needs_input_grad[0]:
                of_x = _before(gradient, ctx.layer).addmm_(back, down.to(gradient.dtype)).view(ctx.shape).to(ctx.dtype)
            return of_x, (back.t() @ states).to(down.dtype), of_up.to(up.dtype), None, None


class _ReadMerged(torch.autograd.Function):
    """y = (W + s B A) x + b by one product, with the gradients of A (r, D) and B (E, r). Keeps x, or what it is made
    of."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, down: Tensor, up: Tensor, layer: QuickLora, scale: float, merged: Merged
    ) -> Tensor:
        ctx.make, made_of = recompute(x)
        ctx.save_for_backward(down, up, *made_of)
        ctx.layer, ctx.scale, ctx.merged, ctx.shape = layer, scale, merged, x.shape
        return merged.split(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None, None]:
        down, up, *made_of = ctx.saved_tensors
        states = ctx.make(*made_of).reshape(-1, down.shape[1])
        gradient = gradient.reshape(-1, gradient.shape[-1])
        with ctx.layer.gradients():
            of_down = _scaled(gradient, up, ctx.scale).t() @ states
            of_up = gradient.t() @ _scaled(states, down.t(), ctx.scale)
            of_x = (gradient @ ctx.merged.weight).view(ctx.shape) if ctx.needs_input_grad[0] else None
            return of_x, of_down, of_up, None, None, None


def _scaled(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale a b, by one kernel."""
    return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scale)


class _Frozen(torch.autograd.Function):
    """y = base(x). Keeps nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuickLora) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        states = x.to(product_dtype(x))
        with torch.autocast(x.device.type, enabled=False):
            return layer.base(states)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        with ctx.layer.gradients():
            return _before(gradient, ctx.layer).to(ctx.dtype), None


def _before(gradient: Tensor, layer: QuickLora) -> Tensor:
    """The gradient (..., D) of a frozen layer's input, of that (..., E) of what it gives."""
    dtype = layer.gradient_dtype or gradient.dtype
    return (gradient.to(dtype) @ layer.weight_in(dtype)).to(gradient.dtype)
