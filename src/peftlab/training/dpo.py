"""Pairs of answers through a policy and its reference: token rows, batches, and the module that a Trainer trains.

Shapes: N pairs, whose 2N answers stand chosen first, then rejected, each behind its prompt in a row of T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..data.collate import pad_right
from ..errors import LabError
from ..models.roles import Roles
from ..ops import ranks
from ..ops.kl import exact_kl
from ..ops.losses import dpo_loss, ipo_loss
from ..ops.masks import masked_sum
from ..runs.progress import batch_starts

PairRow = dict[str, list[int]]
# The loss of the first batch is known: what is left is the rounding of a mean in float32.
FIRST_LOSS_LIMIT = 1e-6


def pair_row(prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int], length: int) -> PairRow:
    """Token lists of a pair, of which prompt and either answer take `length` at most.

    The prompt loses its oldest tokens first, the same for both answers, and keeps one: what an answer's first token is
    predicted from. Then the longer answer is cut.
    """
    chosen, rejected = list(chosen[: length - 1]), list(rejected[: length - 1])
    room = length - max(len(chosen), len(rejected))
    return {"prompt": list(prompt[-room:]), "chosen": chosen, "rejected": rejected}


def pair_length(row: PairRow) -> int:
    """Tokens of the longer of a pair's two sequences."""
    return len(row["prompt"]) + max(len(row["chosen"]), len(row["rejected"]))


def collate_pairs(rows: Sequence[PairRow], pad_id: int) -> dict[str, Tensor]:
    """ids, completion_mask (2N, T): prompt, answer, then padding; the mask is True at the answer's tokens.

    With nothing in front, a causal model needs no mask: no token sees what stands behind it. Pads in front would see
    nothing at all, and cuDNN's attention in bfloat16 may give such a mask NaN gradients (pytorch/pytorch#196678).
    """
    pairs = [(row["prompt"], row[side]) for side in ("chosen", "rejected") for row in rows]
    ids = pad_right([prompt + answer for prompt, answer in pairs], pad_id)
    mask = pad_right([[0] * len(prompt) + [1] * len(answer) for prompt, answer in pairs], 0)
    return {"ids": ids, "completion_mask": mask.bool()}


@dataclass(frozen=True)
class Compared:
    """N pairs under policy p and reference q, both (2, N), chosen in row 0.

    changes  log p(answer) - log q(answer), in nats summed over the answer
    scores   what the loss compares: `changes`, or for IPO their mean a token
    """

    changes: Tensor
    scores: Tensor

    def figures(self, beta: float) -> dict[str, float]:
        """Means over the pairs, by the last part of their names in the registry."""
        return {
            "reward_margin": float(beta * (self.scores[0] - self.scores[1]).mean()),
            "pair_accuracy": float(self.wins().mean()),
            "chosen_change": float(self.changes[0].mean()),
            "rejected_change": float(self.changes[1].mean()),
        }

    def wins(self) -> Tensor:
        """(N,): 1 where the chosen answer has the higher score, .5 for a tie, else 0."""
        gap = self.scores[0] - self.scores[1]
        return (gap > 0).float() + 0.5 * (gap == 0).float()


def together(parts: Sequence[Compared]) -> Compared:
    """The pairs of several batches as one."""
    return Compared(torch.cat([part.changes for part in parts], 1), torch.cat([part.scores for part in parts], 1))


