"""ROUGE equals rouge-score's, and behaves as a measure of shared words should."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from tiny import WORDS

from peftlab.evaluation.rouge import NAMES, longest_common, rouge, rouge_row
from peftlab.runs.metrics import metric

PEER = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)
# Few words, so that texts share many; and any text at all, for what counts as a word.
FEW = st.lists(st.sampled_from([*WORDS[:6], "It's", "8/10,", "Café"]), max_size=30).map(" ".join)
TEXTS = FEW | st.text(max_size=40)


@given(TEXTS, TEXTS)
def test_each_row_is_rouge_scores(candidate, reference):
    peer = PEER.score(reference, candidate)
    expected = [peer[name].fmeasure for name in ("rouge1", "rouge2", "rougeL")]
    assert rouge_row(candidate, reference) == pytest.approx(expected, abs=1e-6)


@given(TEXTS, TEXTS)
def test_it_is_symmetric_and_at_most_one(a, b):
    assert rouge_row(a, b) == rouge_row(b, a)
    assert all(0 <= score <= 1 for score in rouge_row(a, b))


def test_order_matters_to_bigrams_and_subsequences_only():
    one, two, longest = rouge_row("the film was good fun", "fun good was film the")
    assert (one, two, longest) == (1.0, 0.0, 0.2)
    assert rouge_row("The film!", "the -- FILM") == (1.0, 1.0, 1.0)
    assert rouge_row("", "the film") == rouge_row("...", "") == (0.0, 0.0, 0.0)


@given(st.lists(st.integers(0, 4).map(str), max_size=80), st.sets(st.integers(0, 79)))
def test_a_subsequence_is_found_whole(sequence, places):
    part = [word for place, word in enumerate(sequence) if place in places]
    assert longest_common(part, sequence) == longest_common(sequence, part) == len(part)


def test_rows_means_and_intervals_agree():
    references = [f"the film was {word} and w{i}" for i, word in enumerate(WORDS)]
    candidates = [f"the {word} film" for word in WORDS]
    found = rouge(candidates, references)
    assert found.rows.shape == (len(WORDS), 3)
    assert found.metrics.keys() == found.intervals.keys() == set(NAMES)
    for column, name in enumerate(NAMES):
        assert metric(name).unit == "points"
        assert found.metrics[name] == pytest.approx(100 * np.mean(found.rows[:, column]))
        low, high = found.intervals[name]
        assert low <= found.metrics[name] <= high
    assert rouge(candidates, references).intervals == found.intervals


def test_rows_must_pair_up():
    with pytest.raises(ValueError, match="no rows"):
        rouge([], [])
    with pytest.raises(ValueError):
        rouge(["a"], ["a", "b"])
