"""The figures of models, against scikit-learn, transformers and cases worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, log_loss

from peftlab.data.tokenize import pack
from peftlab.evaluation.classification import (
    classification_intervals,
    classification_metrics,
    expected_calibration_error,
    macro_f1,
)
from peftlab.evaluation.diversity import distinct_n
from peftlab.evaluation.intervals import bootstrap_mean, bootstrap_rows
from peftlab.evaluation.perplexity import perplexity, perplexity_interval, row_nlls

TEXTS = st.lists(st.lists(st.sampled_from(tiny.WORDS), max_size=8).map(" ".join), max_size=6)


pytestmark = pytest.mark.usefixtures("one_thread")


@given(seed=st.integers(0, 10**6), rows=st.integers(1, 40), classes=st.integers(2, 5))
def test_classification_figures_equal_scikit_learns(seed, rows, classes):
    draw = np.random.default_rng(seed)
    probabilities = draw.dirichlet(np.ones(classes), rows)
    labels = draw.integers(0, classes, rows)
    predicted, every = probabilities.argmax(1), list(range(classes))
    found = classification_metrics(probabilities, labels)
    assert found["eval/accuracy"] == pytest.approx(accuracy_score(labels, predicted))
    assert found["eval/f1"] == pytest.approx(
        f1_score(labels, predicted, labels=every, average="macro", zero_division=0)
    )
    assert found["eval/loss"] == pytest.approx(log_loss(labels, probabilities, labels=every))


def test_macro_f1_gives_a_rare_class_its_full_weight():
    labels = np.array([0] * 9 + [1])
    assert macro_f1(np.zeros(10, dtype=int), labels, 2) == pytest.approx(9 / 19)  # (18 / 19 + 0) / 2


def test_calibration_error_of_a_case_worked_out_by_hand():
    """Ten rows: 4 of confidence .8 with 3 right (gap .05), 6 of confidence .6 with 3 right (gap .1)."""
    confidence = np.array([0.8] * 4 + [0.6] * 6)
    labels = np.array([0, 0, 0, 1] + [0, 0, 0, 1, 1, 1])
    probabilities = np.stack([confidence, 1 - confidence], 1)
    assert expected_calibration_error(probabilities, labels) == pytest.approx(0.4 * 0.05 + 0.6 * 0.1)
    assert classification_metrics(probabilities, labels)["eval/ece"] == pytest.approx(0.08)


def test_calibration_error_counts_certainty():
    """A confidence of exactly 1 belongs to the last bin; always right is calibrated, always wrong is not at all."""
    certain = np.array([[0.0, 1.0]] * 5)
    assert expected_calibration_error(certain, np.ones(5, dtype=int)) == 0.0
    assert expected_calibration_error(certain, np.zeros(5, dtype=int)) == 1.0


def test_opposite_gaps_in_one_bin_cancel_and_in_two_bins_add():
    right, wrong = [[0.7, 0.3]] * 7, [[0.3, 0.7]] * 3
    labels = np.zeros(10, dtype=int)
    assert expected_calibration_error(np.array(right + wrong), labels) == pytest.approx(0.0)
    apart = np.array([[0.9, 0.1]] * 7 + [[0.45, 0.55]] * 3)
    assert expected_calibration_error(apart, labels) == pytest.approx(0.7 * 0.1 + 0.3 * 0.55)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_perplexity_is_exp_of_transformers_own_mean_loss(tiny_causal, kind):
    model, tokenizer = tiny_causal(kind)
    documents = [torch.randint(2, 64, (length,)).tolist() for length in (3, 9, 17, 30, 4)]
    total, tokens = 0.0, 0
    with torch.no_grad():
        for document in documents:
            ids = torch.tensor([document])
            total += float(model(input_ids=ids, labels=ids).loss) * (len(document) - 1)
            tokens += len(document) - 1
    rows = [row for document in documents for row in pack([document], 64)]
    sums, counts = row_nlls(model, rows, tokenizer.pad_token_id, batch_size=2)
    assert counts.tolist() == [len(document) - 1 for document in documents]
    assert perplexity(sums, counts) == pytest.approx(math.exp(total / tokens), rel=1e-5)
    low, high = perplexity_interval(sums, counts)
    assert low < perplexity(sums, counts) < high


def test_measuring_leaves_the_mode_of_the_model_alone(tiny_causal):
    model, tokenizer = tiny_causal("gpt2")
    rows = pack([[3, 4, 5, 6]], 8)
    quiet = row_nlls(model, rows, tokenizer.pad_token_id)[0]
    model.train()
    assert row_nlls(model, rows, tokenizer.pad_token_id)[0] == quiet  # dropout of the config is .1, and does not act
    assert model.training


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=60))
def test_the_interval_holds_the_mean_and_stays_within_the_values(values):
    low, high = bootstrap_mean(np.array(values), draws=300)
    span = 1e-9 * max(1.0, *map(abs, values))
    assert min(values) - span <= low <= np.mean(values) + span
    assert np.mean(values) - span <= high <= max(values) + span


def test_the_interval_narrows_with_the_square_root_of_n():
    draw = np.random.default_rng(0)
    widths = [high - low for low, high in (bootstrap_mean(draw.normal(size=n)) for n in (100, 1_600))]
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.15)
    assert widths[1] == pytest.approx(2 * 1.96 / math.sqrt(1_600), rel=0.1)


def test_rows_of_one_prompt_count_once():
    """Five copies of each value say no more than one: resampling prompts gives the interval of the values alone."""
    values = np.random.default_rng(0).normal(size=40)
    copies, prompts = np.repeat(values, 5), np.repeat(np.arange(40), 5)
    assert bootstrap_mean(copies, groups=prompts) == pytest.approx(bootstrap_mean(values))
    low, high = bootstrap_mean(copies)
    whole = bootstrap_mean(values)
    assert high - low < 0.6 * (whole[1] - whole[0])


def test_any_metric_of_rows_has_an_interval():
    values = np.random.default_rng(0).normal(size=200)
    found_by_rows = bootstrap_rows(lambda rows: float(values[rows].mean()), 200)
    assert found_by_rows == pytest.approx(bootstrap_mean(values), abs=0.03)
    probabilities = np.random.default_rng(1).dirichlet([1, 1], 80)
    labels = probabilities.argmax(1) ^ (np.arange(80) % 5 == 0)
    found, intervals = classification_metrics(probabilities, labels), classification_intervals(probabilities, labels)
    assert intervals.keys() == {"eval/accuracy", "eval/f1"}
    assert all(low < found[name] < high for name, (low, high) in intervals.items())


def test_the_interval_of_a_calibration_error_is_about_the_error():
    rng = np.random.default_rng(0)
    for rows in (60, 400):
        positive = rng.uniform(0, 1, rows)
        labels = (rng.uniform(0, 1, rows) < positive).astype(int)
        probabilities = np.stack([1 - positive, positive], axis=1)

        def error(picked, of=probabilities, true=labels):
            return expected_calibration_error(of[picked], true[picked])

        low, high = bootstrap_rows(error, rows)
        assert low < error(np.arange(rows)) < high


@given(TEXTS, st.integers(1, 3))
def test_distinct_n_is_a_share_that_repetition_lowers(texts, n):
    share = distinct_n(texts, n)
    assert 0 <= share <= 1
    assert distinct_n(texts * 2, n) == pytest.approx(share / 2)
    assert distinct_n([t.upper() for t in texts], n) == share
    assert distinct_n(texts[::-1], n) == share


def test_distinct_n_of_small_cases():
    assert distinct_n(["a b c d"], 2) == 1.0
    assert distinct_n(["a a a a"], 1) == 0.25
    assert distinct_n(["a b", "b a"], 2) == 1.0  # no pair reaches over the end of a text
    assert distinct_n(["a", ""], 2) == 0.0


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=12))
def test_the_interval_of_a_share_stays_between_0_and_1(pairs):
    predicted, labels = np.array(pairs).T.astype(int)
    for low, high in classification_intervals(np.eye(2)[predicted], labels).values():
        assert 0 <= low <= high <= 1
