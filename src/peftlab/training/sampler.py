"""Batches of similar length, in an order that a resumed run repeats exactly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler


def row_length(row: Mapping[str, Any]) -> int:
    """Tokens of a row; of an encoder-decoder's, those of its input."""
    return len(row["input_ids"])


def pair_length(row: Mapping[str, Any]) -> int:
    """Tokens of an encoder-decoder's row, input and target."""
    return row_length(row) + len(row["labels"])


class BucketSampler(Sampler[int]):
    """Row numbers so ordered that consecutive batches hold rows of similar length.

    Each epoch: shuffle, sort within windows of `window` batches, shuffle the batches. The order is a function of
    (seed, epoch) alone; the Trainer's own `group_by_length` draws from the global generator and resumes differently.

    `lengths` are those of one pass over the items. Rows may hold several `passes`, one behind the other: epoch e goes
    through pass e, and behind the last through the first again.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, seed: int, window: int = 50, passes: int = 1
    ) -> None:
        self.lengths, self.batch_size, self.seed, self.window = list(lengths), batch_size, seed, window
        self.passes = passes
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        span = self.batch_size * self.window
        batches = []
        for start in range(0, len(order), span):
            rows = sorted(order[start : start + span], key=lambda row: -self.lengths[row])
            batches += [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        # A short last batch stays last: the loader cuts the stream of rows into batches again.
        full = [batch for batch in batches if len(batch) == self.batch_size]
        short = [batch for batch in batches if len(batch) < self.batch_size]
        first = self.epoch % self.passes * len(self.lengths)
        for batch in [*(full[index] for index in torch.randperm(len(full), generator=generator).tolist()), *short]:
            yield from (first + row for row in batch)
