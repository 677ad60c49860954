"""Prefix tuning of T5-class models as in Li & Liang 2021: keys and values that every attention sees besides its own.

Each layer of the encoder's self-attention, the decoder's self-attention and its cross-attention gets P trained pairs of
key and value in front of those of the tokens. (PEFT's prefix reaches only the decoder's self-attention.) They enter
behind the key/value cache, in the attention function, so that cache, beams, lengths and positions are those of the bare
model. A prefix has no position: its bias is 0, and the bias of the tokens stays what it was.

Two departures from the paper. The prefix starts as the keys and values of real words, taken in every layer from one
pass of the frozen model; the paper starts so only where rows are few. And the reparametrization is added to that table
instead of replacing it: its last layer starts at 0, so that the start is the same with and without it. It is what makes
training quick: Adam moves a table's entry by about `lr` a step, and what an MLP puts out by many times that.

Shapes: L layers, H heads, P prefix positions, D width of a head; keys and values are (L, 2, H, P, D).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..errors import UserError

IMPLEMENTATION = "peftlab_prefix"  # the name of `_attend` among the attention functions of transformers
PREFIX_TYPE = "PEFTLAB_PREFIX"  # `peft_type` of an adapter folder: PEFT refuses it instead of reading it wrongly
PREFIX_WEIGHTS = "prefix.safetensors"
ENCODER, DECODER, CROSS = KINDS = ("encoder", "decoder", "cross")


class Prefix(nn.Module):
    """The prefixes of a model, by kind of attention. `start`: {kind: (L, 2, H, P, D)}; `hidden` 0 trains the table."""

    def __init__(self, start: Mapping[str, Tensor], width: int, hidden: int) -> None:
        super().__init__()
        self.encoder, self.decoder, self.cross = (KeyValues(start[kind], width, hidden) for kind in KINDS)

    def parts(self) -> dict[str, KeyValues]:
        """The keys and values of each kind of attention."""
        return {ENCODER: self.encoder, DECODER: self.decoder, CROSS: self.cross}

    @torch.no_grad()
    def fold(self) -> None:
        """Drop the reparametrization: the same keys and values, as a table. What is saved and what writes is folded."""
        for part in self.parts().values():
            part.fold()

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        """Keys and values by kind of attention, (L, 2, H, P, D)."""
        return {kind: part.all_layers() for kind, part in self.parts().items()}


class KeyValues(nn.Module):
    """Keys and values of one kind of attention: a table, plus what an MLP makes of an embedding, layer by layer."""

    def __init__(self, start: Tensor, width: int, hidden: int) -> None:
        super().__init__()
        self.table = nn.Parameter(start.detach().float().clone())
        layers, _, heads, length, size = start.shape
        self.mlp = Reparametrization(length, width, hidden, layers, 2 * heads * size) if hidden else None
        self.to(start.device)

    def forward(self, layer: int) -> Tensor:
        """Keys and values of one layer, (2, H, P, D)."""
        states: Tensor = self.table[layer]
        if self.mlp is None:
            return states
        _, heads, length, size = states.shape
        added: Tensor = self.mlp(layer)
        return states + added.view(length, 2, heads, size).permute(1, 2, 0, 3)

    def all_layers(self) -> Tensor:
        """(L, 2, H, P, D)."""
        return torch.stack([self(layer) for layer in range(len(self.table))])

    def fold(self) -> None:
        """Put what the MLP adds into the table, and drop the MLP."""
        self.table.copy_(self.all_layers())
        self.mlp = None


class Reparametrization(nn.Module):
    """tanh(E W + b) U_layer: (P, `width`) -> (P, `hidden`) -> (P, `out`), with U = 0 at the start."""

    def __init__(self, length: int, width: int, hidden: int, layers: int, out: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(length, width))
        self.down = nn.Linear(width, hidden)
        self.up = nn.Parameter(torch.zeros(layers, hidden, out))

    def forward(self, layer: int) -> Tensor:
        """What is added to the table of one layer, (P, `out`)."""
        added: Tensor = torch.tanh(self.down(self.embedding)) @ self.up[layer]
        return added


def attach_prefix(model: Any, start: Mapping[str, Tensor], hidden: int = 0) -> Prefix:
    """Give a T5 model a prefix, as `model.prefix`, in place; only the prefix has gradients if the model is frozen.

    `start` comes from `word_states` or from `Prefix.tensors`; P = 0 leaves the model as it was. Raises UserError where
    the model is no T5.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    places = attentions(model)
    AttentionInterface.register(IMPLEMENTATION, _attend)
    AttentionMaskInterface.register(IMPLEMENTATION, _mask)
    for part in (model, model.encoder, model.decoder):  # before transformers 5.2x a model does not tell its parts
        part.set_attn_implementation(IMPLEMENTATION)
    model.prefix = Prefix(start, model.config.d_model, hidden)
    prefix: Prefix = model.prefix
    for kind, part in prefix.parts().items():
        for layer, attention in enumerate(places[kind]):
            # A partial, no module: the attention finds its prefix, and parameters keep one name.
            attention.prefix_states = partial(part, layer)
    return prefix


