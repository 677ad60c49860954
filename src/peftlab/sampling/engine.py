"""One token more for each row: the decoding step of architectures that we know, on a cache that rarely grows.

transformers' own forward serves any model, and builds masks, positions and caches anew at each token. Here the same
modules are called (so merged, refreshed or adapted weights are the ones that act) around an attention that writes into
a cache with room for some dozens of tokens.

Shapes: B rows, S slots of the cache, P of them the prompt's, V vocabulary, H heads, G heads of keys and values, D width
of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops.masks import UNSEEN, position_ids
from .attention import few_queries
from .slab import slot_bucket

# (layer, query (B, H, D), key and value (B, G, D)) -> (B, H * D)
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class Step:
    """Reads tokens at positions (B,) of a model with a `body` and a `head`; `attend` knows what came before."""

    body: Any
    head: Any

    def __call__(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Logits (B, V) of the next token."""
        logits: Tensor = self.head(self.states(tokens, positions, attend))
        return logits

    def states(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """The final states (B, width) that those logits are read from."""
        raise NotImplementedError


class Gpt2Step(Step):
    """GPT2LMHeadModel."""

    def __init__(self, model: Any) -> None:
        self.body, self.head = model.transformer, model.lm_head

    def states(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        body = self.body
        x = body.wte(tokens) + body.wpe(positions)
        for layer, block in enumerate(body.h):
            own = block.attn
            parts = own.c_attn(block.ln_1(x)).split(own.split_size, -1)
            query, key, value = (part.view(len(x), -1, own.head_dim) for part in parts)
            x = x + own.c_proj(attend(layer, query, key, value))
            x = x + block.mlp(block.ln_2(x))
        states: Tensor = body.ln_f(x)
        return states


class LlamaStep(Step):
    """LlamaForCausalLM, SmolLM2 among them."""

    def __init__(self, model: Any) -> None:
        self.body, self.head = model.model, model.lm_head

    def states(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        body = self.body
        x = body.embed_tokens(tokens)
        cos, sin = (part[:, 0] for part in body.rotary_emb(x.unsqueeze(1), positions.unsqueeze(1)))
        for layer, block in enumerate(body.layers):
            own, states = block.self_attn, block.input_layernorm(x)
            projections = (own.q_proj, own.k_proj, own.v_proj)
            query, key, value = (project(states).view(len(x), -1, own.head_dim) for project in projections)
            query, key = apply_rotary_pos_emb(query, key, cos, sin)
            x = x + own.o_proj(attend(layer, query, key, value))
            x = x + block.mlp(block.post_attention_layernorm(x))
        last: Tensor = body.norm(x)
        return last


def known_step(model: Any) -> Step | None:
    """The step of a model, None for one that it would not be right for."""
    config, name = model.config, type(model).__name__
    if name == "GPT2LMHeadModel":
        odd = config.add_cross_attention or config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights
        return None if odd else Gpt2Step(model)
    if name == "LlamaForCausalLM":
        return LlamaStep(model) if model.model.rotary_emb.rope_type == "default" else None
    return None


class Decoder(Protocol):
    """Logits (B, V) of the first token from the prompts, then of the next one from the token chosen.

    `states` (B, width) are what the last logits were read from; None where the decoder does not see them.
    """

    states: Tensor | None

    def first(self, ids: Tensor, mask: Tensor) -> Tensor: ...

    def next(self, tokens: Tensor) -> Tensor: ...

    def keep(self, rows: Tensor) -> None:
        """Go on with these of the rows (K,) alone."""


class CachedDecoder:
    """The decoder of a known model; the prompts go through transformers' forward."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.states: Tensor | None = None

    def first(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Read the prompts (B, P), left-padded."""
        positions = position_ids(mask)
        output = self.step.body(input_ids=ids, attention_mask=mask.long(), position_ids=positions, use_cache=True)
        layers = output.past_key_values.layers
        rows, heads, self.end, width = layers[0].keys.shape
        shape = (len(layers), rows, heads, slot_bucket(self.end + 1), width)
        self.keys, self.values = (layers[0].keys.new_zeros(shape) for _ in range(2))
        for place, layer in enumerate(layers):
            self.keys[place, :, :, : self.end] = layer.keys
            self.values[place, :, :, : self.end] = layer.values
        self.unseen = self.keys.new_full((rows, 1, 1, shape[3]), UNSEEN)
        self.unseen[:, 0, 0, : self.end].masked_fill_(mask.bool(), 0.0)
        self.positions = positions[:, -1]
        return self._logits(output.last_hidden_state[:, -1])

    def next(self, tokens: Tensor) -> Tensor:
        """Logits behind `tokens` (B,)."""
        self.positions = self.positions + 1
        self.end += 1
        if (more := slot_bucket(self.end) - self.unseen.shape[3]) > 0:
            self.keys, self.values = (F.pad(part, (0, 0, 0, more)) for part in (self.keys, self.values))
            self.unseen = F.pad(self.unseen, (0, more), value=UNSEEN)
        self.unseen[..., self.end - 1] = 0.0
        return self._logits(self.step.states(tokens, self.positions, self._attend))

    def keep(self, rows: Tensor) -> None:
        """Go on with these of the rows (K,) alone."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.unseen, self.positions = self.unseen[rows], self.positions[rows]

    def _logits(self, states: Tensor) -> Tensor:
        self.states = states
        logits: Tensor = self.step.head(states)
        return logits

    def _attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = self.keys[layer], self.values[layer]
        keys[:, :, self.end - 1], values[:, :, self.end - 1] = key, value
        # Heads that share a key stand where positions would: no key is copied for each of them. The empty slots are
        # read as well: products of keys that do not lie one behind the other take up to four times as long.
        grouped = query.view(len(query), keys.shape[1], -1, query.shape[-1])
        return few_queries(grouped, keys, values, self.unseen).reshape(len(query), -1)


class PlainDecoder:
    """The decoder of any other causal model: transformers' forward, token by token."""

    states: Tensor | None = None
    cache: Any

    def __init__(self, model: Any) -> None:
        self.model = model

    def first(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Read the prompts (B, P), left-padded."""
        self.mask, self.positions, self.cache = mask.long(), position_ids(mask), None
        return self._forward(ids)

    def next(self, tokens: Tensor) -> Tensor:
        """Logits behind `tokens` (B,)."""
        ids = tokens.unsqueeze(1)
        self.mask = torch.cat([self.mask, torch.ones_like(ids)], 1)
        self.positions = self.positions[:, -1:] + 1
        return self._forward(ids)

    def keep(self, rows: Tensor) -> None:
        """Go on with these of the rows (K,) alone."""
        self.cache.batch_select_indices(rows)
        self.mask, self.positions = self.mask[rows], self.positions[rows]

    def _forward(self, ids: Tensor) -> Tensor:
        output = self.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache = output.past_key_values
        logits: Tensor = output.logits[:, -1]
        return logits


def decoder_of(model: Any) -> Decoder:
    """The quickest decoder that is right for a model."""
    step = known_step(model)
    return CachedDecoder(step) if step else PlainDecoder(model)
