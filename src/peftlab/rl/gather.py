"""A step over several processes: each samples and scores its rows, all see the whole rollout, gradients add up.

Whatever is said of a step (whitening, KL, stops, metrics) is computed by every process from the whole rollout, so N
processes make the step of one, up to the order of sums.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import LabError, PeftlabError, UserError, brief
from ..models.roles import Roles, hash_of
from ..ops import ranks
from .rollout import PromptBatch, Rollout


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """Where the block fails in one process, all fail with its message: none waits for one that is gone."""
    mine: Exception | None = None
    try:
        yield
    except Exception as error:
        mine = error
    told = None if mine is None else str(mine) if isinstance(mine, PeftlabError) else brief(mine)
    theirs = ranks.objects((UserError if isinstance(mine, UserError) else LabError, told))
    if mine is not None:
        raise mine
    for number, (kind, message) in enumerate(theirs):
        if message is not None:
            raise kind(message if number == 0 else f"process {number}: {message}")


def gathered(mine: Rollout, prompts: PromptBatch) -> Rollout:
    """The rollout of all `prompts`, from that of each process's share of them; the same bits everywhere.

    LabError in all where they do not hold the same parts of a reward or the same figures.
    """
    if ranks.size() == 1:
        return mine
    device = mine.logprobs.device
    named = {field.name: getattr(mine, field.name) for field in fields(mine)}
    tensors = {name: value.cpu() for name, value in named.items() if isinstance(value, Tensor)}
    parts = {name: value.cpu() for name, value in mine.score_parts.items()}
    told = ranks.objects((tensors, parts, mine.completions))
    _require_same("reward: process {} gave parts {}, process {} {}; give the same parts for every list",
                  [one[1] for one in told])
    _require_same("process {} measured {}, process {} {}", [one[0] for one in told])

    def whole(name: str) -> Tensor:
        return _stacked([one[0][name] for one in told], name.startswith("prompt")).to(device)

    changed: dict[str, Any] = {name: whole(name) for name in tensors}
    changed["score_parts"] = {name: torch.cat([one[1][name] for one in told]) for name in parts}
    changed["completions"] = [text for one in told for text in one[2]]
    return replace(mine, prompts=prompts, **changed)


def require_same_weights(roles: Roles) -> None:
    """LabError in all where a process learns or keeps other weights than the first."""
    if ranks.size() == 1:
        return
    told = ranks.objects({"the frozen base": roles.frozen_hash(), "the adapter": hash_of(roles.state())})
    if odd := ranks.odd(told):
        what = next(what for what, digest in told[odd].items() if digest != told[0][what])
        raise LabError(f"{what} of process {odd} is not that of process 0 before any update; with the same seed and "
                       "the same files it would be")


def _require_same(message: str, named: Sequence[Mapping[str, Any]]) -> None:
    """LabError with `message` about the first process whose names are not those of process 0."""
    names = [", ".join(sorted(own)) or "none" for own in named]
    if odd := ranks.odd(names):
        raise LabError(message.format(0, names[0], odd, names[odd]))


def _stacked(parts: Sequence[Tensor], left: bool) -> Tensor:
    """Rows one behind the other, as wide as the widest: filled with 0, which masks out, in front (`left`) or behind."""
    if parts[0].dim() == 1:
        return torch.cat(list(parts))
    width = max(part.shape[1] for part in parts)
    missing = [width - part.shape[1] for part in parts]
    return torch.cat([F.pad(p, (n, 0) if left else (0, n)) for p, n in zip(parts, missing, strict=True)])
