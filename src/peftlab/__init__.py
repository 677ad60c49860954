"""PEFT Lab: shape the behaviour of language models with adapters on one frozen base.

The names below load on first use, so `import peftlab` costs nothing:

    from peftlab import PPOTrainer, Roles, Sampler, collect_rollout, gae, load_model
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "load_model": "models.adapter_files:load_stack",
    "load_backbone": "models.backbone:load_backbone",
    "Lora": "models.adapters:Lora",
    "Roles": "models.roles:Roles",
    "TextClassifier": "models.classifier:TextClassifier",
    "Sampler": "sampling.sampler:Sampler",
    "Decoding": "sampling.sampler:Decoding",
    "Reward": "rewards.parts:Reward",
    "RewardPart": "rewards.parts:RewardPart",
    "PromptBatch": "rl.rollout:PromptBatch",
    "Rollout": "rl.rollout:Rollout",
    "collect_rollout": "rl.rollout:collect_rollout",
    "shaped_rewards": "rl.rollout:shaped_rewards",
    "PPOSettings": "rl.ppo:PPOSettings",
    "PPOTrainer": "rl.ppo:PPOTrainer",
    "RLOOSettings": "rl.rloo:RLOOSettings",
    "RLOOTrainer": "rl.rloo:RLOOTrainer",
    "FixedKL": "rl.control:FixedKL",
    "AdaptiveKL": "rl.control:AdaptiveKL",
    "gae": "ops.advantages:gae",
    "leave_one_out": "ops.advantages:leave_one_out",
    "exact_kl": "ops.kl:exact_kl",
}
__all__ = ["__version__", *_WHERE]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'peftlab' has no attribute {name!r}")
    module, _, attribute = _WHERE[name].partition(":")
    return getattr(importlib.import_module(f"peftlab.{module}"), attribute)
