"""Returns and advantages. Shapes: B completions, T tokens; masks True on tokens that count, one run from t = 0."""

from __future__ import annotations

import torch
from torch import Tensor


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 11 and 16), for episodes that end with the mask.

        delta_t = r_t + gamma V_{t+1} - V_t,    A_t = delta_t + gamma lam A_{t+1},    return_t = A_t + V_t

    with V and A zero after a row's last counted token: a completion cut at its length limit is an ended episode.
    rewards, values, mask: (B, T). Returns (advantages, returns), (B, T), zero where the mask is False.
    """
    rewards, values = rewards * mask, values * mask
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = delta + gamma * lam * next_advantage
        next_value, next_advantage = values[:, t], advantages[:, t]
    advantages = advantages * mask
    return advantages, (advantages + values) * mask


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(return - value) / Var(return) over counted tokens: 1 is a perfect critic, 0 a constant one."""
    target, error = returns[mask], (returns - values)[mask]
    return 1 - error.var(unbiased=False) / target.var(unbiased=False).clamp(min=1e-8)