def own_prefix(model: Any) -> Prefix | None:
    """The prefix of a model, None where it has none of ours."""
    prefix = getattr(model, "prefix", None)
    return prefix if isinstance(prefix, Prefix) else None


def write_prefix(prefix: Prefix, folder: Path, base: str, dtype: torch.dtype) -> None:
    """Its keys and values, and an adapter_config.json that says what they are."""
    from safetensors.torch import save_file

    tensors = {kind: value.to("cpu", dtype).contiguous() for kind, value in prefix.tensors().items()}
    save_file(tensors, folder / PREFIX_WEIGHTS, metadata={"format": "pt"})
    about = {
        "peft_type": PREFIX_TYPE,
        "task_type": "SEQ_2_SEQ_LM",
        "num_virtual_tokens": tensors[ENCODER].shape[3],
        "base_model_name_or_path": base,
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(about, indent=1) + "\n")


def attentions(model: Any) -> dict[str, list[Any]]:
    """The attention modules of a T5 by kind, in the order of their layers."""
    from transformers.models.t5.modeling_t5 import T5Attention

    if not any(isinstance(module, T5Attention) for module in model.modules()):
        raise UserError(f"prefix-full: works on T5 models, and this is a {type(model).__name__}; use method=lora")
    return {
        ENCODER: [block.layer[0].SelfAttention for block in model.encoder.block],
        DECODER: [block.layer[0].SelfAttention for block in model.decoder.block],
        CROSS: [block.layer[1].EncDecAttention for block in model.decoder.block],
    }


def prefix_shapes(model: Any, length: int) -> dict[str, tuple[int, ...]]:
    """(L, 2, H, P, D) of each kind of attention for a prefix of `length` positions."""
    return {
        kind: (len(places), 2, places[0].n_heads, length, places[0].key_value_proj_dim)
        for kind, places in attentions(model).items()
    }


@torch.no_grad()
def word_states(model: Any, input_ids: Tensor, decoder_ids: Tensor) -> dict[str, Tensor]:
    """Keys and values that the bare model gives real words, by kind of attention: a start for a prefix of P = S.

    input_ids, decoder_ids: (1, S), words as the encoder and the decoder will meet them. Those of the cross-attention
    come from what the encoder makes of `input_ids`.
    """
    with _recorded(model) as seen:
        model(input_ids=input_ids, decoder_input_ids=decoder_ids, use_cache=False)
    states = {}
    for kind, places in attentions(model).items():
        pairs = torch.stack([torch.cat([seen[place.k], seen[place.v]]) for place in places])  # (L, 2, S, H * D)
        states[kind] = pairs.unflatten(-1, (places[0].n_heads, -1)).transpose(2, 3)
    return states


@contextmanager
def _recorded(model: Any) -> Iterator[dict[nn.Module, Tensor]]:
    """What each attention's key and value layers put out, (1, S, H * D)."""
    seen: dict[nn.Module, Tensor] = {}
    layers = [layer for places in attentions(model).values() for place in places for layer in (place.k, place.v)]
    hooks = [layer.register_forward_hook(lambda module, _, out: seen.update({module: out})) for layer in layers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    position_bias: Tensor | None = None,
    **options: Any,
) -> Any:
    """Scaled dot-product attention over the prefix and the tokens. query (B, H, Q, D); key, value (B, H, K, D).

    Mask and bias, (B or 1, 1 or H, Q, K), get P columns in front: open, and 0. The rest is transformers' own function.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    keys, values = module.prefix_states().to(key.dtype)
    rows, length = len(key), keys.shape[1]
    if length:
        key = torch.cat([keys.expand(rows, -1, -1, -1), key], 2)
        value = torch.cat([values.expand(rows, -1, -1, -1), value], 2)
        if position_bias is not None:
            position_bias = pad(position_bias, (length, 0))
        if attention_mask is not None:
            # A boolean mask is True where a key counts, a float one is added.
            attention_mask = pad(attention_mask, (length, 0), value=float(attention_mask.dtype == torch.bool))
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, position_bias=position_bias, **options
    )


def _mask(*args: Any, **options: Any) -> Tensor | None:
    """SDPA's mask, written out where it is causal: `is_causal` alone would count the prefix as tokens."""
    from transformers.masking_utils import sdpa_mask

    mask: Tensor | None = sdpa_mask(*args, **{**options, "allow_is_causal_skip": False})
    return mask
