"""What one step of reinforcement learning looks at: completions with everything known about each of their tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import LabError
from ..models.roles import Roles
from ..ops.kl import exact_kl, k1, k2, k3
from ..ops.logprobs import token_logprobs
from ..ops.masks import masked_sum
from ..sampling.sampler import Decoding, Sampler, Samples

# Numbers in the logits of one scoring pass: beside them, temporaries of four times their size at most.
LOGITS_PER_PASS = 2**27
ScoreFunction = Callable[[Sequence[str], Sequence[str], Sequence[Any]], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class PromptBatch:
    """B prompts: their token lists, their texts, and the records they came from (labels, ids)."""

    token_ids: list[list[int]]
    texts: list[str]
    records: list[Any]

    def take(self, rows: Iterable[int]) -> PromptBatch:
        """The prompts of these rows, in their order."""
        chosen = list(rows)
        return PromptBatch(
            [self.token_ids[row] for row in chosen],
            [self.texts[row] for row in chosen],
            [self.records[row] for row in chosen],
        )

    def repeated(self, k: int) -> PromptBatch:
        """Each prompt k times, its copies side by side: B * k rows."""
        return self.take(row for row in range(len(self.texts)) for _ in range(k))


@dataclass(frozen=True)
class Rollout:
    """B completions of C tokens. Masks are True where a token counts; float tensors are float32.

    prompts          the batch they answer
    prompt_ids       (B, P) left-padded;  prompt_mask (B, P)
    completion_ids   (B, C);              completion_mask (B, C), up to and including EOS
    ended            (B,)   True where the EOS was sampled
    completions      B texts
    logprobs         (B, C) of the policy while it sampled
    ref_logprobs     (B, C) of the frozen reference
    exact_kl         (B, C) KL(policy || reference) over the whole vocabulary at each token, in nats; None unless asked
    values           (B, C) the critic's estimate before each token; 0 without a critic
    scores           (B,)   reward of the whole completion
    score_parts      {name: (B,)}
    """

    prompts: PromptBatch
    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    completion_mask: Tensor
    ended: Tensor
    completions: list[str]
    logprobs: Tensor
    ref_logprobs: Tensor
    exact_kl: Tensor | None
    values: Tensor
    scores: Tensor
    score_parts: dict[str, Tensor]

    @property
    def ids(self) -> Tensor:
        return torch.cat([self.prompt_ids, self.completion_ids], 1)

    @property
    def mask(self) -> Tensor:
        return torch.cat([self.prompt_mask, self.completion_mask], 1)


def collect_rollout(
    sampler: Sampler,
    roles: Roles,
    reward: ScoreFunction,
    prompts: PromptBatch,
    seeds: Sequence[int],
    decoding: Decoding,
    exact: bool = False,
) -> Rollout:
    """Sample a completion per prompt and score it: reward, reference and critic.

    `exact` asks for the exact KL as well, which costs a pass of the policy.
    """
    samples = sampler.sample(prompts.token_ids, seeds, decoding)
    completions = sampler.texts(samples)
    scores, parts = reward(prompts.texts, completions, prompts.records)
    ref_logprobs, values, kl = _score_tokens(roles, samples, decoding.temperature, exact)
    return Rollout(
        prompts=prompts,
        prompt_ids=samples.prompt_ids,
        prompt_mask=samples.prompt_mask,
        completion_ids=samples.completion_ids,
        completion_mask=samples.completion_mask,
        ended=samples.ended,
        completions=completions,
        logprobs=samples.logprobs,
        ref_logprobs=ref_logprobs,
        exact_kl=kl,
        values=values,
        scores=scores.to(samples.logprobs.device),
        score_parts=parts,
    )


@torch.no_grad()
def _score_tokens(
    roles: Roles, samples: Samples, temperature: float, exact: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probabilities of the reference, values, and the exact KL if it is asked for, each (B, C)."""
    keep, counted = samples.completion_ids.shape[1], samples.completion_mask
    logprobs, values, kl = torch.zeros(3, *counted.shape, device=counted.device).unbind()
    for rows in _scoring_passes(roles, samples):
        ids, mask = samples.ids[rows], samples.mask[rows]
        reference = roles.reference(ids, mask, keep)
        logprobs[rows] = token_logprobs(reference, samples.completion_ids[rows], temperature)
        values[rows] = roles.values(ids, mask, keep)
        if exact:  # of the tempered distributions, as the estimates from sampled tokens are
            kl[rows] = exact_kl(roles.policy(ids, mask, keep) / temperature, reference / temperature)
    return logprobs * counted, values * counted, kl * counted if exact else None


