"""Log-probabilities of chosen tokens, and entropies, from logits. Shapes: B rows, T positions, V vocabulary."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


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
