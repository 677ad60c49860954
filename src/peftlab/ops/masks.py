"""Masks have one polarity everywhere: True counts. Shapes: B rows, T positions."""

from __future__ import annotations

import torch
from torch import Tensor

# The score of a place that must not be seen. Finite, so that a row of such places alone yields no NaN.
UNSEEN = -1e30


def position_ids(mask: Tensor) -> Tensor:
    """Positions 0, 1, 2 ... over the True entries of each row, whatever the padding side. (B, T) -> (B, T) long.

    GPT-2 numbers positions from the left edge unless told otherwise, so left padding shifts every
    learned position; passing these makes a padded row equal to the same row alone.
    """
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over all True entries (a scalar); 0 where the mask is empty."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum over the last axis of the True entries. (..., T) -> (...)."""
    return (values * mask).sum(-1)


def masked_whiten(values: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """Shift and scale so that the True entries have mean 0 and variance 1; the others become 0.

    A batch with a single True entry, or with no spread, becomes 0.
    """
    centred = (values - masked_mean(values, mask)) * mask
    variance = masked_mean(centred.square(), mask)
    return centred * torch.rsqrt(variance + eps)


def completion_mask(token_ids: Tensor, eos_id: int | None) -> Tensor:
    """True up to and including each row's first EOS. (B, T) ids -> (B, T) bool.

    Goes by position, never by the pad id, so a model whose pad is its EOS still counts the one it sampled.
    """
    if eos_id is None:
        return torch.ones_like(token_ids, dtype=torch.bool)
    is_eos = token_ids == eos_id
    ended_before = is_eos.cumsum(-1) - is_eos.long()
    return ended_before == 0


def last_true(mask: Tensor) -> Tensor:
    """Index of the last True entry of each row. (B, T) -> (B,) long; 0 for an empty row."""
    positions = torch.arange(mask.shape[-1], device=mask.device)
    return (positions * mask).amax(-1)
