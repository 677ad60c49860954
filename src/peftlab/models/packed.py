"""The weights of a known causal model as it is sampled by, and as a policy's passes read them once they are merged.

Weights of layers that read the same states are one tensor, of which these layers keep windows: one product makes all.
On a GPU they are in parts (`ops/split.py`) as well, those of bfloat16 for the sake of their biases.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..ops.kernels import kernels_of
from ..ops.split import SplitHead, SplitRows, SplitWeight, splits_pay


def packable(model: Any) -> bool:
    """Whether the weights of a model, without adapters, are of a kind that `PackedWeights` knows."""
    if type(model).__name__ == "GPT2LMHeadModel":
        return True
    config = model.config
    return type(model).__name__ == "LlamaForCausalLM" and not (config.attention_bias or config.mlp_bias)


def layer_groups(model: Any) -> list[list[Any]]:
    """The linear layers of a model in the order of a pass, those together that read the same states: four a block."""
    if type(model).__name__ == "GPT2LMHeadModel":
        blocks = model.transformer.h
        return [[own] for b in blocks for own in (b.attn.c_attn, b.attn.c_proj, b.mlp.c_fc, b.mlp.c_proj)]
    return [
        group
        for own, mlp in ((block.self_attn, block.mlp) for block in model.model.layers)
        for group in (
            [own.q_proj, own.k_proj, own.v_proj],
            [own.o_proj],
            [mlp.gate_proj, mlp.up_proj],
            [mlp.down_proj],
        )
    ]


def packed_of(model: Any) -> PackedWeights:
    """Those of a model, which all who read it share; made at first use, and again where its weights moved."""
    packed = _KNOWN.get(model)
    if packed is None or packed.where != addresses(model):
        packed = _KNOWN[model] = PackedWeights(model)
    return packed


def addresses(model: nn.Module) -> tuple[int, ...]:
    """Where the weights of a model lie."""
    return tuple(parameter.data_ptr() for parameter in model.parameters())


class PackedWeights:
    """weights (E, D) and biases (E,) of `layer_groups`, and the `head` (V, D); `split` and `split_head` are the same in
    parts, where that pays."""

    def __init__(self, model: Any) -> None:
        self.groups = layer_groups(model)
        self.weights = [pack(group) if len(group) > 1 else matrix(group[0]) for group in self.groups]
        self.biases = [None if group[0].bias is None else group[0].bias.detach() for group in self.groups]
        self.head: Tensor = model.lm_head.weight.detach()
        self.where = addresses(model)
        self.written = list(model.parameters())  # what is packed does not count what is written to its windows
        self.seen = self._versions()
        whole = all(size % 4 == 0 for weight in self.weights for size in weight.shape)
        self.kernels = kernels_of(self.head.device, self.head.dtype) if whole else None
        # Of bfloat16, so that the product which adds to a residual adds its bias as well.
        self.biased = self.kernels is not None and self.biases[0] is not None
        self.split: list[SplitWeight] = []
        self.split_head: SplitHead | None = None
        if self.biased or self.head.dtype == torch.float32 and splits_pay(self.head.device):
            self.split = [SplitWeight(weight, bias) for weight, bias in zip(self.weights, self.biases, strict=True)]
            self.split_head = SplitHead(self.head)

    def follow(self) -> None:
        """Take what was written to the weights since."""
        if self.split_head is not None and self.seen != self._versions():
            self.renew()
            self.split_head.follow(self.head)

    def renew(self) -> None:
        """Take the weights of all layers, the head's left out."""
        for split, weight, bias in zip(self.split, self.weights, self.biases, strict=True):
            split.renew(weight, bias)
        self.seen = self._versions()

    def windows(self, rows: SplitRows) -> dict[int, SplitWeight]:
        """By the id of a layer, its share of its group's parts, to be multiplied by `rows`."""
        found = {}
        for group, split in zip(self.groups, self.split, strict=True):
            start = 0
            for layer in group:
                stop = start + len(matrix(layer))
                found[id(layer)] = split.window(start, stop, rows)
                start = stop
        return found

    def _versions(self) -> list[int]:
        return [parameter._version for parameter in self.written]


# Not attributes of models, which are copied with all of these.
_KNOWN: WeakKeyDictionary[nn.Module, PackedWeights] = WeakKeyDictionary()


def matrix(layer: Any) -> Tensor:
    """The weight (E, D) of a linear layer, or of transformers' Conv1D."""
    weight: Tensor = layer.weight.detach()
    return weight if isinstance(layer, nn.Linear) else weight.t()


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
