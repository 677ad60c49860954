"""Texts to class logits with a classifier adapter on its base, merged for speed, or with a whole classifier."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data.collate import collate_tokens
from ..data.records import LABELS
from ..errors import UserError, with_article
from ..runs.progress import batch_starts
from .adapter_files import load_stack
from .backbone import Backbone, load_backbone
from .catalog import resolve

LABEL_NAMES = ["negative", "positive"]
LONGEST = 512  # tokens of a text, where nothing else says how many


@dataclass(frozen=True)
class TextClassifier:
    """A loaded classifier. `labels` are the names of its classes; of texts over `max_length` tokens it reads opening
    and ending; its logits are divided by `temperature`, which was fitted so that its probabilities can be trusted."""

    name: str
    model: nn.Module
    tokenizer: Any
    labels: list[str]
    max_length: int
    temperature: float = 1.0

    @classmethod
    def load(cls, name: str, device: str = "auto", dtype: str = "float32") -> TextClassifier:
        """A classifier adapter or a whole classifier, by name or folder. Raises UserError for anything else."""
        entry = resolve(name)
        if entry.kind == "classifier":
            whole = load_backbone(name, "classifier", device=device, dtype=dtype, num_labels=None)
            if whole.model.config.problem_type == "multi_label_classification":
                raise UserError(f"{name}: its labels do not exclude each other; call it from a function of yours")
            return cls(name, whole.model, whole.tokenizer, _labels(whole.model), longest_text(whole))
        if entry.kind != "adapter":
            what = with_article(entry.kind)
            raise UserError(f"{name}: is {what} model, not a classifier; for example imdb-sentiment")
        backbone, stack = load_stack(name, device=device, dtype=dtype)
        if stack.kind != "classifier":
            raise UserError(f"{name}: is an adapter for text, not a classifier; for example imdb-sentiment")
        facts = {"labels": LABEL_NAMES, "max_length": LONGEST, "temperature": 1.0, **stack.extra}
        length, temperature = facts["max_length"], facts["temperature"]
        if not (isinstance(length, int) and length >= 4):
            raise UserError(f"{name}: stack.json says max_length {length!r}; it is a number of tokens, 4 or more")
        if not (isinstance(temperature, int | float) and 0 < temperature < math.inf):
            raise UserError(f"{name}: stack.json says temperature {temperature!r}; it is a number above 0")
        return cls(name, backbone.model, backbone.tokenizer, list(facts["labels"]), length, float(temperature))

    def logits(self, texts: Sequence[str], batch_size: int = 64) -> Tensor:
        """(N, labels) float32 on the CPU, in the order of `texts`."""
        return classify_texts(self.model, self.tokenizer, texts, self.max_length, batch_size) / self.temperature

    def probabilities(self, texts: Sequence[str], batch_size: int = 64) -> Tensor:
        """softmax of `logits`."""
        return self.logits(texts, batch_size).softmax(-1)


def longest_text(whole: Backbone) -> int:
    """Tokens of a text that a whole model reads: what its tokenizer allows, 512 at most."""
    room = getattr(whole.model.config, "max_position_embeddings", LONGEST)
    for name, places in whole.model.named_modules():
        if name.endswith("position_embeddings") and getattr(places, "padding_idx", None) is not None:
            room = places.num_embeddings - places.padding_idx - 1  # RoBERTa counts from behind its padding
    return min(LONGEST, whole.tokenizer.model_max_length, room)


def _labels(model: Any) -> list[str]:
    """The classes of a whole model as the lab spells them: pos, POSITIVE and LABEL_1 of two are `positive`."""
    written = [str(name) for _, name in sorted(model.config.id2label.items())]
    names = [name.lower() for name in written]
    known = [LABELS.get(name.removeprefix("label_"), -1) for name in names]
    if sorted(known) == [0, 1]:
        return [LABEL_NAMES[label] for label in known]
    return names if len(set(names)) == len(names) else written


def own_labels(labels: Sequence[str]) -> list[str] | None:
    """What data is told of these labels: None for the default names, for which it also knows neg, pos, 0 and 1."""
    return None if list(labels) == LABEL_NAMES else list(labels)


@torch.no_grad()
def classify_texts(
    model: nn.Module, tokenizer: Any, texts: Sequence[str], max_length: int, batch_size: int = 64
) -> Tensor:
    """Class logits (N, labels) of a sequence-classification model; texts of similar length share a batch.

    A decoder's are read at the last token that does not pad. One that knows no padding gets a text at a time.
    """
    device = next(model.parameters()).device
    config: Any = model.config
    pad_id = config.pad_token_id
    batch_size = batch_size if pad_id is not None else 1
    rows = encode(tokenizer, texts, max_length)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    was_training = model.training
    model.eval()
    parts = []
    for start in batch_starts(len(order), batch_size):
        batch = collate_tokens([rows[i] for i in order[start : start + batch_size]], pad_id or 0)
        parts.append(model(**{name: t.to(device) for name, t in batch.items()}).logits.float().cpu())
    model.train(was_training)
    result = torch.empty_like(torch.cat(parts))
    result[torch.tensor(order)] = torch.cat(parts)
    return result


def encode(tokenizer: Any, texts: Sequence[str], max_length: int) -> list[list[int]]:
    """Token ids, special tokens included. Of a longer text the opening and the ending are kept, half of `max_length`
    each: a review's verdict often stands at its end (Sun et al. 2019, head + tail)."""
    head = max_length // 2
    rows = tokenizer(list(texts), add_special_tokens=True, verbose=False)["input_ids"] if texts else []
    return [ids if len(ids) <= max_length else [*ids[:head], *ids[head - max_length :]] for ids in rows]
