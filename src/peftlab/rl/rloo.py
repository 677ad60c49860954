"""REINFORCE with a leave-one-out baseline (RLOO) on a LoRA policy, on one frozen base and without a critic.

Each prompt is answered k times; a completion is paid by how much its return exceeds the mean of the other k - 1.
Departures from Kool et al. 2019 and Ahmadian et al. 2024, all deliberate:
- The reference is the same base with adapters off; there is no second model.
- The log-probabilities of sampling are reused as the old ones: no second pass over the rollout.
- Where a rollout is used more than once, the ratios are those of tokens, each clipped as in PPO, not of completions.
- The loss is divided by the longest completion allowed, a constant that an adaptive optimizer takes out again.
- `scale_by_std` and `length_normaliser = "sequence"` together make GRPO's update, each on its own half of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..ops.advantages import leave_one_out
from ..ops.losses import rloo_policy_loss
from .finite import require_finite
from .rollout import Part, PromptBatch, Rollout, shaped_rewards
from .trainer import Loss, PolicyTrainer, Stopwatch, UpdateSettings, policy_stats


@dataclass(frozen=True)
class RLOOSettings(UpdateSettings):
    """Hyperparameters of the update; docs/rloo.md gives each one's source."""

    samples_per_prompt: int = 4
    scale_by_std: bool = False
    length_normaliser: Literal["fixed", "sequence"] = "fixed"


class RLOOTrainer(PolicyTrainer[RLOOSettings]):
    """Holds what a step needs; `step` is the algorithm, its verbs are those of `PolicyTrainer`."""

    loss_per_completion = True

    def step(self, prompts: PromptBatch) -> tuple[Rollout, dict[str, float], dict[str, Tensor]]:
        """One update. Returns the rollout, the metrics, and the per-token tensors that the inspector shows."""
        settings, watch = self.settings, Stopwatch()
        k = settings.samples_per_prompt
        rollout = self.collect(prompts.repeated(k))
        watch.lap("time/rollout_s")
        self.check_first(rollout)
        rewards = shaped_rewards(rollout, self.kl.coef, settings.eos_penalty)
        returns = rewards.sum(1)
        advantages = leave_one_out(returns, k, settings.scale_by_std).unsqueeze(1) * rollout.completion_mask
        require_finite(self.steps_done + 1, rollout, {"reward": rewards, "advantage": advantages})
        stats = self.update(rollout, lambda rows: self._minibatch(rollout, advantages, rows))
        stats |= self.finish(rollout)
        stats["reward/group_std"] = float(returns.view(-1, k).std(1).mean())
        watch.lap("time/update_s")
        return rollout, stats | watch.metrics(), {"reward": rewards, "advantage": advantages}

    def _minibatch(self, rollout: Rollout, advantages: Tensor, rows: Tensor) -> dict[str, float]:
        return self.apply(self.backward(rollout, rows, lambda part: self._loss(rollout, advantages, part)))

    def _loss(self, rollout: Rollout, advantages: Tensor, part: Part) -> Loss:
        settings = self.settings
        mask, old, advantages = (
            tensor[part.rows, : part.keep] for tensor in (rollout.completion_mask, rollout.logprobs, advantages)
        )
        logprobs, entropies, _ = self.policy_tokens(part)
        length = self.decoding.max_new_tokens if settings.length_normaliser == "fixed" else None
        loss, clipped = rloo_policy_loss(logprobs, old, advantages, mask, settings.clip, length)
        figures = {"policy/loss": loss, "policy/clip_fraction": clipped}
        return loss, figures | policy_stats(old, logprobs, entropies, mask)
