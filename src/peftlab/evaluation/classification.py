"""Figures of a classifier from its probabilities. probabilities (N, L), labels (N,)."""

from __future__ import annotations

import numpy as np

from .calibration import expected_calibration_error
from .intervals import bootstrap_mean, bootstrap_rows


def classification_metrics(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy, macro F1, ECE and mean cross-entropy (nats)."""
    predicted = probabilities.argmax(1)
    return {
        "eval/accuracy": float((predicted == labels).mean()),
        "eval/f1": macro_f1(predicted, labels, probabilities.shape[1]),
        "eval/ece": expected_calibration_error(probabilities, labels),
        "eval/loss": float(-np.log(np.clip(probabilities[np.arange(len(labels)), labels], 1e-12, 1)).mean()),
    }


def classification_intervals(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, tuple[float, float]]:
    """95% bootstrap intervals over rows."""
    predicted, classes = probabilities.argmax(1), probabilities.shape[1]
    low, high = bootstrap_rows(lambda rows: macro_f1(predicted[rows], labels[rows], classes), len(labels))
    # Less its bias, the interval of few rows may leave the range of the metric.
    return {"eval/accuracy": bootstrap_mean(predicted == labels), "eval/f1": (max(0.0, low), min(1.0, high))}


def macro_f1(predicted: np.ndarray, labels: np.ndarray, classes: int) -> float:
    """Unweighted mean over classes of 2 TP / (2 TP + FP + FN); 0 for a class that is neither predicted nor there."""
    scores = []
    for c in range(classes):
        hits = np.sum((predicted == c) & (labels == c))
        total = np.sum(predicted == c) + np.sum(labels == c)
        scores.append(2 * hits / total if total else 0.0)
    return float(np.mean(scores))
