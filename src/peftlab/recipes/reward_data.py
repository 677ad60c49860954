"""Which preference pairs a reward model is trained, calibrated and measured on, and what it is taught of each."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from ..data.collate import collate_tokens
from ..data.records import PreferencePair
from ..errors import UserError
from ..evaluation.pairs import rubric_parts, texts_of
from ..models.reward_model import RewardModel

FEWEST_TO_CALIBRATE = 100


@dataclass(frozen=True)
class PairRoles:
    """Pairs to train on, kept for the temperature, held out, and of another policy; how many were dropped."""

    train: list[PreferencePair]
    kept: list[PreferencePair]
    held_out: list[PreferencePair]
    ood: list[PreferencePair]
    dropped: int


def pair_roles(
    train: list[PreferencePair],
    held_out: list[PreferencePair],
    ood: list[PreferencePair],
    flip_labels: float,
    calibrate: float,
    seed: int,
) -> PairRoles:
    """No prompt is trained on that is evaluated on: such training pairs are dropped. UserError where none is left."""
    evaluated = {_same(pair.prompt) for pair in [*held_out, *ood]}
    own = [pair for pair in train if _same(pair.prompt) not in evaluated]
    if not own:
        raise UserError("train_data: every prompt of it is in the evaluation data too; split pairs by their prompts")
    learned, kept = kept_apart(flipped(own, flip_labels, seed), calibrate, seed)
    return PairRoles(learned, kept, held_out, ood, len(train) - len(own))


def flipped(pairs: Sequence[PreferencePair], share: float, seed: int) -> list[PreferencePair]:
    """The pairs in order, a random `share` of them with chosen and rejected exchanged."""
    turned = set(random.Random(f"flip {seed}").sample(range(len(pairs)), round(share * len(pairs))))
    return [replace(p, chosen=p.rejected, rejected=p.chosen) if i in turned else p for i, p in enumerate(pairs)]


def kept_apart(
    pairs: list[PreferencePair], share: float, seed: int
) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """Pairs to train on, and those of a random `share` of prompts: none where they are too few for a temperature."""
    prompts = list(dict.fromkeys(pair.prompt for pair in pairs))
    # Not the draw of `flipped`: of one seed and size, it would keep the very pairs that were turned round.
    chosen = set(random.Random(f"keep {seed}").sample(prompts, int(share * len(prompts))))
    kept = [pair for pair in pairs if pair.prompt in chosen]
    if len(kept) < FEWEST_TO_CALIBRATE:
        return pairs, []
    return [pair for pair in pairs if pair.prompt not in chosen], kept


def pair_rows(
    pairs: list[PreferencePair], model: RewardModel, objective: Literal["pairwise", "pointwise"], margin: float
) -> list[dict[str, Any]]:
    """Token ids of both answers of each pair, and its `target`: the margin to win by, or the scores of both answers."""
    prompts, answers = texts_of(pairs)
    ids = model.token_ids(prompts, answers)
    targets = _rubric_targets(pairs) if objective == "pointwise" else _margins(pairs, margin)
    columns = zip(ids[: len(pairs)], ids[len(pairs) :], targets, strict=True)
    return [{"chosen": chosen, "rejected": rejected, "target": target} for chosen, rejected, target in columns]


def pair_length(row: dict[str, Any]) -> int:
    """Tokens of the longer of a pair's two sequences."""
    return max(len(row["chosen"]), len(row["rejected"]))


def pair_tokens(rows: Sequence[dict[str, Any]]) -> int:
    """Tokens of all rows, without padding."""
    return sum(len(row["chosen"]) + len(row["rejected"]) for row in rows)


def collate_answers(rows: Sequence[dict[str, Any]], pad_id: int) -> dict[str, torch.Tensor]:
    """2B rows of tokens, chosen answers first, then the rejected ones, padded behind; labels (B, 1) or (B, 2)."""
    padded = collate_tokens([row["chosen"] for row in rows] + [row["rejected"] for row in rows], pad_id)
    return padded | {"labels": torch.tensor([row["target"] for row in rows])}


def _margins(pairs: list[PreferencePair], margin: float) -> list[list[float]]:
    bare = next((pair.id for pair in pairs if pair.margin is None), None)
    if margin and bare is not None:
        raise UserError(f"margin: row {bare} of train_data has no `margin`; give one to each row, or set margin=0")
    return [[margin * (pair.margin or 0.0)] for pair in pairs]


def _rubric_targets(pairs: list[PreferencePair]) -> list[list[float]]:
    """The mean over the rubric's parts of either answer, of mean 0 and variance 1 over all answers."""
    scores = np.mean(list(rubric_parts(pairs).values()), axis=0)
    standard: list[list[float]] = ((scores - scores.mean()) / max(float(scores.std()), 1e-6)).tolist()
    return standard


def _same(prompt: str) -> str:
    """What two prompts share that differ only in white space."""
    return " ".join(prompt.split())
