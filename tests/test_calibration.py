"""Calibration: what the fitted calibration, the reliability table and the list of errors must satisfy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftlab.evaluation.calibration import (
    confusion,
    expected_calibration_error,
    fit_calibration,
    reliability,
    surest_errors,
)
from peftlab.models.classifier import Calibration


@dataclass
class Row:
    """What a labelled record has."""

    id: str
    text: str
    label: int


def sampled(rows: int, classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and labels drawn from their softmax: calibrated by construction."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, classes, generator=generator)
    return logits, torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


@pytest.mark.parametrize("factor", [0.25, 1.0, 3.0])
@pytest.mark.parametrize("lean", [0.0, 1.5])
def test_calibration_undoes_a_scaling_and_a_lean(factor, lean):
    logits, labels = sampled(20_000, 3, seed=1)
    given = (logits + torch.tensor([lean, 0.0, 0.0])) * factor
    found = fit_calibration(given, labels)
    assert found.temperature == pytest.approx(factor, rel=0.05)
    assert sum(found.bias) == pytest.approx(0, abs=1e-9)
    assert found.bias[1] - found.bias[0] == pytest.approx(lean, abs=0.1)
    probabilities = np.asarray(found(given).double().softmax(-1))
    assert expected_calibration_error(probabilities, labels.numpy()) < 0.015


def test_no_other_calibration_nearby_has_a_lower_loss():
    logits, labels = sampled(500, 2, seed=2)
    best = fit_calibration(logits * 2, labels)

    def loss(temperature: float, lean: float) -> float:
        other = Calibration(temperature, [best.bias[0] + lean, best.bias[1] - lean])
        return float(torch.nn.functional.cross_entropy(other(logits.double() * 2), labels))

    around = [loss(best.temperature * t, lean) for t in (0.9, 1, 1.1) for lean in (-0.05, 0, 0.05)]
    assert min(around) == pytest.approx(loss(best.temperature, 0), abs=1e-6)


def test_answers_that_are_all_right_stay_finite():
    found = fit_calibration(torch.tensor([[4.0, 0.0], [0.0, 4.0]] * 10), torch.tensor([0, 1] * 10))
    assert 0.05 <= found.temperature <= 0.5
    one_class = fit_calibration(torch.randn(20, 2), torch.zeros(20, dtype=torch.long))
    assert np.isfinite([one_class.temperature, *one_class.bias]).all()


@given(st.integers(0, 1000), st.integers(1, 200), st.integers(2, 5))
def test_the_reliability_table_accounts_for_every_row(seed, rows, classes):
    logits, labels = sampled(rows, classes, seed)
    probabilities = np.asarray(logits.double().softmax(-1))
    table = reliability(probabilities, labels.numpy())
    assert sum(row["rows"] for row in table) == rows
    assert all(row["low"] - 1e-9 <= row["confidence"] <= row["high"] + 1e-9 for row in table)
    hits = sum(row["rows"] * row["accuracy"] for row in table)
    assert hits == pytest.approx((probabilities.argmax(1) == labels.numpy()).sum())
    counts = np.array(confusion(probabilities, labels.numpy()))
    assert counts.sum() == rows and np.trace(counts) == pytest.approx(hits)


def test_the_surest_errors_are_wrong_and_sorted():
    logits, labels = sampled(300, 2, seed=3)
    probabilities = np.asarray(logits.double().softmax(-1))
    rows = [Row(str(i), f"text {i}", int(label)) for i, label in enumerate(labels)]
    errors = surest_errors(probabilities, rows, ["no", "yes"], 10)
    assert len(errors) == 10
    assert all(e["label"] != e["predicted"] for e in errors)
    confidences = [e["confidence"] for e in errors]
    assert confidences == sorted(confidences, reverse=True)
    wrong = probabilities.max(1)[probabilities.argmax(1) != labels.numpy()]
    assert confidences[0] == wrong.max()
