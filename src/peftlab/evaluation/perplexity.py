"""Perplexity by our own sum: total negative log-likelihood over counted tokens, in float32."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from ..data.collate import collate_language
from ..data.tokenize import IGNORED, Row
from ..ops.logprobs import token_logprobs
from ..runs.progress import batch_starts
from .intervals import SEED


@torch.no_grad()
def row_nlls(model: nn.Module, rows: Sequence[Row], pad_id: int, batch_size: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Summed negative log-likelihood (nats) and number of counted tokens of each row, both (N,)."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    sums, counts = [], []
    for start in batch_starts(len(rows), batch_size):
        batch = {n: t.to(device) for n, t in collate_language(rows[start : start + batch_size], pad_id).items()}
        labels = batch.pop("labels")[:, 1:]
        counted = labels != IGNORED
        logits = model(**batch, use_cache=False).logits[:, :-1]
        nll = -token_logprobs(logits, labels.clamp(min=0)) * counted
        sums.append(nll.sum(1).double().cpu().numpy())
        counts.append(counted.sum(1).cpu().numpy())
    model.train(was_training)
    return np.concatenate(sums), np.concatenate(counts)


def perplexity(sums: np.ndarray, counts: np.ndarray) -> float:
    """exp(total nats / total tokens)."""
    return float(np.exp(sums.sum() / counts.sum()))


def perplexity_interval(sums: np.ndarray, counts: np.ndarray, draws: int = 1000) -> tuple[float, float]:
    """95% bootstrap interval over rows."""
    picks = np.random.default_rng(SEED).integers(0, len(sums), (draws, len(sums)))
    low, high = np.percentile(np.exp(sums[picks].sum(1) / counts[picks].sum(1)), [2.5, 97.5])
    return float(low), float(high)


def perplexity_intervals(sums: np.ndarray, counts: np.ndarray) -> dict[str, tuple[float, float]]:
    """`perplexity_interval` by its metric's name; nothing of a single row, which knows no spread."""
    return {"eval/perplexity": perplexity_interval(sums, counts)} if len(sums) > 1 else {}
