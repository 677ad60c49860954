"""How far a classifier's confidence may be trusted, and one number that mends it. logits (N, L), labels (N,)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

BINS = 15


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The T > 0 that minimises the mean cross-entropy of softmax(logits / T) (Guo et al. 2017), within [0.05, 20].

    The loss is convex in 1 / T, so a golden-section search finds it.
    """
    logits = logits.double()

    def loss(scale: float) -> float:
        return float(F.cross_entropy(logits * scale, labels))

    low, high, ratio = 0.05, 20.0, (5**0.5 - 1) / 2
    while high - low > 1e-4:
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if loss(left) < loss(right) else (left, high)
    return 2.0 / (low + high)


def reliability(probabilities: np.ndarray, labels: np.ndarray) -> list[dict[str, float]]:
    """One row for each equal-width bin of the top probability that holds rows: its edges, rows, and the mean
    confidence and accuracy in it."""
    confidence, correct = probabilities.max(1), probabilities.argmax(1) == labels
    bin_of = np.minimum((confidence * BINS).astype(int), BINS - 1)
    table = []
    for b in range(BINS):
        inside = bin_of == b
        if inside.any():
            table.append({
                "low": b / BINS, "high": (b + 1) / BINS, "rows": int(inside.sum()),
                "confidence": float(confidence[inside].mean()), "accuracy": float(correct[inside].mean()),
            })
    return table


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Gap between accuracy and mean confidence of each bin, averaged over rows (Guo et al. 2017)."""
    table = reliability(probabilities, labels)
    return sum(row["rows"] * abs(row["accuracy"] - row["confidence"]) for row in table) / len(labels)


def confusion(probabilities: np.ndarray, labels: np.ndarray) -> list[list[int]]:
    """[i][j]: rows of class i that were taken for class j."""
    table = np.zeros((probabilities.shape[1],) * 2, dtype=int)
    np.add.at(table, (labels, probabilities.argmax(1)), 1)
    rows: list[list[int]] = table.tolist()
    return rows


def surest_errors(probabilities: np.ndarray, records: list[Any], labels: list[str], most: int) -> list[dict[str, Any]]:
    """The wrong answers of highest confidence, at most `most`, each with the true and the predicted name."""
    truth = np.array([record.label for record in records])
    confidence, predicted = probabilities.max(1), probabilities.argmax(1)
    wrong = np.flatnonzero(predicted != truth)
    return [
        {
            "id": records[i].id,
            "label": labels[truth[i]],
            "predicted": labels[predicted[i]],
            "confidence": float(confidence[i]),
            "text": records[i].text,
        }
        for i in wrong[np.argsort(-confidence[wrong], kind="stable")][:most]
    ]
