"""How far a classifier's confidence may be trusted, and what mends it. logits (N, L), labels (N,)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.classifier import Calibration

BINS = 15


def fit_calibration(logits: Tensor, labels: Tensor) -> Calibration:
    """The temperature and biases of least mean cross-entropy on held-out rows; convex in 1 / temperature and biases.

    Bias-corrected temperature scaling (Alexandari et al. 2020): temperature alone (Guo et al. 2017) never changes an
    answer, and so leaves a classifier that leans to one class as it is. Where every row is right no scale is best, and
    where most are wrong none is positive: the temperature stays within 0.05 and 20.
    """
    logits = logits.double()
    scale = torch.zeros(1, dtype=torch.float64, requires_grad=True)  # log(1 / temperature)
    bias = torch.zeros(logits.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([scale, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        bounded = scale.clamp(-math.log(20), math.log(20))
        # A touch of ridge on the biases: a class that the rows lack would drive its own to minus infinity.
        value = F.cross_entropy(logits * bounded.exp() + bias, labels) + 1e-4 * bias.square().mean()
        value.backward()
        return value

    optimizer.step(loss)
    bounded = float(scale.detach().clamp(-math.log(20), math.log(20)))
    centred = bias.detach() - bias.detach().mean()
    return Calibration(math.exp(-bounded), centred.tolist())


def reliability(probabilities: np.ndarray, labels: np.ndarray, bins: int = BINS) -> list[dict[str, float]]:
    """One row for each equal-width bin of the top probability that holds rows: its edges, rows, and the mean
    confidence and accuracy in it."""
    confidence, correct = probabilities.max(1), probabilities.argmax(1) == labels
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    table = []
    for b in range(bins):
        inside = bin_of == b
        if inside.any():
            table.append({
                "low": b / bins, "high": (b + 1) / bins, "rows": int(inside.sum()),
                "confidence": float(confidence[inside].mean()), "accuracy": float(correct[inside].mean()),
            })
    return table


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = BINS) -> float:
    """Gap between accuracy and mean confidence of each bin, averaged over rows (Guo et al. 2017)."""
    table = reliability(probabilities, labels, bins)
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
