"""Texts to class logits with a classifier adapter on its base, merged for speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from .adapters import load_stack, read_stack
from .catalog import resolve

LABEL_NAMES = ["negative", "positive"]


@dataclass(frozen=True)
class TextClassifier:
    """A loaded classifier. `labels` are the names of its classes; longer texts are cut at `max_length` tokens."""

    name: str
    model: nn.Module
    tokenizer: Any
    labels: list[str]
    max_length: int

    @classmethod
    def load(cls, name: str, device: str = "auto", dtype: str = "float32") -> TextClassifier:
        """A classifier adapter by bundled name or folder. Raises UserError for anything else."""
        entry = resolve(name)
        if entry.kind != "adapter":
            raise UserError(f"{name}: is a {entry.kind} model, not a classifier adapter; for example imdb-sentiment")
        backbone, stack = load_stack(name, device=device, dtype=dtype)
        if stack.kind != "classifier":
            raise UserError(f"{name}: is an adapter for text, not a classifier; for example imdb-sentiment")
        labels = list(stack.extra.get("labels", LABEL_NAMES))
        return cls(name, backbone.model, backbone.tokenizer, labels, int(stack.extra.get("max_length", 512)))

    def logits(self, texts: Sequence[str], batch_size: int = 64) -> Tensor:
        """(N, labels) float32 on the CPU, in the order of `texts`."""
        return classify_texts(self.model, self.tokenizer, texts, self.max_length, batch_size)

    def probabilities(self, texts: Sequence[str], batch_size: int = 64) -> Tensor:
        """softmax of `logits`."""
        return self.logits(texts, batch_size).softmax(-1)


def is_classifier(name: str) -> bool:
    """Whether a name or folder is a classifier adapter; anything else writes text."""
    entry = resolve(name)
    return entry.kind == "adapter" and read_stack(entry.path).kind == "classifier"


@torch.no_grad()
def classify_texts(
    model: nn.Module, tokenizer: Any, texts: Sequence[str], max_length: int, batch_size: int = 64
) -> Tensor:
    """Class logits (N, labels) of a sequence-classification model; texts of similar length share a batch."""
    device = next(model.parameters()).device
    rows = tokenizer(list(texts), truncation=True, max_length=max_length, add_special_tokens=True)["input_ids"]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    was_training = model.training
    model.eval()
    parts = []
    for start in range(0, len(order), batch_size):
        batch = pad_right([rows[i] for i in order[start : start + batch_size]], tokenizer.pad_token_id)
        parts.append(model(**{name: t.to(device) for name, t in batch.items()}).logits.float().cpu())
    model.train(was_training)
    result = torch.empty_like(torch.cat(parts))
    result[torch.tensor(order)] = torch.cat(parts)
    return result


def pad_right(rows: Sequence[Sequence[int]], pad_id: int) -> dict[str, Tensor]:
    """Token lists -> input_ids and attention_mask, (B, longest). An empty row counts as one pad."""
    width = max(1, *map(len, rows))
    ids = torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * max(1, len(row)) + [0] * (width - max(1, len(row))) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}
