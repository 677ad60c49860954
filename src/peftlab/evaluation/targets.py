"""How well an encoder-decoder predicts targets: our own sum, as evaluation/perplexity.py makes it for causal models."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from ..data.collate import collate_seq2seq
from ..data.tokenize import IGNORED, Row
from ..ops.logprobs import token_logprobs
from ..runs.progress import batch_starts


@torch.no_grad()
def target_nlls(
    model: nn.Module, rows: Sequence[Row], pad_id: int, batch_size: int = 32
) -> tuple[np.ndarray, np.ndarray]:
    """Summed negative log-likelihood (nats) of each row's labels and how many they are, both (N,), in float32."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    sums, counts = np.zeros(len(rows)), np.zeros(len(rows), dtype=np.int64)
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]["input_ids"]))  # similar lengths, little padding
    for start in batch_starts(len(order), batch_size):
        picked = order[start : start + batch_size]
        batch = {n: t.to(device) for n, t in collate_seq2seq([rows[row] for row in picked], pad_id).items()}
        counted = batch["labels"] != IGNORED
        logits = model(**batch, use_cache=False).logits
        nll = -token_logprobs(logits, batch["labels"].clamp(min=0)) * counted
        sums[picked] = nll.sum(1).double().cpu().numpy()
        counts[picked] = counted.sum(1).cpu().numpy()
    model.train(was_training)
    return sums, counts
