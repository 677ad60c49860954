"""Passes of a causal model that keep less for their backward, and attend to short rows in fewer kernels.

Shapes: B rows of T tokens; H heads of D numbers, n to each of G keys and values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

from ..ops.kernels import Kernels, flat, kernels_of
from ..ops.masks import UNSEEN
from ..ops.split import in_tf32

ATTENTION = "peftlab_short_rows"
# Tokens of a row, beyond which the square of all scores costs more than it saves; elsewhere it was not tried.
LONGEST = {"cpu": 48, "cuda": 128}
Recompute = tuple[Callable[..., Tensor], tuple[Tensor, ...]]


def attend_in_full(model: nn.Module) -> None:
    """Let a causal model's SDPA make way for `attention`."""
    config: Any = model.config
    if config._attn_implementation == "sdpa":
        config._attn_implementation = ATTENTION


def keep_less(model: nn.Module) -> None:
    """Let a causal model keep less for its backward, which takes a little more time; what it computes stays the same.

    What a norm or an activation gives is the input of LoRA layers, which would keep it beside what it was made of.
    `QuickLora` keeps how to make it again instead (`recompute`).
    """
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm | nn.LayerNorm | nn.GELU):
            module.register_forward_hook(_remember)
        elif type(module) is LlamaMLP and module.config.hidden_act == "silu":
            module.__class__ = LeanMLP
        elif type(module) is LlamaAttention:
            module.__class__ = LeanAttention


def recompute(x: Tensor) -> Recompute:
    """A function, and the tensors of which it makes x again; of a tensor like any other, or changed since, itself."""
    noted = getattr(x, "made_by", None)
    if noted is None or noted[0] != x._version:
        return _itself, (x,)
    _, again, made_of = noted
    again.askers += 1
    return again, made_of


def _itself(x: Tensor) -> Tensor:
    return x


class _Again:
    """Makes a tensor again for all layers that read it, the first time one asks; the last one takes it away."""

    def __init__(self, make: Callable[..., Tensor]) -> None:
        self.make, self.askers = make, 0
        self.made: Tensor | None = None

    def __call__(self, *made_of: Tensor) -> Tensor:
        made: Tensor = self.make(*made_of) if self.made is None else self.made
        self.askers -= 1
        self.made = made if self.askers > 0 else None
        return made


def _note(output: Tensor, make: Callable[..., Tensor], *made_of: Tensor) -> Tensor:
    """`output`, with a note of how it was made, where a backward may ask."""
    if output.requires_grad:
        output.made_by = output._version, _Again(make), tuple(tensor.detach() for tensor in made_of)  # type: ignore[attr-defined]
    return output


