"""The decoding step of known architectures in few kernels, for graphs on a GPU.

A step at batch 256 is some hundred kernels of a few microseconds each: what counts is how many. Projections that read
the same states are one matmul, residuals are added by the matmul that makes them, what lies between two of them is one
kernel (`between.py`), and logits land in a buffer whose rows are aligned. Results differ from transformers' by rounding
alone.

Shapes: N tokens, one a row; H heads, G heads of keys and values, D width of a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.kernels import kernels_of
from ..ops.split import ONES, SplitHead, SplitWeight, splits_pay
from .between import Between, Fused, Plain, Rotary
from .engine import known_step

# (layer, queries, keys and values (N, H + 2G, D), their rotation) -> rows (N, H * D) to be multiplied
Attend = Callable[[int, Tensor, Rotary], Tensor]


class FusedStep(Protocol):
    """States behind the last norm, rows (N, K) to be multiplied, of tokens at positions (N,); `head` (V, width) makes
    logits of them."""

    layers: int
    heads: int
    groups: int
    width: int
    head: Tensor
    between: Between

    def refresh(self) -> None:
        """Follow weights that were written to."""

    def logits(self, states: Tensor, out: Tensor) -> None:
        """states head^T (N, V) into `out` (N, V'), of which it may lower what lies behind V."""

    def __call__(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor: ...


class Products:
    """Products with a model's weights (E, D) and its head (V, D): as they lie, or in parts where that is sooner.

    `between` makes rows for the weights, `last` for the head.
    """

    def __init__(
        self, model: nn.Module, head: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
    ) -> None:
        self.written = list(model.parameters())  # weights that are packed do not count what is written to their windows
        self.head, self.weights, self.biases = head, weights, biases
        self.split: list[SplitWeight] = []
        self.split_head: SplitHead | None = None
        self.seen = self._versions()
        whole = all(size % 4 == 0 for weight in weights for size in weight.shape)
        kernels = kernels_of(head.device, head.dtype) if whole else None
        # Of bfloat16, so that the product which adds to a residual adds its bias as well.
        biased = kernels is not None and biases[0] is not None
        if biased or head.dtype == torch.float32 and splits_pay(head.device):
            self.split = [SplitWeight(weight, bias) for weight, bias in zip(weights, biases, strict=True)]
            self.split_head = SplitHead(head)
        self.between: Between = Plain()
        self.last: Between = self.between
        if kernels is not None:
            self.between = Fused(kernels, ONES if biased else 0)
            self.last = Fused(kernels, ONES if self.split_head is not None and self.split_head.biased else 0)

    def refresh(self) -> None:
        """Follow weights that were written to."""
        if self.split_head is not None and self.seen != self._versions():
            for split, weight, bias in zip(self.split, self.weights, self.biases, strict=True):
                split.renew(weight, bias)
            self.split_head.follow(self.head)
            self.seen = self._versions()

    def __call__(self, number: int, x: Tensor) -> Tensor:
        """x (N, D) by weight `number`, (N, E)."""
        return self.split[number](x) if self.split else F.linear(x, self.weights[number], self.biases[number])

    def add(self, number: int, x: Tensor, to: Tensor) -> Tensor:
        """`to` (N, E) plus the product, in place."""
        if self.split:
            return self.split[number].add(x, to)
        if self.biases[number] is None:
            return to.addmm_(x, self.weights[number].t())
        return to.add_(self(number, x))

    def logits(self, states: Tensor, out: Tensor) -> None:
        """states head^T (N, V) into `out` (N, V'), of which it may lower what lies behind V."""
        if self.split_head is None:
            torch.mm(states, self.head.t(), out=out[:, : len(self.head)])
        else:
            self.split_head(states, out[:, : len(self.split_head.weight)])

    def _versions(self) -> list[int]:
        return [parameter._version for parameter in self.written]


class FusedGpt2:
    """GPT2LMHeadModel."""

    def __init__(self, model: Any) -> None:
        self.body, self.head = model.transformer, model.lm_head.weight
        self.layers, self.heads = len(self.body.h), model.config.n_head
        self.groups, self.width = self.heads, model.config.n_embd // self.heads
        own = [p for b in self.body.h for p in (b.attn.c_attn, b.attn.c_proj, b.mlp.c_fc, b.mlp.c_proj)]
        weights = [layer.weight.detach().t() for layer in own]
        self.products = Products(model, self.head.detach(), weights, [layer.bias.detach() for layer in own])
        self.refresh, self.logits, self.between = self.products.refresh, self.products.logits, self.products.between

    def __call__(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        body, products, between = self.body, self.products, self.between
        x = body.wte(tokens) + body.wpe(positions)
        for layer, block in enumerate(body.h):
            first = 4 * layer
            made = products(first, between.norm(x, block.ln_1)).view(len(x), -1, self.width)
            products.add(first + 1, attend(layer, made, None), x)
            hidden = between.gelu(products(first + 2, between.norm(x, block.ln_2)))
            products.add(first + 3, hidden, x)
        return products.last.norm(x, body.ln_f)


class FusedLlama:
    """LlamaForCausalLM without biases. Packs weights of its model, which keep their values and may be written to."""

    def __init__(self, model: Any) -> None:
        config = model.config
        self.body, self.head = model.model, model.lm_head.weight
        self.layers, self.groups = len(self.body.layers), config.num_key_value_heads
        self.width = self.body.layers[0].self_attn.head_dim
        self.heads = config.num_attention_heads
        weights = [
            weight
            for own, mlp in ((block.self_attn, block.mlp) for block in self.body.layers)
            for weight in (
                pack([own.q_proj, own.k_proj, own.v_proj]),
                own.o_proj.weight.detach(),
                pack([mlp.gate_proj, mlp.up_proj]),
                mlp.down_proj.weight.detach(),
            )
        ]
        self.products = Products(model, self.head.detach(), weights, [None] * len(weights))
        self.refresh, self.logits, self.between = self.products.refresh, self.products.logits, self.products.between

    def __call__(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        body, products, between = self.body, self.products, self.between
        x = body.embed_tokens(tokens)
        cosine, sine = (part[:, 0] for part in body.rotary_emb(x.unsqueeze(1), positions.unsqueeze(1)))
        # The rotation takes (a, b) to (a cos - b sin, b cos + a sin): with the sign on the sine, b and a change places.
        negative, positive = sine.chunk(2, -1)
        rotary = cosine.contiguous(), torch.cat([-negative, positive], -1)
        for layer, block in enumerate(body.layers):
            first = 4 * layer
            made = products(first, between.norm(x, block.input_layernorm)).view(len(x), -1, self.width)
            products.add(first + 1, attend(layer, made, rotary), x)
            hidden = between.gated(products(first + 2, between.norm(x, block.post_attention_layernorm)))
            products.add(first + 3, hidden, x)
        return products.last.norm(x, body.norm)


@torch.no_grad()
def pack(layers: Sequence[nn.Linear]) -> Tensor:
    """One tensor that holds the weights of these layers one below the other; they become windows of it.

    Windows of one stay where they are, so that a second decoder of a model leaves the first one's weights in place.
    """
    weights = [layer.weight for layer in layers]
    first, ends = weights[0], [weight.data_ptr() + weight.nbytes for weight in weights]
    if all(w.data_ptr() == e and _storage(w) == _storage(first) for w, e in zip(weights[1:], ends, strict=False)):
        return first.detach().as_strided((sum(map(len, weights)), first.shape[1]), first.stride())
    packed = torch.cat([weight.detach() for weight in weights])
    for layer, window in zip(layers, packed.split([len(weight) for weight in weights]), strict=True):
        layer.weight.data = window
    return packed


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def fused_step(model: Any) -> FusedStep | None:
    """The step of a model, None for one that it would not be right for."""
    if known_step(model) is None or any(hasattr(module, "base_layer") for module in model.modules()):
        return None  # PEFT's layers: packed weights know nothing of them, and a graph would not see them switched
    config = model.config
    if type(model).__name__ == "GPT2LMHeadModel":
        return FusedGpt2(model) if config.activation_function in ("gelu_new", "gelu_pytorch_tanh") else None
    biased = config.attention_bias or config.mlp_bias
    return FusedLlama(model) if config.hidden_act == "silu" and not biased else None
