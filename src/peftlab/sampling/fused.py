"""The decoding step of known architectures in few kernels, for graphs on a GPU.

A step at batch 256 is some hundred kernels of a few microseconds each: what counts is how many. Projections that read
the same states are one matmul, residuals are added by the matmul that makes them, what lies between two of them is one
kernel (`between.py`), and logits land in a buffer whose rows are aligned. Results differ from transformers' by rounding
alone.

Shapes: N tokens, one a row; H heads, G heads of keys and values, D width of a head, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..models.packed import PackedWeights, packable, packed_of
from ..ops.split import ONES
from .between import Between, Fused, Plain, Rotary
from .engine import known_step

# (layer, queries, keys and values (N, H + 2G, D), their rotation) -> rows (N, H * D) to be multiplied
Attend = Callable[[int, Tensor, Rotary], Tensor]


class Products:
    """Products with a model's packed weights and its head: as they lie, or in parts where that is sooner.

    `between` makes rows for the weights, `last` for the head.
    """

    def __init__(self, packed: PackedWeights) -> None:
        self.packed = packed
        self.between: Between = Plain()
        self.last: Between = self.between
        if packed.kernels is not None:
            self.between = Fused(packed.kernels, ONES if packed.biased else 0)
            self.last = Fused(packed.kernels, ONES if packed.split_head is not None and packed.split_head.biased else 0)

    def __call__(self, number: int, x: Tensor) -> Tensor:
        """x (N, D) by weight `number`, (N, E)."""
        packed = self.packed
        return packed.split[number](x) if packed.split else F.linear(x, packed.weights[number], packed.biases[number])

    def add(self, number: int, x: Tensor, to: Tensor) -> Tensor:
        """`to` (N, E) plus the product, in place."""
        if self.packed.split:
            return self.packed.split[number].add(x, to)
        if self.packed.biases[number] is None:
            return to.addmm_(x, self.packed.weights[number].t())
        return to.add_(self(number, x))

    def logits(self, states: Tensor, out: Tensor) -> None:
        """states head^T (N, V) into `out` (N, V'), of which it may lower what lies behind V."""
        head, split = self.packed.head, self.packed.split_head
        if split is None:
            torch.mm(states, head.t(), out=out[:, : len(head)])
        else:
            split(states, out[:, : len(split.weight)])

    def rows_of_states(self, *size: int) -> Tensor:
        """A place (*size, k) for the first k numbers of rows (N, K) for the head, which tell the states that they are
        made of."""
        head = self.packed.head
        if isinstance(self.last, Fused) and head.dtype == torch.float32:  # high and low parts
            return head.new_empty(*size, 2 * head.shape[1], dtype=torch.bfloat16)
        return head.new_empty(*size, head.shape[1])

    def states(self, rows: Tensor) -> Tensor:
        """Those states, (..., width) in float32, of (..., k)."""
        width = self.packed.head.shape[1]
        first = rows[..., :width].float()
        return first + rows[..., width:] if rows.shape[-1] > width else first


class FusedStep(ABC):
    """States behind the last norm, rows (N, K) to be multiplied, of tokens at positions (N,); `head` (V, width) makes
    logits of them.

    `refresh` follows weights that were written to; `logits`, `rows_of_states` and `states` are those of `Products`.
    """

    layers: int
    heads: int
    groups: int
    width: int

    def __init__(self, model: Any) -> None:
        self.products = products = Products(packed_of(model))
        self.head, self.between = products.packed.head, products.between
        self.refresh, self.logits = products.packed.follow, products.logits
        self.rows_of_states, self.states = products.rows_of_states, products.states

    @abstractmethod
    def __call__(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor: ...


class FusedGpt2(FusedStep):
    """GPT2LMHeadModel."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.body = model.transformer
        self.layers, self.heads = len(self.body.h), model.config.n_head
        self.groups, self.width = self.heads, model.config.n_embd // self.heads

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


class FusedLlama(FusedStep):
    """LlamaForCausalLM without biases. Packs weights of its model, which keep their values and may be written to."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        config = model.config
        self.body = model.model
        self.layers, self.groups = len(self.body.layers), config.num_key_value_heads
        self.width = self.body.layers[0].self_attn.head_dim
        self.heads = config.num_attention_heads

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


def fused_step(model: Any) -> FusedStep | None:
    """The step of a model, None for one that it would not be right for."""
    if known_step(model) is None or any(hasattr(module, "base_layer") for module in model.modules()):
        return None  # PEFT's layers: packed weights know nothing of them, and a graph would not see them switched
    config = model.config
    if type(model).__name__ == "GPT2LMHeadModel":
        return FusedGpt2(model) if config.activation_function in ("gelu_new", "gelu_pytorch_tanh") else None
    return FusedLlama(model) if config.hidden_act == "silu" and packable(model) else None
