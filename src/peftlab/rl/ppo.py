"""Proximal policy optimisation of a LoRA policy with a critic, on one frozen base.

Departures from Schulman et al. 2017 and Ziegler et al. 2019, all deliberate:
- The reference is the same base with adapters off; there is no second model.
- The log-probabilities of sampling are reused as the old ones: no second pass over the rollout.
- KL to the reference is a k1 penalty inside the reward, per token; none in the loss.
- Losses are means over counted tokens of the minibatch; pads never enter a mean.
- The epochs of a step end early once the policy has moved `epoch_kl_stop` nats a token from where it sampled.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import LabError
from ..models.roles import Roles
from ..ops.advantages import explained_variance, gae
from ..ops.kl import k1, k3
from ..ops.logprobs import entropy, token_logprobs
from ..ops.losses import ppo_policy_loss, value_loss
from ..ops.masks import masked_mean, masked_sum, masked_whiten
from ..sampling.sampler import Decoding, Sampler
from .control import AdaptiveKL, FixedKL
from .rollout import FirstStep, PromptBatch, Rollout, ScoreFunction, collect_rollout, first_step, shaped_rewards


@dataclass(frozen=True)
class PPOSettings:
    """Hyperparameters of the update; docs/ppo.md gives each one's source."""

    lr: float = 1e-4
    critic_lr: float = 2e-4
    minibatch_size: int = 32
    epochs: int = 4
    gamma: float = 1.0
    lam: float = 0.95
    clip: float = 0.2
    value_clip: float = 0.2
    value_coef: float = 0.1
    max_grad_norm: float = 1.0
    epoch_kl_stop: float = 0.02
    critic_warmup: int = 0
    eos_penalty: float = 0.0
    total_steps: int = 100
    warmup_steps: int = 10
    ratio_limit: float = 1e-4