class PairPolicy(nn.Module):
    """The policy of `roles` as a module whose forward is the loss of a batch of pairs; only its adapter learns.

    The reference runs in the same call on the same tensors. Cached log-probabilities would save that pass from the
    second epoch on, but come from batches of other shapes: here a fresh adapter differs from its reference by exactly
    nothing, in every precision, and a resumed run has nothing to recompute.
    """

    def __init__(self, roles: Roles, loss: Literal["sigmoid", "ipo"], beta: float, label_smoothing: float) -> None:
        super().__init__()
        self.model = roles.model
        self.roles, self.loss, self.beta, self.label_smoothing = roles, loss, beta, label_smoothing
        self.noted: list[Compared] = []
        self.noting = True

    def train(self, mode: bool = True) -> PairPolicy:
        """Stays in eval mode: with dropout the policy would differ from its reference before any update.

        `mode` says whether the pairs that `forward` sees are trained on.
        """
        self.noting = mode
        return super().train(False)

    def forward(self, ids: Tensor, completion_mask: Tensor) -> dict[str, Tensor]:
        """{"loss": mean over the pairs}. Notes what it saw, for `drain`, where that is trained on."""
        compared = self.compare(ids, completion_mask)
        if self.noting:
            self.noted.append(Compared(compared.changes.detach(), compared.scores.detach()))
        return {"loss": self.loss_of(compared)}

    def compare(self, ids: Tensor, completion_mask: Tensor) -> Compared:
        """Policy against reference; the tensors are those of `collate_pairs`."""
        policy, reference = self.roles.compared_logprobs(ids, completion_mask)
        changes = (policy - reference).sum(1).view(2, -1)
        lengths = completion_mask.sum(1).view(2, -1)
        return Compared(changes, changes / lengths if self.loss == "ipo" else changes)

    def loss_of(self, compared: Compared) -> Tensor:
        """The mean loss of the pairs."""
        chosen, rejected = compared.scores
        if self.loss == "ipo":
            return ipo_loss(chosen, rejected, self.beta)
        return dpo_loss(chosen, rejected, self.beta, self.label_smoothing)

    def drain(self) -> dict[str, float]:
        """Figures of the pairs trained on since the last call, in any process, by their registered names."""
        mine, self.noted = [Compared(one.changes.cpu(), one.scores.cpu()) for one in self.noted], []
        noted = [one for part in ranks.objects(mine) for one in part]
        return {f"train/{name}": value for name, value in together(noted).figures(self.beta).items()} if noted else {}


@torch.no_grad()
def compare_rows(policy: PairPolicy, rows: Sequence[PairRow], pad_id: int, batch_size: int = 16) -> Compared:
    """`PairPolicy.compare` of all rows, in order, on the CPU."""
    parts = []
    for start in batch_starts(len(rows), batch_size):
        seen = policy.compare(**_on_device(policy, rows[start : start + batch_size], pad_id))
        parts.append(Compared(seen.changes.cpu(), seen.scores.cpu()))
    return together(parts)


@dataclass(frozen=True)
class FirstPairs:
    """The two invariants of a run that starts right: exact KL and relative error of the loss, before any update."""

    kl: float
    loss_error: float

    def metrics(self) -> dict[str, float]:
        return {"invariant/first_kl": self.kl, "invariant/first_loss_error": self.loss_error}

    def check(self) -> None:
        """Raises LabError, which stops the run before its first update."""
        if self.kl != 0.0:
            raise LabError(
                f"invariant/first_kl is {self.kl!r}, not 0.0: the policy differs from its reference before any "
                "update (dropout on, an adapter that is not fresh, or a base changed by merging)"
            )
        if not self.loss_error <= FIRST_LOSS_LIMIT:
            raise LabError(
                f"invariant/first_loss_error is {self.loss_error:.2e}, above {FIRST_LOSS_LIMIT:.0e}: the first loss is "
                "not that of a policy that equals its reference (ln 2; for ipo 1 / (2 beta)^2)"
            )


@torch.no_grad()
def first_pairs(policy: PairPolicy, rows: Sequence[PairRow], pad_id: int) -> FirstPairs:
    """Measure both invariants on `rows`, in the mode that training puts the policy in.

    first_kl: summed exact KL between adapters-on and adapters-off logits, the largest answer of the rows. Pair by pair:
    all logits of a batch would be gigabytes where the vocabulary is large.
    """
    policy.train()
    largest = [_largest_kl(policy.roles, **_on_device(policy, [row], pad_id)) for row in rows]
    expected = 1 / (2 * policy.beta) ** 2 if policy.loss == "ipo" else math.log(2)
    loss = float(policy.loss_of(policy.compare(**_on_device(policy, rows, pad_id))))
    return FirstPairs(float(torch.stack(largest).max()), abs(loss / expected - 1))


def _largest_kl(roles: Roles, ids: Tensor, completion_mask: Tensor) -> Tensor:
    """Exact KL of policy to reference summed over an answer, the largest of the rows."""
    everything, keep = torch.ones_like(completion_mask), ids.shape[1] - 1
    kl = exact_kl(roles.policy(ids, everything, keep), roles.reference(ids, everything, keep))
    return masked_sum(kl, completion_mask[:, 1:]).abs().max()


def _on_device(policy: PairPolicy, rows: Sequence[PairRow], pad_id: int) -> Mapping[str, Tensor]:
    return {name: tensor.to(policy.roles.device) for name, tensor in collate_pairs(rows, pad_id).items()}
