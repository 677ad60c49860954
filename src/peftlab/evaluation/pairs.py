"""Figures of a reward model from the scores of preference pairs: how often, how surely, and for what it is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.explanations import review_of
from ..data.records import PreferencePair, Prompt
from ..data.tokenize import encode
from ..models.reward_model import RewardModel
from ..models.whole import WholeReward
from ..rewards.rubric import RUBRIC
from .calibration import expected_calibration_error
from .intervals import bootstrap_mean, bootstrap_rows

THIRDS = ("low", "middle", "high")


@dataclass(frozen=True)
class ScoredPairs:
    """N pairs: `raw` scores and token counts (EOS included) of the chosen and the rejected answer, both (N, 2).

    A pair's logit is (raw_chosen - raw_rejected) / temperature.
    """

    records: Sequence[PreferencePair]
    raw: np.ndarray
    tokens: np.ndarray
    temperature: float = 1.0

    @classmethod
    def of(cls, model: RewardModel | WholeReward, records: Sequence[PreferencePair]) -> ScoredPairs:
        """Both answers of each pair, scored."""
        prompts, answers = texts_of(records)
        raw = model.raw(prompts, answers).double().numpy()
        tokens = np.array([len(ids) + 1 for ids in encode(answers, model.tokenizer)])
        return cls(records, _paired(raw), _paired(tokens), model.temperature)

    @property
    def logits(self) -> np.ndarray:
        """(N,); above 0 where the chosen answer scores higher."""
        return np.asarray((self.raw[:, 0] - self.raw[:, 1]) / self.temperature)

    @property
    def probabilities(self) -> np.ndarray:
        """(N, 2): that the rejected, and that the chosen answer is the preferred one."""
        chosen = 1 / (1 + np.exp(-self.logits.clip(-700, 700)))
        return np.stack([1 - chosen, chosen], 1)


def texts_of(records: Sequence[PreferencePair]) -> tuple[list[str], list[str]]:
    """Prompts and answers of 2N texts: those of every chosen answer, then those of every rejected one."""
    return [r.prompt for r in records] * 2, [r.chosen for r in records] + [r.rejected for r in records]


def pair_metrics(pairs: ScoredPairs) -> dict[str, float]:
    """Accuracy, also by thirds, ECE, loss, correlation with length, and agreement with the rubric where it applies."""
    right, labels = wins(pairs.logits), np.ones(len(pairs.logits), dtype=int)
    longer = (pairs.tokens[:, 0] - pairs.tokens[:, 1]).astype(float)
    figures = {
        "eval/pair_accuracy": float(right.mean()),
        "eval/ece": expected_calibration_error(pairs.probabilities, labels),
        "eval/loss": float(np.logaddexp(0, -pairs.logits).mean()),
        "eval/length_correlation": spearman(pairs.raw.ravel(), pairs.tokens.ravel()),
    }
    figures |= _by_third("length", right, longer)
    margins = [record.margin for record in pairs.records]
    if None not in margins:
        figures |= _by_third("margin", right, np.array(margins, dtype=float))
    return figures | {f"agreement/{row['part']}": row["model"] for row in agreement(pairs)}


def pair_intervals(pairs: ScoredPairs) -> dict[str, tuple[float, float]]:
    """95% bootstrap intervals: of accuracy over prompts, whose pairs belong together, of ECE over pairs."""
    probabilities, labels = pairs.probabilities, np.ones(len(pairs.records), dtype=int)
    low, high = bootstrap_rows(lambda rows: expected_calibration_error(probabilities[rows], labels[rows]), len(labels))
    return {"eval/pair_accuracy": accuracy_interval(pairs), "eval/ece": (max(0.0, low), high)}


def accuracy_interval(pairs: ScoredPairs) -> tuple[float, float]:
    """95% bootstrap interval of the accuracy over prompts."""
    return bootstrap_mean(wins(pairs.logits), np.array([record.prompt for record in pairs.records]))


def longer_wins(pairs: ScoredPairs) -> float:
    """Pair accuracy of whoever always prefers the longer answer."""
    return float(wins(pairs.tokens[:, 0] - pairs.tokens[:, 1]).mean())


def wins(differences: np.ndarray) -> np.ndarray:
    """1 above 0, 0 below, and one half for a tie."""
    return np.asarray((np.sign(differences) + 1) / 2)


def rubric_parts(records: Sequence[PreferencePair]) -> dict[str, np.ndarray]:
    """Part of the rubric -> its scores (N, 2) of chosen and rejected answers; "label" only where every pair has one."""
    prompts, answers = texts_of(records)
    asked = [Prompt(record.id, record.prompt, record.label) for record in records] * 2
    labelled = all(record.label is not None for record in records)
    parts = {name: part for name, part in RUBRIC.items() if labelled or name != "label"}
    return {name: _paired(np.array(part(prompts, answers, asked))) for name, part in parts.items()}


def agreement(pairs: ScoredPairs) -> list[dict[str, Any]]:
    """For each part of the rubric that tells the answers of some pairs apart: how many pairs those are, and in what
    share of them the model, and the data's own preference, side with the part.

    Empty unless every pair has a label and its prompt asks for an explanation: the rubric is about those.
    """
    if any(record.label is None or review_of(record.prompt) == record.prompt for record in pairs.records):
        return []
    rows = []
    for name, scores in rubric_parts(pairs.records).items():
        better = np.sign(scores[:, 0] - scores[:, 1])
        apart = better != 0
        if apart.any():
            model = float(wins(pairs.logits * better)[apart].mean())
            preferences = float((better[apart] > 0).mean())
            rows.append({"part": name, "pairs": int(apart.sum()), "model": model, "preferences": preferences})
    return rows


def most_wrong(pairs: ScoredPairs, most: int) -> list[dict[str, Any]]:
    """The pairs whose rejected answer wins by most, at most `most`, surest first."""
    order = np.argsort(pairs.logits, kind="stable")[:most]
    return [
        {
            "id": pairs.records[i].id,
            "prompt": pairs.records[i].prompt,
            "chosen": pairs.records[i].chosen,
            "rejected": pairs.records[i].rejected,
            "scores": pairs.raw[i].tolist(),
            "probability": float(pairs.probabilities[i, 1]),
        }
        for i in order
        if pairs.logits[i] < 0
    ]


def histogram(pairs: ScoredPairs, bins: int = 32, reach: float = 4.0) -> dict[str, list[float]]:
    """Edges, in standard deviations from the mean of all answers' scores, and how many chosen and rejected ones lie
    between each two; what lies beyond `reach` counts in the outermost."""
    scaled = (pairs.raw - pairs.raw.mean()) / max(float(pairs.raw.std()), 1e-12)
    edges = np.linspace(-reach, reach, bins + 1)
    inside = scaled.clip(-reach, reach)
    counts = {side: np.histogram(inside[:, i], edges)[0].tolist() for i, side in enumerate(("chosen", "rejected"))}
    return {"edges": edges.tolist(), **counts}


def spearman(one: np.ndarray, other: np.ndarray) -> float:
    """Rank correlation, ties at their mean rank; 0 where either never changes."""
    a, b = (_ranks(values) - (len(values) - 1) / 2 for values in (one, other))
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((counts.cumsum() - (counts + 1) / 2)[inverse])


def _by_third(what: str, right: np.ndarray, values: np.ndarray) -> dict[str, float]:
    """Accuracy within each third of `values`; a third that ties leave empty is left out."""
    third = np.searchsorted(np.quantile(values, [1 / 3, 2 / 3]), values)
    return {
        f"eval/pair_accuracy_{what}_{name}": float(right[third == i].mean())
        for i, name in enumerate(THIRDS)
        if (third == i).any()
    }


def _paired(values: np.ndarray) -> np.ndarray:
    """(2N,) as `texts_of` orders them -> (N, 2)."""
    return values.reshape(2, -1).T