class PPOTrainer:
    """Holds what a step needs; `step` is the algorithm."""

    def __init__(
        self,
        roles: Roles,
        sampler: Sampler,
        reward: ScoreFunction,
        kl: FixedKL | AdaptiveKL,
        settings: PPOSettings,
        decoding: Decoding,
        seed: int = 0,
    ) -> None:
        self.roles, self.sampler, self.reward, self.kl = roles, sampler, reward, kl
        self.settings, self.decoding = settings, decoding
        self.generator = torch.Generator().manual_seed(seed)
        self.steps_done = 0
        self.first: FirstStep | None = None
        groups = [
            {"params": list(roles.policy_parameters().values()), "lr": settings.lr},
            {"params": list(roles.critic_parameters().values()), "lr": settings.critic_lr},
        ]
        self.optimizer = torch.optim.AdamW(groups, eps=1e-5, weight_decay=0.0)
        self.base_lrs = [settings.lr, settings.critic_lr]

    def step(self, prompts: PromptBatch) -> tuple[Rollout, dict[str, float], dict[str, Tensor]]:
        """One update. Returns the rollout, the metrics, and the per-token tensors that the inspector shows."""
        settings, started = self.settings, time.perf_counter()
        rollout = collect_rollout(
            self.sampler, self.roles, self.reward, prompts, self.draw_seeds(len(prompts.texts)), self.decoding
        )
        sampled = time.perf_counter()
        if self.first is None:
            self.first = first_step(self.roles, rollout, self.decoding.temperature, settings.ratio_limit)
            self.first.check()
        mask = rollout.completion_mask
        rewards = shaped_rewards(rollout, self.kl.coef, settings.eos_penalty)
        advantages, returns = gae(rewards, rollout.values, mask, settings.gamma, settings.lam)
        stats = self.update(rollout, masked_whiten(advantages, mask), returns)
        self.roles.refresh()
        stats |= describe(rollout, returns) | {"kl/coef": self.kl.coef}
        self.kl.update(stats["kl/reference"], len(prompts.texts))
        self.steps_done += 1
        finished = time.perf_counter()
        stats |= {"time/rollout_s": sampled - started, "time/update_s": finished - sampled}
        stats["time/step_s"] = finished - started
        return rollout, stats, {"reward": rewards, "advantage": advantages}

    def update(self, rollout: Rollout, advantages: Tensor, returns: Tensor) -> dict[str, float]:
        """Epochs of minibatch updates on one rollout; stops early when the policy has moved far enough."""
        self._schedule()
        totals: dict[str, float] = {}
        count, epochs = 0, 0
        for _ in range(self.settings.epochs):
            drift = 0.0
            for rows in self._minibatches(len(advantages)):
                stats = self._minibatch(rollout, advantages, returns, rows)
                drift = max(drift, stats["policy/approx_kl"])
                totals = {name: totals.get(name, 0.0) + value for name, value in stats.items()}
                count += 1
            epochs += 1
            if drift > self.settings.epoch_kl_stop:
                break
        return {name: total / count for name, total in totals.items()} | {"update/epochs": float(epochs)}

    def _minibatch(self, rollout: Rollout, advantages: Tensor, returns: Tensor, rows: Tensor) -> dict[str, float]:
        settings, mask = self.settings, rollout.completion_mask[rows]
        tokens, old = rollout.completion_ids[rows], rollout.logprobs[rows]
        logits, values = self.roles.policy_and_values(rollout.ids[rows], rollout.mask[rows], tokens.shape[1])
        logprobs = token_logprobs(logits, tokens, self.decoding.temperature)
        policy, clipped = ppo_policy_loss(logprobs, old, advantages[rows], mask, settings.clip)
        value, value_clipped = value_loss(values, rollout.values[rows], returns[rows], mask, settings.value_clip)
        critic_only = self.steps_done < settings.critic_warmup
        loss = settings.value_coef * value + (0.0 if critic_only else policy)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if critic_only:
            for parameter in self.roles.policy_parameters().values():
                parameter.grad = None
        norm = torch.nn.utils.clip_grad_norm_(self._trainable(), settings.max_grad_norm)
        stats = {
            "policy/loss": policy,
            "policy/clip_fraction": clipped,
            "policy/approx_kl": masked_mean(k3(old, logprobs), mask),
            "policy/entropy": masked_mean(entropy(logits.detach(), self.decoding.temperature), mask),
            "policy/grad_norm": norm,
            "value/loss": value,
            "value/clip_fraction": value_clipped,
        }
        numbers = dict(zip(stats, torch.stack([s.detach().float() for s in stats.values()]).tolist(), strict=True))
        for name, number in numbers.items():
            if not abs(number) < float("inf"):
                raise LabError(f"step {self.steps_done + 1}: {name} is {number}; the weights were not updated")
        self.optimizer.step()
        return numbers

    def draw_seeds(self, count: int) -> list[int]:
        """Fresh row seeds for the sampler, from the run's own generator."""
        return torch.randint(2**62, (count,), generator=self.generator).tolist()

    def state_dict(self) -> dict[str, Any]:
        """All that a bit-exact resume needs besides the data cursor and the reward's normalisation."""
        return {
            "roles": self.roles.state(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "kl_coef": self.kl.coef,
            "steps_done": self.steps_done,
            "first": [self.first.kl, self.first.ratio_error, self.first.ratio_limit] if self.first else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.roles.load_state(state["roles"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.kl.coef, self.steps_done = state["kl_coef"], state["steps_done"]
        self.first = FirstStep(*state["first"]) if state["first"] else None

    def _minibatches(self, rows: int) -> Iterator[Tensor]:
        order = torch.randperm(rows, generator=self.generator).to(self.roles.device)
        yield from order.split(self.settings.minibatch_size)

    def _schedule(self) -> None:
        """Linear warm-up, then linear decay to zero at `total_steps`."""
        step, settings = self.steps_done, self.settings
        warm = min(1.0, (step + 1) / max(1, settings.warmup_steps))
        scale = warm * max(0.0, 1.0 - step / settings.total_steps)
        for group, lr in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = lr * scale

    def _trainable(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]


def describe(rollout: Rollout, returns: Tensor) -> dict[str, float]:
    """Metrics of a rollout itself, whatever algorithm learns from it."""
    mask = rollout.completion_mask
    lengths = mask.sum(1).float()
    stats = {
        "reward/mean": rollout.scores.mean(),
        "reward/std": rollout.scores.std(unbiased=False),
        "kl/reference": masked_sum(k1(rollout.logprobs, rollout.ref_logprobs), mask).mean(),
        "kl/k3": masked_sum(k3(rollout.logprobs, rollout.ref_logprobs), mask).mean(),
        "value/explained_variance": explained_variance(rollout.values, returns, mask),
        "rollout/length": lengths.mean(),
        "rollout/eos_fraction": rollout.ended.float().mean(),
    }
    stats |= {f"reward/part/{name}": part.mean() for name, part in rollout.score_parts.items()}
    return {name: float(value) for name, value in stats.items()}
