"""Losses of policy optimisation. Shapes: (B, T) tokens; masks True counts; each loss is a mean over counted tokens.

The mean per token (not per sequence) is deliberate: a mean per sequence weighs the tokens of short answers more
and so rewards brevity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .masks import masked_mean


def ppo_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip: float = 0.2
) -> tuple[Tensor, Tensor]:
    """Clipped surrogate (Schulman et al. 2017, eq. 7), negated: mean of max(-A r, -A clip(r, 1-eps, 1+eps)).

    All tensors (B, T). Returns (loss, clip_fraction), scalars; clip_fraction is the share of counted tokens whose
    gradient the clip cut off.
    """
    ratio = torch.exp(logprobs - old_logprobs)
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    return masked_mean(torch.maximum(unclipped, clipped), mask), masked_mean((clipped > unclipped).float(), mask)


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float = 0.2
) -> tuple[Tensor, Tensor]:
    """Half squared error, the new value kept within +-clip of the rollout's (Ziegler et al. 2019, `vf_loss`).

    All tensors (B, T). Returns (loss, clip_fraction), scalars.
    """
    near = torch.clamp(values, old_values - clip, old_values + clip)
    plain, clipped = (values - returns).square(), (near - returns).square()
    return 0.5 * masked_mean(torch.maximum(plain, clipped), mask), masked_mean((clipped > plain).float(), mask)
