"""What one step of reinforcement learning looks at: completions with everything known about each of their tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import LabError
from ..models.roles import Roles
from ..ops import ranks
from ..ops.kl import exact_kl, k1, k2, k3
from ..ops.masks import last_true, masked_sum
from ..sampling.sampler import Decoding, Sampler, Samples

# Prompt and completion tokens of one pass, unless told: with gradients, smollm2-135m keeps .8 MB a token on CUDA and
# about 1.5 MB elsewhere. A CPU is as quick in shorter passes, whose rows are more alike in length.
PASS_TOKENS = {"cpu": 2**10, "cuda": 6 * 2**10, "mps": 2**13}
# Numbers in the logits of one pass that needs them: beside them, temporaries of four times their size at most.
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
        """(B, P + C)"""
        return torch.cat([self.prompt_ids, self.completion_ids], 1)

    @property
    def mask(self) -> Tensor:
        """(B, P + C)"""
        return torch.cat([self.prompt_mask, self.completion_mask], 1)


def collect_rollout(
    sampler: Sampler,
    roles: Roles,
    reward: ScoreFunction,
    prompts: PromptBatch,
    seeds: Sequence[int],
    decoding: Decoding,
    exact: bool = False,
    pass_tokens: int = 0,
) -> Rollout:
    """Sample a completion per prompt and score it: reward, reference and critic.

    `exact` asks for the exact KL as well, which costs a pass of the policy. `pass_tokens`: see `rows_per_pass`.
    """
    samples = sampler.sample(prompts.token_ids, seeds, decoding, roles.shared_head)
    ref_logprobs, values, kl = _score_tokens(roles, samples, decoding.temperature, exact, pass_tokens)
    completions = sampler.texts(samples)  # a GPU is at its last pass meanwhile
    scores, parts = reward(prompts.texts, completions, prompts.records)
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
    roles: Roles, samples: Samples, temperature: float, exact: bool, pass_tokens: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probabilities of the reference, values, and the exact KL if it is asked for, each (B, C)."""
    counted = samples.completion_mask
    logprobs, values, kl = torch.zeros(3, *counted.shape, device=counted.device).unbind()
    everyone = torch.arange(len(counted), device=counted.device)
    for part in passes(samples, everyone, pass_tokens, roles if exact else None):
        rows, ids, mask, keep = part.rows, part.ids, part.mask, part.keep
        logprobs[rows, :keep] = roles.reference_logprobs(ids, mask, keep, temperature, part.counted)
        if samples.readings is None:
            values[rows, :keep] = roles.values(ids, mask, keep)
        if exact:  # of the tempered distributions, as the estimates from sampled tokens are
            policy, reference = roles.policy(ids, mask, keep), roles.reference(ids, mask, keep)
            kl[rows, :keep] = exact_kl(policy / temperature, reference / temperature)
    if samples.readings is not None:
        values = samples.readings
    return logprobs * counted, values * counted, kl * counted if exact else None


