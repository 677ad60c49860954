"""Calibration: what the fitted temperature, the reliability table and the list of errors must satisfy."""

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
    fit_temperature,
    reliability,
    surest_errors,
)


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
def test_the_temperature_undoes_a_scaling_and_calibrates(factor):
    logits, labels = sampled(20_000, 3, seed=1)
    temperature = fit_temperature(logits * factor, labels)
    assert temperature == pytest.approx(factor, rel=0.05)
    probabilities = np.asarray((logits * factor / temperature).double().softmax(-1))
    assert expected_calibration_error(probabilities, labels.numpy()) < 0.015


def test_no_other_temperature_has_a_lower_loss():
    logits, labels = sampled(500, 2, seed=2)
    best = fit_temperature(logits * 2, labels)
    losses = [float(torch.nn.functional.cross_entropy(logits * 2 / t, labels)) for t in (best, best * 0.9, best * 1.1)]
    assert losses[0] == min(losses)


def test_answers_that_are_all_right_or_all_wrong_reach_the_bounds():
    logits = torch.tensor([[4.0, 0.0]] * 20)
    assert fit_temperature(logits, torch.zeros(20, dtype=torch.long)) == pytest.approx(0.05, abs=1e-3)
    assert fit_temperature(logits, torch.ones(20, dtype=torch.long)) == pytest.approx(20, rel=1e-2)


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
