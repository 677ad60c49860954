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


def leave_one_out(returns: Tensor, k: int, scale_by_std: bool = False) -> Tensor:
    """Each return less the mean of the other k - 1 of its prompt (Kool et al. 2019; Ahmadian et al. 2024).

        A_i = R_i - 1/(k-1) sum_{j != i} R_j = k/(k-1) (R_i - mean R)

    The others know nothing of y_i, so this baseline leaves the policy gradient unbiased. returns (B,), those of one
    prompt side by side, k >= 2; the same shape back, and the k of a prompt sum to 0. `scale_by_std` divides by the
    prompt's standard deviation (n - 1) as GRPO does (Shao et al. 2024, section 4.1.2): no longer unbiased.
    """
    groups = returns.view(-1, k)
    advantages = (groups - groups.mean(1, keepdim=True)) * (k / (k - 1))
    if scale_by_std:
        advantages = advantages / (groups.std(1, keepdim=True) + 1e-4)  # TRL's guard of a prompt without any spread
    return advantages.view(-1)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(return - value) / Var(return) over counted tokens: 1 is a perfect critic, 0 a constant one."""
    target, error = returns[mask], (returns - values)[mask]
    return 1 - error.var(unbiased=False) / target.var(unbiased=False).clamp(min=1e-8)
