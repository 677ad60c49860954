"""A trained reward model as a reward function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..models.reward_model import RewardModel
from ..models.whole import WholeReward


def learned(model: RewardModel | WholeReward) -> Callable[..., Tensor]:
    """Reward function: the model's scores; an adapter's have mean 0 and variance 1 over what it was trained on."""

    def reward(prompts: Sequence[str], completions: Sequence[str], records: Sequence[Any]) -> Tensor:
        return model.scores(prompts, completions)

    return reward
