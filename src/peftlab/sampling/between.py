"""What lies between the products of a step of decoding: by torch, or (`Fused`) one kernel each.

Shapes: N tokens, one a row; H heads of queries and G of keys and values, D width of a head; S slots of a cache.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.kernels import AS_IT_IS, GATED, GELU, Kernels
from .attention import few_queries

Rotary = tuple[Tensor, Tensor] | None  # cosines and sines, each (N, D), the first half of the sines negative


class Between(Protocol):
    """What each method makes is rows to be multiplied by a weight."""

    def rows(self, x: Tensor) -> Tensor:
        """x (N, width) itself."""

    def norm(self, x: Tensor, norm: Any) -> Tensor:
        """The norm of x (N, width) by a module."""

    def gelu(self, x: Tensor) -> Tensor:
        """Of x (N, width), by tanh."""

    def gated(self, x: Tensor) -> Tensor:
        """The SiLU of the first half of x (N, 2 width) times the second."""

    def seen(self, heads: int, cache: Tensor, seen: int) -> int:
        """The slots over which `attend` goes, where tokens lie in the first `seen`: a kind of step for each number."""

    def attend(self, x: Tensor, rotary: Rotary, cache: Tensor, unseen: Tensor, slot: Tensor, seen: int) -> Tensor:
        """x (N, H + 2G, D), queries, keys and values of a token a row, over the first `seen` slots of a layer's cache
        (2, N, G, S, D), into whose `slot` (1,) they go. unseen (N, S): 0, or far below it."""


class Plain:
    """By torch."""

    def rows(self, x: Tensor) -> Tensor:
        return x

    def norm(self, x: Tensor, norm: Any) -> Tensor:
        if isinstance(norm, nn.LayerNorm):
            made: Tensor = norm(x)
            return made
        return F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)

    def gelu(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")

    def gated(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return F.silu(gate).mul_(up)

    def seen(self, heads: int, cache: Tensor, seen: int) -> int:
        return seen

    def attend(self, x: Tensor, rotary: Rotary, cache: Tensor, unseen: Tensor, slot: Tensor, seen: int) -> Tensor:
        rows, groups, width = len(x), cache.shape[2], cache.shape[4]
        query, pairs = rotated(x, groups, rotary)
        cache.index_copy_(3, slot, pairs.transpose(0, 1).unsqueeze(3))
        keys, values = cache[:, :, :, :seen]
        # Heads that share a key stand where positions would: no key is copied for each of them.
        query = query.reshape(rows, groups, -1, width)
        return few_queries(query, keys, values, unseen[:, None, None, :seen]).reshape(rows, -1)


class Fused(Plain):
    """By `ops/kernels.cu`. `ones`: columns of ones, by which a bias is multiplied."""

    def __init__(self, kernels: Kernels, ones: int) -> None:
        self.kernels, self.ones = kernels, ones

    def rows(self, x: Tensor) -> Tensor:
        return self.kernels.columns(x, AS_IT_IS, self.ones) if self.ones or x.dtype == torch.float32 else x

    def norm(self, x: Tensor, norm: Any) -> Tensor:
        if isinstance(norm, nn.LayerNorm):
            return self.kernels.layer_norm(x, norm.weight, norm.bias, norm.eps, self.ones)
        return self.kernels.rms_norm(x, norm.weight, norm.variance_epsilon, self.ones)

    def gelu(self, x: Tensor) -> Tensor:
        return self.kernels.columns(x, GELU, self.ones)

    def gated(self, x: Tensor) -> Tensor:
        return self.kernels.columns(x, GATED, self.ones)

    def seen(self, heads: int, cache: Tensor, seen: int) -> int:
        # Its kernel stops at the token's slot by itself: steps of any number of slots are of one kind.
        _, _, groups, slots, width = cache.shape
        return slots if self.kernels.holds(heads, groups, slots, width) else seen

    def attend(self, x: Tensor, rotary: Rotary, cache: Tensor, unseen: Tensor, slot: Tensor, seen: int) -> Tensor:
        _, _, groups, slots, width = cache.shape
        if self.kernels.holds(x.shape[1] - 2 * groups, groups, slots, width):
            return self.kernels.attend(x, rotary, cache, unseen, slot, self.ones)
        return self.rows(super().attend(x, rotary, cache, unseen, slot, seen))


def rotated(x: Tensor, groups: int, rotary: Rotary) -> tuple[Tensor, Tensor]:
    """Queries (N, H, D), and keys and values (N, 2, G, D), of x (N, H + 2G, D), whose queries and keys are rotated in
    place."""
    rows, heads, width = len(x), x.shape[1] - 2 * groups, x.shape[2]
    if rotary is not None:
        turned = x[:, : heads + groups]
        swapped = turned.roll(width // 2, -1)
        turned.mul_(rotary[0].unsqueeze(1)).addcmul_(swapped, rotary[1].unsqueeze(1))
    return x[:, :heads], x[:, heads:].view(rows, 2, groups, width)
