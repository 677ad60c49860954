"""Kullback-Leibler divergences between token distributions, in nats.

Estimators k1, k2, k3 follow J. Schulman, "Approximating KL Divergence" (2020): for x ~ p and
r = q(x)/p(x), each is a function of log r whose mean over x estimates KL(p || q).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def k1(logp: Tensor, logq: Tensor) -> Tensor:
    """-log r: unbiased, high variance, may be negative for a single token. Same shape as the inputs."""
    return logp - logq


def k2(logp: Tensor, logq: Tensor) -> Tensor:
    """(log r)^2 / 2: biased, low variance, never negative."""
    return (logp - logq).square() / 2


def k3(logp: Tensor, logq: Tensor) -> Tensor:
    """(r - 1) - log r: unbiased, low variance, never negative."""
    log_r = logq - logp
    return torch.expm1(log_r) - log_r


def exact_kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(softmax(p) || softmax(q)) over the whole vocabulary. (..., V), (..., V) -> (...), float32.

    Bitwise equal logits give exactly 0.0: each term is p * (log p - log q).
    """
    logp = F.log_softmax(p_logits.float(), -1)
    logq = F.log_softmax(q_logits.float(), -1)
    return (logp.exp() * (logp - logq)).sum(-1)
