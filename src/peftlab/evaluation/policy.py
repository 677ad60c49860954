"""A policy beside its reference on the same held-out prompts: its task's measure, exact KL, fluency, diversity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..models.roles import POLICY, Roles
from ..ops.kl import exact_kl
from ..ops.logprobs import entropy, token_logprobs
from ..ops.masks import masked_sum
from ..runs.progress import batch_starts
from ..sampling.sampler import Decoding, Sampler
from .diversity import distinct_n
from .intervals import bootstrap_mean

# Prompts, completions and the prompts' records, N each -> arrays (N,) by the names of their metrics.
Measure = Callable[[Sequence[str], Sequence[str], Sequence[Any]], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Side:
    """N completions of one side, each array (N,): exact KL, NLL under the reference and entropy, in nats summed over a
    completion; lengths in tokens; whether EOS was sampled.

    `measured` is what a task measures by; `clusters` tells rows of one prompt; None where each has its own, or all one.
    """

    completions: list[str]
    kl: np.ndarray
    nll: np.ndarray
    entropy: np.ndarray
    lengths: np.ndarray
    ended: np.ndarray
    measured: dict[str, np.ndarray]
    clusters: np.ndarray | None = None

    def metrics(self) -> dict[str, float]:
        """Means over the completions by the registry's names; of the entropy, over their tokens."""
        tokens = float(self.lengths.sum())
        return {
            **{name: float(values.mean()) for name, values in self.measured.items()},
            "eval/kl": float(self.kl.mean()),
            "eval/length": float(self.lengths.mean()),
            "eval/eos_fraction": float(self.ended.mean()),
            "eval/entropy": float(self.entropy.sum()) / tokens,
            "eval/distinct_1": distinct_n(self.completions, 1),
            "eval/distinct_2": distinct_n(self.completions, 2),
        }

    def mean_nll(self) -> float:
        """Nats per token under the frozen reference."""
        return float(self.nll.sum() / self.lengths.sum())

    def intervals(self) -> dict[str, tuple[float, float]]:
        """95% bootstrap intervals over prompts: of one prompt that stands in several rows, all or none are drawn."""
        columns = self.measured | {"eval/kl": self.kl}
        return {name: bootstrap_mean(values, self.clusters) for name, values in columns.items()}


def perplexity_ratio(before: Side, after: Side) -> float:
    """exp(NLL of the policy's samples - NLL of the reference's own samples), both under the reference."""
    return float(np.exp(after.mean_nll() - before.mean_nll()))


@torch.no_grad()
def evaluate_side(
    roles: Roles,
    role: str | None,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[str],
    records: Sequence[Any],
    measure: Measure,
    decoding: Decoding,
    seed: int,
    batch_size: int = 64,
) -> Side:
    """Sample one completion a prompt from a role (None = the reference) and measure it.

    N prompts: their token lists, their `texts`, and the `records` that they came from. Row i has the same random draws
    on both sides. Leaves the sampler's copy at `role`, until a pass of another.
    """
    roles.refresh(role)
    sampler = Sampler(roles.twin, roles.tokenizer)
    completions: list[str] = []
    columns: dict[str, list[np.ndarray]] = {"kl": [], "nll": [], "entropy": [], "lengths": [], "ended": []}
    for start in batch_starts(len(prompts), batch_size):
        rows = list(range(start, min(start + batch_size, len(prompts))))
        samples = sampler.sample([prompts[i] for i in rows], [seed + i for i in rows], decoding)
        completions += sampler.texts(samples)
        mask, width = samples.completion_mask, samples.completion_ids.shape[1]
        reference = roles.reference(samples.ids, samples.mask, width)
        policy = roles.policy(samples.ids, samples.mask, width) if role == POLICY else reference
        lengths = mask.sum(1)
        measured = {
            "kl": masked_sum(exact_kl(policy, reference), mask),
            "nll": -masked_sum(token_logprobs(reference, samples.completion_ids), mask),
            "entropy": masked_sum(entropy(policy), mask),
            "lengths": lengths,
            "ended": samples.ended,
        }
        for name, value in measured.items():
            columns[name].append(value.double().cpu().numpy())
    arrays = {name: np.concatenate(parts) for name, parts in columns.items()}
    asked = [record.prompt for record in records]
    clusters = np.array(asked) if 1 < len(set(asked)) < len(asked) else None
    return Side(completions, measured=measure(texts, completions, records), clusters=clusters, **arrays)