def _remember(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
    _note(output, module.forward, *args)


class LeanMLP(LlamaMLP):
    """The gated layers of a Llama-class model. Of what is as wide as they are two tensors are kept for four."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        made: Tensor = self.down_proj(_note(_Gated.apply(gate, up), _gated, gate, up))
        return made


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    kernels = _kernels(gate, up)
    return F.silu(gate).mul_(up) if kernels is None else kernels.gated(gate, up)


def _kernels(*tensors: Tensor) -> Kernels | None:
    """Those that take these."""
    fitting = all(flat(x) and x.dtype == tensors[0].dtype for x in tensors)
    return kernels_of(tensors[0].device, tensors[0].dtype) if fitting else None


class _Gated(torch.autograd.Function):
    """silu(gate) up. Keeps gate and up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _gated(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        kernels = _kernels(gate, up, gradient)
        if kernels is not None:
            return kernels.gated_slopes(gate, up, gradient)
        return torch.ops.aten.silu_backward(gradient * up, gate), F.silu(gate).mul_(gradient)


class LeanAttention(LlamaAttention):
    """The attention of a Llama-class model, which turns queries and keys in half the kernels."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **given: Any,
    ) -> tuple[Tensor, Any]:
        if past_key_values is not None or position_embeddings is None:
            made: tuple[Tensor, Any] = super().forward(
                hidden_states, position_embeddings, attention_mask, past_key_values, **given
            )
            return made
        shape = *hidden_states.shape[:-1], -1, self.head_dim
        cosine, sine = (part.unsqueeze(1) for part in position_embeddings)
        query, key = (_Rotated.apply(of(hidden_states).view(shape), cosine, sine) for of in (self.q_proj, self.k_proj))
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        attend: Any = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        dropout = self.attention_dropout if self.training else 0.0
        mixed, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **given
        )
        return self.o_proj(mixed.reshape(*shape[:-2], -1)), weights


class _Rotated(torch.autograd.Function):
    """(a, b) -> (a cos - b sin, b cos + a sin) of the halves of x (B, T, H, D), as (B, H, T, D) without gaps.

    cosine, sine (B, 1, T, D), whose halves are equal (RoPE, Su et al. 2021).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return _rotated(x.transpose(1, 2), cosine, sine, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cosine, sine = (part.transpose(1, 2) for part in ctx.saved_tensors)
        return _rotated(gradient.transpose(1, 2), cosine, sine, -1.0), None, None


def _rotated(x: Tensor, cosine: Tensor, sine: Tensor, sign: float) -> Tensor:
    made = torch.result_type(x, cosine)  # that of cosines under autocast: rounded once, at the end
    turned = torch.mul(x, cosine, out=torch.empty(x.shape, dtype=made, device=x.device))
    first, second = x.chunk(2, -1)
    sine = sine.chunk(2, -1)[0]
    for half, by, value in zip(turned.chunk(2, -1), (second, first), (-sign, sign), strict=True):
        half.addcmul_(by, sine, value=value)
    return turned.to(x.dtype)


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **given: Any
) -> tuple[Tensor, None]:
    """What transformers asks of an attention: query (B, H, T, D), key and value (B, G, T, D) -> (B, T, H, D), and None.

    Whole short rows of float32 are attended to by plain products, under a mask (B, 1, T, T), True where a token is
    seen, or, without one, causally; all others by `scaled_dot_product_attention`.
    """
    length = query.shape[2]
    short = query.dtype == torch.float32 and 1 < length == key.shape[2] <= LONGEST.get(query.device.type, 0)
    plain = short and not (given.get("dropout") or given.get("softcap") or given.get("position_bias") is not None)
    seen = attention_mask
    if plain and seen is None and getattr(module, "is_causal", False) and given.get("is_causal") is not False:
        seen = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    if not plain or seen is None or seen.dtype != torch.bool:
        made: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **given)
        return made
    out: Tensor = _ShortRows.apply(query, key, value, seen, given.get("scaling") or query.shape[-1] ** -0.5)
    return out.transpose(1, 2).contiguous(), None


class _ShortRows(torch.autograd.Function):
    """softmax(s Q K^T) V with all scores at once; on CUDA its gradients in TF32. The n heads of a key are rows of one
    product.

    Keeps the probabilities, B H T^2 of them, where fused kernels keep what they gave and a key for each head.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float) -> Tensor:
        rows, heads, length, width = query.shape
        groups = rows * key.shape[1]
        q = query.reshape(groups, -1, width)
        k, v = (part.reshape(groups, length, width) for part in (key, value))
        scores = torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=scale)
        scores.view(rows, heads, length, length).masked_fill_(~seen, UNSEEN)
        probabilities = scores.softmax(-1)
        ctx.save_for_backward(q, k, v, probabilities)
        ctx.scale, ctx.shape = scale, query.shape
        return (probabilities @ v).view(query.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, probabilities = ctx.saved_tensors
        rows, _, length, width = ctx.shape
        gradient = gradient.reshape(q.shape)
        with in_tf32(q.is_cuda):
            slopes = gradient @ v.transpose(1, 2)
            of_scores = torch._softmax_backward_data(slopes, probabilities, -1, torch.float32).mul_(ctx.scale)
            of_query = (of_scores @ k).view(ctx.shape)
            of_key, of_value = of_scores.transpose(1, 2) @ q, probabilities.transpose(1, 2) @ gradient
        shape = rows, -1, length, width
        return of_query, of_key.view(shape), of_value.view(shape), None, None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, sdpa_mask)
