"""The next-token loss of a causal model whose head is frozen, without its logits.

Logits (B, T, V) are most of what a training step of a small model keeps, and on a GPU a third of its time goes into
passes over them. Of a head that does not learn they are needed a block at a time: `state_logprobs`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..data.tokenize import IGNORED
from ..models.backbone import unembedding
from ..ops.logprobs import state_logprobs
from ..ops.split import AlignedHead, product_dtype


@contextmanager
def loss_from_states(model: Any) -> Iterator[None]:
    """While it lasts, a PeftModel that is given labels makes its loss so, and its output's `logits` are final states.

    Where its head learns, has a bias or an adapter, or where more is done to logits, it goes on as it is.
    """
    base = model.get_base_model()
    weight = unembedding(base)
    if weight is None or weight.requires_grad:
        yield
        return
    head = base.get_output_embeddings()
    head.forward = lambda states: states
    base._loss_function = StateLoss(weight)
    try:
        yield
    finally:
        del head.forward, base._loss_function


class StateLoss:
    """What transformers asks of a causal model's `loss_function`, of states where it expects logits."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self._aligned: dict[torch.dtype, AlignedHead] = {}

    def __call__(
        self, logits: Tensor, labels: Tensor, vocab_size: int, num_items_in_batch: Tensor | None = None, **given: Any
    ) -> Tensor:
        """Of `logits`, which are states (B, T, D), and labels (B, T), t read from state t - 1: the mean over
        those that count, or their sum divided by `num_items_in_batch`; NaN where none counts."""
        targets = labels[:, 1:]
        counted = targets != IGNORED
        logprobs, _ = state_logprobs(
            logits[:, :-1][counted], self.weight, targets[counted], quick=self._quick(logits)
        )
        items = len(logprobs) if num_items_in_batch is None else num_items_in_batch
        return -logprobs.sum() / items

    def _quick(self, states: Tensor) -> AlignedHead | None:
        """On a GPU, the head in the dtype of the products of the states."""
        if states.device.type != "cuda":
            return None
        dtype = product_dtype(states)
        if dtype not in self._aligned:
            self._aligned[dtype] = AlignedHead(self.weight, dtype)
        return self._aligned[dtype]
