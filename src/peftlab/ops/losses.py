"""Losses of policy optimisation. Shapes: (B, T) tokens; masks True counts; N pairs.

PPO's losses are means over counted tokens. The mean per token (not per sequence) is deliberate: a mean per sequence
weighs the tokens of short answers more and so rewards brevity. Each loss of pairs is a mean over the pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .masks import masked_mean, masked_sum


def ppo_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip: float = 0.2
) -> tuple[Tensor, Tensor]:
    """Clipped surrogate (Schulman et al. 2017, eq. 7), negated: mean of max(-A r, -A clip(r, 1-eps, 1+eps)).

    All tensors (B, T). Returns (loss, clip_fraction), scalars; clip_fraction is the share of counted tokens whose
    gradient the clip cut off.
    """
    losses, cut = clipped_surrogate(logprobs, old_logprobs, advantages, clip)
    return masked_mean(losses, mask), masked_mean(cut, mask)


def rloo_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip: float = 0.2,
    length: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The same surrogate, summed over a completion's tokens, over `length`, then a mean over the completions.

    With a fixed `length` its gradient at ratio 1 is that of the mean return, over that length (Dr. GRPO: Liu et al.
    2025). None takes each completion's own length (GRPO: Shao et al. 2024, eq. 3), which weighs the tokens of short
    completions more. All tensors (B, T). Returns (loss, clip_fraction), scalars.
    """
    losses, cut = clipped_surrogate(logprobs, old_logprobs, advantages, clip)
    lengths = mask.sum(1).clamp(min=1) if length is None else length
    return (masked_sum(losses, mask) / lengths).mean(), masked_mean(cut, mask)


def clipped_surrogate(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """max(-A r, -A clip(r, 1-eps, 1+eps)) of each token, and 1.0 where the clip cuts its gradient off, else 0.0."""
    ratio = torch.exp(logprobs - old_logprobs)
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(unclipped, clipped), (clipped > unclipped).float()


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float = 0.2
) -> tuple[Tensor, Tensor]:
    """Half squared error, the new value kept within +-clip of the rollout's (Ziegler et al. 2019, `vf_loss`).

    All tensors (B, T). Returns (loss, clip_fraction), scalars.
    """
    near = torch.clamp(values, old_values - clip, old_values + clip)
    plain, clipped = (values - returns).square(), (near - returns).square()
    return 0.5 * masked_mean(torch.maximum(plain, clipped), mask), masked_mean((clipped > plain).float(), mask)


def dpo_loss(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Direct preference optimisation (Rafailov et al. 2023, eq. 7); `label_smoothing` makes it Mitchell's cDPO (2023).

        m = chosen - rejected,    loss = -(1 - eps) log sigmoid(beta m) - eps log sigmoid(-beta m)

    chosen, rejected (N,): log p(answer) - log p_reference(answer), in nats summed over the answer's tokens. `eps` is
    the share of pairs expected to be the wrong way round, below .5. Mean over the pairs, a scalar: ln 2 where p is the
    reference.
    """
    margin = beta * (chosen - rejected)
    return -((1 - label_smoothing) * F.logsigmoid(margin) + label_smoothing * F.logsigmoid(-margin)).mean()


def ipo_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """Identity preference optimisation (Azar et al. 2023, eq. 17): mean of (chosen - rejected - 1 / (2 beta))^2.

    chosen, rejected (N,): as for `dpo_loss`, but a mean over the answer's tokens (see docs/dpo.md). A scalar:
    1 / (2 beta)^2 where p is the reference.
    """
    return (chosen - rejected - 1 / (2 * beta)).square().mean()


def bradley_terry_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0, centre: float = 0.0
) -> Tensor:
    """Mean of -log sigmoid(r_c - r_r - margin) + centre (r_c + r_r)^2 over pairs; a scalar.

    chosen, rejected: scores (B,); margin (B,) or one number. The first term is that of Bradley and Terry (Ouyang et al.
    2022, eq. 1), its margin that of Llama 2 (Touvron et al. 2023, eq. 2). The second holds scores near 0, which the
    first leaves free to drift (Eisenstein et al. 2023).
    """
    return (centre * (chosen + rejected).square() - F.logsigmoid(chosen - rejected - margin)).mean()
