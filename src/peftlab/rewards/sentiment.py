"""How positive (or negative) a text is, by a sentiment classifier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..errors import UserError
from ..models.classifier import TextClassifier


def class_of(classifier: TextClassifier, wanted: str) -> int:
    """Index of the class named `wanted`; UserError where the classifier is not one of two classes with that name."""
    if len(classifier.labels) != 2 or wanted not in classifier.labels:
        raise UserError(
            f"classifier {classifier.name}: has classes {classifier.labels}; want={wanted} needs two, negative and "
            "positive, by these names (or neg and pos, or LABEL_0 and LABEL_1)"
        )
    return classifier.labels.index(wanted)


def log_odds(classifier: TextClassifier, wanted: str) -> Callable[..., Tensor]:
    """Reward function: log p(wanted) - log p(the other) of prompt + completion, in nats; unbounded, 0 is undecided."""
    label = class_of(classifier, wanted)

    def reward(prompts: Sequence[str], completions: Sequence[str], records: Sequence[Any]) -> Tensor:
        logits = classifier.logits([p + c for p, c in zip(prompts, completions, strict=True)])
        return logits[:, label] - logits[:, 1 - label]

    return reward


def probability(classifier: TextClassifier, wanted: str) -> Callable[..., Tensor]:
    """Reward function: p(wanted) of prompt + completion, from 0 to 1: more is not earned by what is praise already."""
    odds = log_odds(classifier, wanted)
    return lambda *given: odds(*given).sigmoid()
