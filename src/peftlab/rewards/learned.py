"""A trained reward model as a reward function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..models.reward_model import RewardModel


def learned(model: RewardModel) -> Callable[..., Tensor]:
    """Reward function: the model's scores, of mean 0 and variance 1 over the answers that it was trained on."""

    def reward(prompts: Sequence[str], completions: Sequence[str], records: Sequence[Any]) -> Tensor:
        return model.scores(prompts, completions)

    return reward
