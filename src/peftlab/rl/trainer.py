"""What PPO and RLOO share: the check of the first step, epochs over one rollout, the optimizer, resume to the bit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ..errors import LabError
from ..models.roles import Roles
from ..ops import ranks
from ..ops.kl import k3
from ..ops.masks import masked_mean
from ..sampling.sampler import Decoding, Sampler
from .control import AdaptiveKL, FixedKL
from .finite import require_finite, require_finite_weights
from .gather import all_or_none, gathered, require_same_weights
from .rollout import (
    FirstStep,
    Part,
    PromptBatch,
    Rollout,
    ScoreFunction,
    collect_rollout,
    describe,
    first_step,
    of_rank,
    passes,
)

Loss = tuple[Tensor, dict[str, Tensor]]  # of some rows, with figures


@dataclass(frozen=True)
class UpdateSettings:
    """Hyperparameters of any update; docs/ppo.md gives each one's source. `minibatch_size` 0 takes the whole step.

    `pass_tokens`, which changes memory and time alone: see `rows_per_pass`.
    """

    lr: float = 1e-4
    minibatch_size: int = 0
    pass_tokens: int = 0
    epochs: int = 1
    clip: float = 0.2
    max_grad_norm: float = 1.0
    epoch_kl_stop: float = 0.02
    eos_penalty: float = 0.0
    total_steps: int = 100
    warmup_steps: int = 10
    record_every: int = 10
    ratio_limit: float = 1e-4


Settings = TypeVar("Settings", bound=UpdateSettings)


class PolicyTrainer(Generic[Settings]):
    """Holds what a step needs, and the verbs that it is made of; the algorithm is `step`, of a subclass."""

    loss_per_completion = False  # whether the loss is a mean over completions; else it is one over counted tokens

    def __init__(
        self,
        roles: Roles,
        sampler: Sampler,
        reward: ScoreFunction,
        kl: FixedKL | AdaptiveKL,
        settings: Settings,
        decoding: Decoding,
        seed: int = 0,
    ) -> None:
        self.roles, self.sampler, self.reward, self.kl = roles, sampler, reward, kl
        self.settings, self.decoding = settings, decoding
        self.generator = torch.Generator().manual_seed(seed)
        self.steps_done = 0
        self.first: FirstStep | None = None
        learned = self.learned()
        groups = [{"params": parameters, "lr": lr} for parameters, lr in learned]
        one_kernel = roles.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(groups, eps=1e-5, weight_decay=0.0, fused=one_kernel)
        self.peak_lrs = [lr for _, lr in learned]
        self.trainable = [parameter for parameters, _ in learned for parameter in parameters]

    def learned(self) -> list[tuple[list[nn.Parameter], float]]:
        """The groups of parameters that learn, each with its peak learning rate."""
        return [(list(self.roles.policy_parameters().values()), self.settings.lr)]

    def step(self, prompts: PromptBatch) -> tuple[Rollout, dict[str, float], dict[str, Tensor]]:
        """One update. Returns the rollout, the metrics, and the per-token tensors that the inspector shows."""
        raise NotImplementedError

    def collect(self, prompts: PromptBatch) -> Rollout:
        """A completion of each prompt, scored; LabError where a number of it is not finite.

        With the exact KL in the first step and in every `record_every`-th. Of several processes each takes its share
        of the prompts, and all get the whole: LabError where it is not as large as any other's.
        """
        _require_even("prompts", len(prompts.texts))
        seeds, step = self.draw_seeds(len(prompts.texts)), self.steps_done + 1
        exact = step == 1 or step % self.settings.record_every == 0
        share = ranks.share(len(seeds))
        given, seeds = prompts.take(share), seeds[share.start : share.stop]
        try:
            with all_or_none():
                mine = collect_rollout(
                    self.sampler, self.roles, self.reward, given, seeds, self.decoding, exact, self.settings.pass_tokens
                )
            rollout = gathered(mine, prompts)
        except LabError as error:  # a reward's, which knows no steps
            raise LabError(f"step {step}: {error}; the weights were not updated") from error
        sites = {"logprob": rollout.logprobs, "ref_logprob": rollout.ref_logprobs, "score": rollout.scores}
        sites["value"] = rollout.values
        if rollout.exact_kl is not None:
            sites["exact_kl"] = rollout.exact_kl
        require_finite(step, rollout, sites)
        return rollout

    def check_first(self, rollout: Rollout) -> None:
        """Measures the invariants of a run's first rollout; LabError, before any update, where one is broken.

        Of several processes all must hold the same weights, which only the sums of their gradients move.
        """
        if self.first is None:
            require_same_weights(self.roles)
            settings = self.settings
            self.first = first_step(
                self.roles, rollout, self.decoding.temperature, settings.ratio_limit, settings.pass_tokens
            )
            self.first.check()

    def update(self, rollout: Rollout, minibatch: Callable[[Tensor], dict[str, float]]) -> dict[str, float]:
        """Epochs of `minibatch(rows)` over the rollout, and the means of what it returns.

        They end early when the policy has moved `epoch_kl_stop` nats a token from where it sampled. Where a number of
        any minibatch is not finite, the weights are put back to what they were before the step: LabError.
        """
        self._schedule()
        before = [parameter.detach().clone() for parameter in self.trainable]
        try:
            stats = self._epochs(rollout, minibatch)
            require_finite_weights(self.steps_done + 1, self.roles.state())
        except LabError as error:
            with torch.no_grad():
                for parameter, kept in zip(self.trainable, before, strict=True):
                    parameter.copy_(kept)
            self.roles.refresh()  # passes of this step may have merged what is taken back
            raise LabError(f"{error}; the weights are those before the step") from None
        return stats

    def _epochs(self, rollout: Rollout, minibatch: Callable[[Tensor], dict[str, float]]) -> dict[str, float]:
        totals: dict[str, float] = {}
        count, epochs = 0, 0
        for _ in range(self.settings.epochs):
            drift = 0.0
            for number, rows in enumerate(self._minibatches(len(rollout.completions))):
                try:
                    stats = minibatch(rows)
                except LabError as error:
                    raise LabError(f"{error} in minibatch {number + 1} of epoch {epochs + 1}") from None
                drift = max(drift, stats["policy/approx_kl"])
                totals = {name: totals.get(name, 0.0) + value for name, value in stats.items()}
                count += 1
            epochs += 1
            if drift > self.settings.epoch_kl_stop:
                break
        return {name: total / count for name, total in totals.items()} | {"update/epochs": float(epochs)}

    def backward(
        self, rollout: Rollout, rows: Tensor, loss_of: Callable[[Part], Loss], held: Iterable[nn.Parameter] = ()
    ) -> dict[str, Tensor]:
        """Gradients of a minibatch's loss, clipped together; `held` parameters get none. Returns its figures.

        In passes over rows of similar length. What `loss_of` gives are means, so that of each pass counts
        by its share of the minibatch. Of several processes each takes its rows, and the gradients add up.
        """
        self.optimizer.zero_grad(set_to_none=True)
        mask = rollout.completion_mask
        totals: dict[str, Tensor] = {}
        for part in passes(rollout, of_rank(rollout, rows), self.settings.pass_tokens):
            loss, figures = loss_of(part)
            tokens = mask[part.rows].sum() / mask[rows].sum()
            share = len(part.rows) / len(rows) if self.loss_per_completion else tokens
            (loss * share).backward()
            for name, figure in figures.items():
                of_loss = name == "policy/loss"
                totals[name] = totals.get(name, 0.0) + figure.detach() * (share if of_loss else tokens)
        for parameter in held:
            parameter.grad = None
        ranks.add_up([p.grad for p in self.trainable if p.grad is not None] + list(totals.values()))
        norm = torch.nn.utils.clip_grad_norm_(self.trainable, self.settings.max_grad_norm)
        return totals | {"policy/grad_norm": norm}

    def policy_tokens(self, part: Part) -> tuple[Tensor, Tensor, Tensor]:
        """`Roles.policy_tokens` of a part of the rollout, at the temperature of sampling."""
        return self.roles.policy_tokens(part.ids, part.mask, part.keep, self.decoding.temperature, part.counted)

    def apply(self, stats: dict[str, Tensor]) -> dict[str, float]:
        """Moves the weights and returns `stats` as numbers; LabError, and no move, where one is not finite."""
        numbers = dict(zip(stats, torch.stack([s.detach().float() for s in stats.values()]).tolist(), strict=True))
        for name, number in numbers.items():
            if not abs(number) < float("inf"):
                require_finite_weights(self.steps_done + 1, self.roles.state())  # an earlier minibatch's fault
                raise LabError(f"step {self.steps_done + 1}: {name} is {number}")
        self.optimizer.step()
        self.roles.moved()
        return numbers

    def finish(self, rollout: Rollout) -> dict[str, float]:
        """Ends a step: the sampler gets the new policy, the controller the KL. Returns the rollout's metrics."""
        self.roles.refresh()
        stats = describe(rollout) | {"kl/coef": self.kl.coef}
        self.kl.update(stats["kl/reference"], len(rollout.completions))
        self.steps_done += 1
        return stats

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
        """Goes on from what `state_dict` gave."""
        self.roles.load_state(state["roles"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.kl.coef, self.steps_done = state["kl_coef"], state["steps_done"]
        self.first = FirstStep(*state["first"]) if state["first"] else None

    def _minibatches(self, rows: int) -> Iterator[Tensor]:
        size = self.settings.minibatch_size or rows
        _require_even("minibatch_size", size)
        order = torch.randperm(rows, generator=self.generator).to(self.roles.device)
        yield from order.split(size)

    def _schedule(self) -> None:
        """Linear warm-up, then linear decay to zero at `total_steps`."""
        step, settings = self.steps_done, self.settings
        warm = min(1.0, (step + 1) / max(1, settings.warmup_steps))
        scale = warm * max(0.0, 1.0 - step / settings.total_steps)
        for group, lr in zip(self.optimizer.param_groups, self.peak_lrs, strict=True):
            group["lr"] = lr * scale


def _require_even(what: str, count: int) -> None:
    """LabError where the processes cannot share `count` rows evenly: one without any would leave the others waiting."""
    if count % ranks.size():
        raise LabError(f"{what}: {count} cannot be shared evenly by {ranks.size()} processes")


def policy_stats(old: Tensor, logprobs: Tensor, entropies: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """How far the policy is from where it sampled, and how spread out."""
    return {
        "policy/approx_kl": masked_mean(k3(old, logprobs), mask),
        "policy/entropy": masked_mean(entropies, mask),
    }


class Stopwatch:
    """Seconds of the parts of a step, by the names of their metrics."""

    def __init__(self) -> None:
        self.started = self.last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """The part `name` ends now, and the next one begins."""
        now = time.perf_counter()
        self.laps[name] = now - self.last
        self.last = now

    def metrics(self) -> dict[str, float]:
        """Each part, and the step up to its last one."""
        return self.laps | {"time/step_s": self.last - self.started}
