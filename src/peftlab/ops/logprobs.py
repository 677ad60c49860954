"""Log-probabilities of chosen tokens, and entropies: from logits, or from the states that logits are read from.

Shapes: B rows, T positions, N tokens, D width of a state, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .kernels import fitting, kernels_of
from .split import AlignedHead, SplitHead, in_tf32

# Logits that are there at once: on a CPU its cache is to hold them.
BLOCK = {"cpu": 2**21, "cuda": 2**26, "mps": 2**26}


class RoundedSlopes:
    """The head (V, D) as it is for logits, and as a `weight` of `dtype` for their gradient in the states."""

    def __init__(self, head: Tensor, dtype: torch.dtype) -> None:
        self.head, self.weight = head.detach(), head.detach().to(dtype)

    def __call__(self, states: Tensor) -> Tensor:
        """Logits (N, V) of states (N, D)."""
        return states @ self.head.t()


Quick = SplitHead | AlignedHead | RoundedSlopes


def token_logprobs(logits: Tensor, token_ids: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature)[token]. (B, T, V), (B, T) -> (B, T), float32.

    Row t of `logits` must be the prediction *of* token t (already shifted by the caller). Written as
    chosen logit minus logsumexp, which keeps no second (B, T, V) tensor.
    """
    scaled = logits.float() if temperature == 1.0 else logits.float() / temperature
    chosen = scaled.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    return chosen - scaled.logsumexp(-1)


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Shannon entropy in nats of softmax(logits / temperature). (..., V) -> (...), float32."""
    logp = F.log_softmax(logits.float() / temperature, -1)
    return -(logp.exp() * logp).sum(-1)


def state_logprobs(
    states: Tensor,
    head: Tensor,
    token_ids: Tensor,
    temperature: float = 1.0,
    quick: Quick | None = None,
) -> tuple[Tensor, Tensor]:
    """`token_logprobs` and `entropy` of the logits states head^T, (N,) and (N,), float32; those are never all there.

    states (N, D); head (V, D), which gets no gradient; token_ids (N,); `quick`: the head in parts, or
    with rows for a multiple of 8 words, to make the logits by, or rounded, for the gradient alone. The gradient in the
    states,

        d log p(y) / d h = (W_y - sum_v p_v W_v) / temperature,

    is made beside the value, from the same block of probabilities: nothing of size V is kept or computed again. The
    entropies have none.
    """
    made: tuple[Tensor, Tensor] = _StateLogprobs.apply(states, head, token_ids, temperature, quick)  # type: ignore[no-untyped-call]
    return made


class _StateLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, head: Tensor, token_ids: Tensor, temperature: float, quick: Any
    ) -> tuple[Tensor, Tensor]:
        learns = ctx.needs_input_grad[0]
        rows = max(1, BLOCK[states.device.type] // len(head))
        parts = [
            _block(some, head, tokens, temperature, learns, quick)
            for some, tokens in zip(states.split(rows), token_ids.split(rows), strict=True)
        ]
        logprobs, entropies, slopes = (torch.cat(part) for part in zip(*parts, strict=True))
        ctx.save_for_backward(slopes)
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return gradient.unsqueeze(-1).to(slopes.dtype) * slopes, None, None, None, None


def _block(
    states: Tensor, head: Tensor, token_ids: Tensor, temperature: float, learns: bool, quick: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, entropies, and d log p / d state where `learns`, of a few rows."""
    logits = states @ head.t() if quick is None else quick(states)
    logprobs, entropies, masses, totals = _softmax(logits, token_ids, temperature, len(head), learns)
    if not learns:
        return logprobs, entropies, states[:, :0]
    with in_tf32(isinstance(quick, SplitHead)):
        weight = head if quick is None else quick.weight
        expected = (masses.to(weight.dtype) @ weight) / totals.unsqueeze(-1)
    return logprobs, entropies, (head[token_ids] - expected.to(head.dtype)) / temperature


def _softmax(
    logits: Tensor, token_ids: Tensor, temperature: float, words: int, kept: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities, entropies, exp(logit - the row's highest), if it is `kept`, and the sums of these.

    `logits` (N, W) are taken for it. Of columns from `words` on none has a chance, as their logits say too.
    """
    kernels = kernels_of(logits.device, logits.dtype)
    if kernels is not None and fitting(logits):
        logprobs, entropies, totals = kernels.softmax(logits, token_ids, temperature, words, kept)
        return logprobs, entropies, logits, totals
    logits = logits.float()
    if temperature != 1.0:
        logits /= temperature
    logits -= logits.amax(-1, keepdim=True)
    chosen = logits.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    masses = logits.exp()
    totals = masses.sum(-1)
    log_totals = totals.log()
    return chosen - log_totals, log_totals - torch.linalg.vecdot(masses, logits) / totals, masses, totals