def rows_per_pass(device: torch.device, length: int, pass_tokens: int = 0, logits: int = 1) -> int:
    """How many rows of `length` tokens, prompt and completion, go through the model together.

    `pass_tokens`: their tokens at most, 0 for as many as suit the device. `logits`: numbers of a row's logits that are
    to be there at once.
    """
    return max(1, min((pass_tokens or PASS_TOKENS[device.type]) // length, LOGITS_PER_PASS // logits))


@dataclass(frozen=True)
class Part:
    """N rows that go through the model together, less the columns that are padding in all of them.

    rows     (N,)           which they are
    ids, mask (N, P' + C')  prompts and completions
    keep     C'
    counted  (K,), (K,)     row and column of each completion token that counts
    """

    rows: Tensor
    ids: Tensor
    mask: Tensor
    keep: int
    counted: tuple[Tensor, Tensor]


def passes(
    samples: Samples | Rollout, rows: Tensor, pass_tokens: int = 0, with_logits: Roles | None = None
) -> Iterator[Part]:
    """`rows` (N,) in groups that go through the model together, of about one size.

    Shortest first: rows of similar length waste least. The device is asked once, for all lengths: a pass does not wait
    for the one before it.

    `with_logits`: whose logits are to be there at once; all rows' would be gigabytes where the vocabulary is large.
    """
    keep, ids, mask = samples.completion_ids.shape[1], samples.ids, samples.mask
    logits = 1 if with_logits is None else keep * with_logits.model.config.vocab_size
    size = rows_per_pass(rows.device, ids.shape[1], pass_tokens, logits)
    lengths = torch.stack([samples.prompt_mask[rows].sum(1), samples.completion_mask[rows].sum(1)])
    order = lengths.sum(0).argsort(stable=True)
    lengths = lengths[:, order]
    known, parts = lengths.cpu(), max(1, -(-len(rows) // size))
    for group, counts, told in zip(
        rows[order].tensor_split(parts), lengths[1].tensor_split(parts), known.tensor_split(parts, 1), strict=True
    ):
        before, longest = told.amax(1).tolist()
        columns = slice(mask.shape[1] - keep - before, mask.shape[1] - keep + longest)
        counted = _places(counts, int(told[1].sum()))
        yield Part(group, ids[group, columns], mask[group, columns], longest, counted)


def _places(counts: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Row and column of the first `counts` (N,) entries of each row, `total` in all."""
    row = torch.arange(len(counts), device=counts.device).repeat_interleave(counts, output_size=total)
    return row, torch.arange(total, device=counts.device) - (counts.cumsum(0) - counts)[row]


def of_rank(rollout: Rollout, rows: Tensor) -> Tensor:
    """This process's of `rows` (N,): every so many by length, so that each process has about as many tokens."""
    if ranks.size() == 1:
        return rows
    order = rollout.mask[rows].sum(1).argsort(stable=True)
    return rows[order[ranks.rank() :: ranks.size()]]


def shaped_rewards(rollout: Rollout, kl_coef: float, eos_penalty: float = 0.0) -> Tensor:
    """Per-token rewards (B, C): -kl_coef * k1 at every token, plus the score at the last one.

    The k1 estimate inside the reward makes the policy gradient of the KL term unbiased (Ziegler et al. 2019, eq. 2).
    `eos_penalty` is taken off completions that were cut before an EOS.
    """
    mask = rollout.completion_mask
    rewards = -kl_coef * (rollout.logprobs - rollout.ref_logprobs) * mask
    scores = rollout.scores - eos_penalty * ~rollout.ended
    return rewards.scatter_add(1, last_true(mask).unsqueeze(1), scores.unsqueeze(1))


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
    """The two invariants of a run that starts right, as `first_step` measures them. `ratio_limit` is the declared limit
    of the dtype and device."""

    kl: float
    ratio_error: float
    ratio_limit: float

    def metrics(self) -> dict[str, float]:
        """Both, by their names in the registry."""
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
def first_step(
    roles: Roles, rollout: Rollout, temperature: float, ratio_limit: float, pass_tokens: int = 0
) -> FirstStep:
    """Measure both invariants on a rollout taken before the first update.

    first_kl: summed exact KL between adapters-on and adapters-off logits, of the completion where it is largest.
    first_ratio_error: max |exp(recomputed - sampled) - 1| over counted tokens.
    """
    largest = torch.zeros(2, device=rollout.logprobs.device)
    everyone = torch.arange(len(rollout.completions), device=largest.device)
    for part in passes(rollout, of_rank(rollout, everyone), pass_tokens, roles):
        rows, ids, mask, keep = part.rows, part.ids, part.mask, part.keep
        counted = rollout.completion_mask[rows, :keep]
        apart = masked_sum(exact_kl(roles.policy(ids, mask, keep), roles.reference(ids, mask, keep)), counted)
        again, _, _ = roles.policy_tokens(ids, mask, keep, temperature, part.counted)
        errors = torch.expm1(again - rollout.logprobs[rows, :keep]).abs() * counted
        largest = torch.maximum(largest, torch.stack([apart.abs().max(), errors.max()]))
    # The largest of all processes. Not Python's max, which passes over a NaN that comes second.
    kl, error = torch.tensor(ranks.objects(largest.tolist()), dtype=torch.float64).amax(0).tolist()
    return FirstStep(kl, error, ratio_limit)
