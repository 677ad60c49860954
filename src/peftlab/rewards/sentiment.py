"""How positive (or negative) a text is, by a sentiment classifier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..models.classifier import TextClassifier

SENTIMENTS = {"negative": 0, "positive": 1}


def log_odds(classifier: TextClassifier, wanted: str) -> Callable[..., Tensor]:
    """Reward function: log p(wanted) - log p(the other) of prompt + completion, in nats; unbounded, 0 is undecided."""
    label = SENTIMENTS[wanted]

    def reward(prompts: Sequence[str], completions: Sequence[str], records: Sequence[Any]) -> Tensor:
        logits = classifier.logits([p + c for p, c in zip(prompts, completions, strict=True)])
        return logits[:, label] - logits[:, 1 - label]

    return reward
