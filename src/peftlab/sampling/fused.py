"""The decoding step of known architectures in few kernels, for graphs on a GPU.

A step at batch 256 is some hundred kernels of a few microseconds each: what counts is how many. Projections that read
the same states are one matmul, residuals are added by the matmul that makes them, and logits land in a buffer whose
rows are aligned. Results differ from transformers' by rounding alone.

Shapes: N tokens, one a row; H heads, G heads of keys and values, D width of a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# (layer, query (N, H, D), keys and values (N, 2, G, D)) -> (N, H * D)
Attend = Callable[[int, Tensor, Tensor], Tensor]


class FusedStep(Protocol):
    """States behind the last norm, (N, width), of tokens at positions (N,); `head` (V, width) makes logits of them."""

    layers: int
    groups: int
    width: int
    head: Tensor

    def __call__(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor: ...


class FusedGpt2:
    """GPT2LMHeadModel."""

    def __init__(self, model: Any) -> None:
        self.body, self.head = model.transformer, model.lm_head.weight
        self.layers, self.groups = len(self.body.h), model.config.n_head
        self.width = model.config.n_embd // model.config.n_head

    def __call__(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        body = self.body
        x = body.wte(tokens) + body.wpe(positions)
        for layer, block in enumerate(body.h):
            own = block.attn
            parts = own.c_attn(block.ln_1(x)).view(len(x), 3, self.groups, self.width)
            x = x + own.c_proj(attend(layer, parts[:, 0], parts[:, 1:]))
            hidden = F.gelu(block.mlp.c_fc(block.ln_2(x)), approximate="tanh")
            x = x + block.mlp.c_proj(hidden)
        states: Tensor = body.ln_f(x)
        return states


class FusedLlama:
    """LlamaForCausalLM without biases. Packs weights of its model, which keep their values and may be written to."""

    def __init__(self, model: Any) -> None:
        config = model.config
        self.body, self.head = model.model, model.lm_head.weight
        self.layers, self.groups = len(self.body.layers), config.num_key_value_heads
        self.width = self.body.layers[0].self_attn.head_dim
        self.heads = config.num_attention_heads
        self.attention = [pack([b.self_attn.q_proj, b.self_attn.k_proj, b.self_attn.v_proj]) for b in self.body.layers]
        self.gates = [pack([b.mlp.gate_proj, b.mlp.up_proj]) for b in self.body.layers]

    def __call__(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        body = self.body
        x = body.embed_tokens(tokens)
        cos, sin = body.rotary_emb(x.unsqueeze(1), positions.unsqueeze(1))
        # The rotation takes (a, b) to (a cos - b sin, b cos + a sin): with the sign on the sine, b and a change places.
        first, second = sin.chunk(2, -1)
        sin, turned = torch.cat([-first, second], -1), self.heads + self.groups
        for layer, block in enumerate(body.layers):
            states = _norm(x, block.input_layernorm)
            parts = F.linear(states, self.attention[layer]).view(len(x), -1, self.width)
            rotary = parts[:, :turned]
            swapped = rotary.roll(self.width // 2, -1)
            rotary.mul_(cos).addcmul_(swapped, sin)
            pairs = parts[:, self.heads :].view(len(x), 2, self.groups, self.width)
            x.addmm_(attend(layer, parts[:, : self.heads], pairs), block.self_attn.o_proj.weight.t())
            gate, up = F.linear(_norm(x, block.post_attention_layernorm), self.gates[layer]).chunk(2, -1)
            x.addmm_(F.silu(gate).mul_(up), block.mlp.down_proj.weight.t())
        return _norm(x, body.norm)


def _norm(x: Tensor, norm: Any) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)


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
    config, name = model.config, type(model).__name__
    if any(hasattr(module, "base_layer") for module in model.modules()):
        return None  # PEFT's layers: packed weights know nothing of them, and a graph would not see them switched
    if name == "GPT2LMHeadModel":
        odd = config.add_cross_attention or config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights
        usual = config.activation_function in ("gelu_new", "gelu_pytorch_tanh")
        return FusedGpt2(model) if usual and not odd else None
    if name == "LlamaForCausalLM":
        odd = config.attention_bias or config.mlp_bias or model.model.rotary_emb.rope_type != "default"
        return FusedLlama(model) if config.hidden_act == "silu" and not odd else None
    return None
