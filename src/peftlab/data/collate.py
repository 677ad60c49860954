"""Rows become rectangular batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .tokenize import IGNORED, Row


def collate_language(rows: Sequence[Row], pad_id: int) -> dict[str, Tensor]:
    """input_ids, position_ids, labels, each (B, longest); no attention mask.

    Without a mask, transformers separates packed documents by their restarting positions. Pads stand behind every real
    token, so causal attention never reaches them; they get position 0 (documents of their own) and no loss.
    """
    width = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": pad_id, "position_ids": 0, "labels": IGNORED}
    return {
        name: torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])
        for name, value in fill.items()
    }
