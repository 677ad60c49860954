"""Attention of a step of decoding: a few queries over a long cache."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def few_queries(query: Tensor, keys: Tensor, values: Tensor, unseen: Tensor) -> Tensor:
    """`scaled_dot_product_attention` of n queries (B, G, n, D) over keys and values (B, G, S, D).

    `unseen` (B, 1, 1, S) is added to the scores: 0, or far below it. Two plain products are quicker than the fused
    kernels, which are made for tiles of 32 queries and more: in float32, and on a CPU in any dtype.
    """
    if query.dtype != torch.float32 and query.device.type != "cpu":
        return scaled_dot_product_attention(query, keys, values, attn_mask=unseen.expand(*query.shape[:3], -1))
    scores = query.mul(query.shape[-1] ** -0.5) @ keys.transpose(-1, -2)
    return scores.add_(unseen).softmax(-1) @ values