def _scoring_passes(roles: Roles, rows: Samples | Rollout) -> Iterator[slice]:
    """Rows that are scored together: logits of all would be gigabytes where the vocabulary is large."""
    count, keep = rows.completion_ids.shape
    size = max(1, LOGITS_PER_PASS // (keep * roles.model.config.vocab_size))
    yield from (slice(start, start + size) for start in range(0, count, size))


def shaped_rewards(rollout: Rollout, kl_coef: float, eos_penalty: float = 0.0) -> Tensor:
    """Per-token rewards (B, C): -kl_coef * k1 at every token, plus the score at the last one.

    The k1 estimate inside the reward makes the policy gradient of the KL term unbiased (Ziegler et al. 2019, eq. 2).
    `eos_penalty` is taken off completions that were cut before an EOS.
    """
    mask = rollout.completion_mask
    rewards = -kl_coef * (rollout.logprobs - rollout.ref_logprobs) * mask
    scores = rollout.scores - eos_penalty * ~rollout.ended
    last = mask.sum(1).clamp(min=1) - 1
    return rewards.scatter_add(1, last.unsqueeze(1), scores.unsqueeze(1))


def describe(rollout: Rollout) -> dict[str, float]:
    """Metrics of a rollout itself, whatever algorithm learns from it."""
    mask = rollout.completion_mask
    lengths = mask.sum(1).float()
    stats = {
        "reward/mean": rollout.scores.mean(),
        "reward/std": rollout.scores.std(unbiased=False),
        "kl/reference": masked_sum(k1(rollout.logprobs, rollout.ref_logprobs), mask).mean(),
        "kl/k2": masked_sum(k2(rollout.logprobs, rollout.ref_logprobs), mask).mean(),
        "kl/k3": masked_sum(k3(rollout.logprobs, rollout.ref_logprobs), mask).mean(),
        "rollout/length": lengths.mean(),
        "rollout/eos_fraction": rollout.ended.float().mean(),
    }
    if rollout.exact_kl is not None:
        stats["kl/exact"] = rollout.exact_kl.sum(1).mean()
    stats |= {f"reward/part/{name}": part.mean() for name, part in rollout.score_parts.items()}
    return {name: float(value) for name, value in stats.items()}


@dataclass(frozen=True)
class FirstStep:
    """The two invariants of a run that starts right. `ratio_limit` is the declared limit of the dtype and device."""

    kl: float
    ratio_error: float
    ratio_limit: float

    def metrics(self) -> dict[str, float]:
        return {"invariant/first_kl": self.kl, "invariant/first_ratio_error": self.ratio_error}

    def check(self) -> None:
        """Raises LabError, which stops the run before its first update."""
        if self.kl != 0.0:
            raise LabError(
                f"invariant/first_kl is {self.kl!r}, not 0.0: the policy differs from its reference before any "
                "update (dropout on, an adapter that is not fresh, or a base changed by merging)"
            )
        if not self.ratio_error <= self.ratio_limit:
            raise LabError(
                f"invariant/first_ratio_error is {self.ratio_error:.2e}, above {self.ratio_limit:.0e}: the sampler's "
                "log-probabilities are not those of the policy (positions, padding, temperature or precision)"
            )


@torch.no_grad()
def first_step(roles: Roles, rollout: Rollout, temperature: float, ratio_limit: float) -> FirstStep:
    """Measure both invariants on a rollout taken before the first update.

    first_kl: summed exact KL between adapters-on and adapters-off logits, the largest completion of the batch.
    first_ratio_error: max |exp(recomputed - sampled) - 1| over counted tokens.
    """
    keep, largest = rollout.completion_ids.shape[1], torch.zeros(2, device=rollout.logprobs.device)
    for rows in _scoring_passes(roles, rollout):
        ids, mask, counted = rollout.ids[rows], rollout.mask[rows], rollout.completion_mask[rows]
        policy = roles.policy(ids, mask, keep)
        apart = masked_sum(exact_kl(policy, roles.reference(ids, mask, keep)), counted)
        again = token_logprobs(policy, rollout.completion_ids[rows], temperature)
        errors = torch.expm1(again - rollout.logprobs[rows]).abs() * counted
        largest = torch.maximum(largest, torch.stack([apart.abs().max(), errors.max()]))
    kl, error = largest.tolist()
    return FirstStep(kl, error, ratio_limit)
