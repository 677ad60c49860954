"""Proximal policy optimisation of a LoRA policy with a critic, on one frozen base.

Departures from Schulman et al. 2017 and Ziegler et al. 2019, all deliberate:
- The reference is the same base with adapters off; there is no second model.
- The log-probabilities of sampling are reused as the old ones: no second pass over the rollout.
- KL to the reference is a k1 penalty inside the reward, per token; none in the loss.
- Losses are means over counted tokens of the minibatch; pads never enter a mean.
- The epochs of a step end early once the policy has moved `epoch_kl_stop` nats a token from where it sampled.
- The critic starts at the level of the first rollout's returns: with gamma 1, a reward's mean does not matter.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..models.heads import ScalarHead
from ..ops.advantages import explained_variance, gae
from ..ops.losses import ppo_policy_loss, value_loss
from ..ops.masks import masked_mean, masked_whiten
from .finite import require_finite
from .rollout import Part, PromptBatch, Rollout, shaped_rewards
from .trainer import Loss, PolicyTrainer, Stopwatch, UpdateSettings, policy_stats


@dataclass(frozen=True)
class PPOSettings(UpdateSettings):
    """Hyperparameters of the update; docs/ppo.md gives each one's source."""

    critic_lr: float = 2e-4
    minibatch_size: int = 32
    epochs: int = 4
    gamma: float = 1.0
    lam: float = 0.95
    value_clip: float = 0.2
    value_coef: float = 0.1
    critic_warmup: int = 0


class PPOTrainer(PolicyTrainer[PPOSettings]):
    """Holds what a step needs; `step` is the algorithm, its verbs are those of `PolicyTrainer`."""

    def step(self, prompts: PromptBatch) -> tuple[Rollout, dict[str, float], dict[str, Tensor]]:
        """One update. Returns the rollout, the metrics, and the per-token tensors that the inspector shows."""
        settings, watch = self.settings, Stopwatch()
        rollout = self.collect(prompts)
        watch.lap("time/rollout_s")
        self.check_first(rollout)
        mask = rollout.completion_mask
        rewards = shaped_rewards(rollout, self.kl.coef, settings.eos_penalty)
        if self.steps_done == 0 and (head := self.roles.head) is not None:
            rollout = self._level(head, rollout, rewards)
        advantages, returns = gae(rewards, rollout.values, mask, settings.gamma, settings.lam)
        require_finite(self.steps_done + 1, rollout, {"reward": rewards, "advantage": advantages})
        whitened = masked_whiten(advantages, mask)
        stats = self.update(rollout, lambda rows: self._minibatch(rollout, whitened, returns, rows))
        stats |= self.finish(rollout)
        stats["value/explained_variance"] = float(explained_variance(rollout.values, returns, mask))
        watch.lap("time/update_s")
        return rollout, stats | watch.metrics(), {"reward": rewards, "advantage": advantages}

    def learned(self) -> list[tuple[list[nn.Parameter], float]]:
        """The policy's LoRA, and the critic at a rate of its own."""
        critic = list(self.roles.critic_parameters().values())
        return [*super().learned(), (critic, self.settings.critic_lr)]

    @torch.no_grad()
    def _level(self, head: ScalarHead, rollout: Rollout, rewards: Tensor) -> Rollout:
        """Moves the critic's bias, and its values here, by the mean of what they miss of the rewards to come.

        A critic at 0 that `value_clip` holds would need step after step to reach a reward whose mean is 5, and until
        then every last token would look better than the ones before it.
        """
        mask = rollout.completion_mask
        _, returns = gae(rewards, rollout.values, mask, self.settings.gamma, lam=1.0)
        require_finite(self.steps_done + 1, rollout, {"reward": rewards, "return": returns})
        missed = masked_mean(returns - rollout.values, mask)
        head.linear.bias.add_(missed)
        return replace(rollout, values=(rollout.values + missed) * mask)

    def _minibatch(self, rollout: Rollout, advantages: Tensor, returns: Tensor, rows: Tensor) -> dict[str, float]:
        critic_only = self.steps_done < self.settings.critic_warmup
        held = self.roles.policy_parameters().values() if critic_only else ()
        stats = self.backward(
            rollout, rows, lambda part: self._loss(rollout, advantages, returns, part, critic_only), held
        )
        return self.apply(stats)

    def _loss(self, rollout: Rollout, advantages: Tensor, returns: Tensor, part: Part, critic_only: bool) -> Loss:
        settings = self.settings
        mask, old, old_values, advantages, returns = (
            tensor[part.rows, : part.keep]
            for tensor in (rollout.completion_mask, rollout.logprobs, rollout.values, advantages, returns)
        )
        logprobs, entropies, values = self.policy_tokens(part)
        policy, clipped = ppo_policy_loss(logprobs, old, advantages, mask, settings.clip)
        value, value_clipped = value_loss(values, old_values, returns, mask, settings.value_clip)
        return settings.value_coef * value + (0.0 if critic_only else policy), {
            "policy/loss": policy,
            "policy/clip_fraction": clipped,
            **policy_stats(old, logprobs, entropies, mask),
            "value/loss": value,
            "value/clip_fraction": value_clipped,
        }
