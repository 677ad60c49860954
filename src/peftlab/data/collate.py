"""Rows become rectangular batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .tokenize import IGNORED, Row


def collate_language(rows: Sequence[Row], pad_id: int) -> dict[str, Tensor]:
    """input_ids, position_ids, labels, each (B, longest); no attention mask.

    Without a mask, transformers separates packed documents by their restarting positions. Pads stand behind every real
    token, so causal attention never reaches them; they get position 0 (documents of their own) and no loss.
    """
    fill = {"input_ids": pad_id, "position_ids": 0, "labels": IGNORED}
    return {name: pad_right([row[name] for row in rows], value) for name, value in fill.items()}


def collate_seq2seq(rows: Sequence[Row], pad_id: int) -> dict[str, Tensor]:
    """input_ids, attention_mask (B, longest input) and labels (B, longest target), padded behind.

    Labels are -100 where padded; an encoder-decoder shifts them to the right itself to feed its decoder.
    """
    inputs = collate_tokens([row["input_ids"] for row in rows], pad_id)
    return inputs | {"labels": pad_right([row["labels"] for row in rows], IGNORED)}


def collate_tokens(rows: Sequence[Sequence[int]], pad_id: int) -> dict[str, Tensor]:
    """Token lists -> input_ids and attention_mask, (B, longest), padded behind. An empty row counts as one pad."""
    rows = [row or [pad_id] for row in rows]
    return {"input_ids": pad_right(rows, pad_id), "attention_mask": pad_right([[1] * len(row) for row in rows], 0)}


def pad_right(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Rows -> (B, longest), `value` behind each. By way of numpy: torch.tensor(rows) takes five times as long."""
    width = max(map(len, rows))
    return torch.from_numpy(np.array([[*row, *[value] * (width - len(row))] for row in rows], dtype=np.int64))
