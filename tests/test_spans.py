"""Span corruption loses nothing, gap sentences are the document's own, and a pass repeats none before it."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import WORDS, documents

from peftlab.data.collate import collate_seq2seq
from peftlab.data.spans import (
    COPIED,
    DENSE,
    PREFIX,
    SENTINELS,
    SPANS,
    WHOLE,
    Noise,
    Views,
    blocks,
    corrupt,
    gaps,
    principal,
    principal_sentence,
)
from peftlab.data.tokenize import sentences
from peftlab.evaluation.rouge import rouge_row
from peftlab.models.fresh import train_tokenizer

EOS, MARKS = 1, list(range(1000, 1100))
SENTENCES = st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=8).map(" ".join), max_size=8)


@pytest.fixture(scope="module")
def words():
    return train_tokenizer("t5", documents(30), 400, 128)


def restore(shown: list[int], target: list[int]) -> list[int]:
    """The document: each sentinel of the input replaced by what follows it in the target."""
    assert shown.pop() == target.pop() == EOS
    hidden: dict[int, list[int]] = {}
    for token in target:
        if token in MARKS:
            assert token not in hidden
            spot = hidden.setdefault(token, [])
        else:
            spot.append(token)
    assert list(hidden) == MARKS[: len(hidden)]
    assert hidden.pop(MARKS[len(hidden) - 1]) == [], "the last sentinel ends the list"
    assert [token for token in shown if token in MARKS] == list(hidden)
    assert all(hidden.values())
    return [part for token in shown for part in hidden.get(token, [token])]


@given(st.lists(st.integers(2, 999), min_size=2, max_size=300), st.integers(), st.sampled_from([SPANS, DENSE]))
def test_input_and_target_make_the_document_again(ids, seed, kind):
    shown, target = corrupt(ids, random.Random(seed), MARKS, EOS, kind)
    noise, spans = kind.counts(len(ids))
    assert len(shown) == len(ids) - noise + spans + 1 <= len(ids) + 1
    assert len(target) == noise + spans + 2
    assert not any(a in MARKS and b in MARKS for a, b in zip(shown, shown[1:], strict=False))
    assert restore(shown, target) == ids


def test_the_share_hidden_and_the_mean_span_are_the_papers():
    for kind, share, mean in ((SPANS, 0.15, 3), (DENSE, 0.5, 8), (WHOLE, 0.3, 3)):
        noise, spans = kind.counts(400)
        assert (noise / 400, noise / spans) == (share, mean)
    assert SPANS.counts(10_000) == (1500, 99)  # no more sentinels than there are
    assert SPANS.counts(2) == Noise(0.9, 9).counts(2) == (1, 1)
    with pytest.raises(ValueError, match="two tokens"):
        corrupt([5], random.Random(0), MARKS, EOS)


def test_no_place_is_always_kept_or_hidden():
    """Not even the ends, which the original's mask treats so."""
    ids, counts = list(range(2, 42)), [0] * 40
    draw = random.Random(0)
    for _ in range(4000):
        shown, _ = corrupt(ids, draw, MARKS, EOS)
        for place in set(ids) - set(shown):
            counts[place - 2] += 1
    assert min(counts) > 0.03 * 4000 and max(counts) < 0.25 * 4000


@given(SENTENCES, st.sampled_from([".", "!", '."', "...", "?)"]))
def test_sentences_are_the_text_without_the_space_between(parts, mark):
    ended = [part + mark for part in parts]
    assert sentences("\n ".join(ended) + " ") == ended
    assert sentences(" ".join([*ended, "and then"])) == [*ended, "and then"]


@given(SENTENCES)
def test_the_principal_sentence_scores_highest_against_the_rest(parts):
    number = principal(parts)
    if len(parts) < 2:
        assert number is None
        return
    scores = [rouge_row(part, " ".join([*parts[:i], *parts[i + 1 :]]))[0] for i, part in enumerate(parts)]
    assert scores[number] == pytest.approx(max(scores))
    assert number == principal(parts)


def test_the_principal_sentence_of_a_text():
    text = 'Hello there! The plot was dull, and the actor was "dull." I ate. The dull plot has a dull actor.'
    assert principal_sentence(text) == 'The plot was dull, and the actor was "dull."'
    assert principal_sentence("Only one sentence here.") is None
    assert principal_sentence("... ! ?") is principal_sentence("") is None


def test_a_gap_is_the_text_and_its_principal_sentence(words):
    texts = documents(20)
    found = gaps([*texts, "one sentence only."], words, 128)
    assert len(found) == 20
    for text, gap in zip(texts, found, strict=True):
        whole, masked = gap.row(None), gap.row(words.mask_token_id)
        assert whole["input_ids"] == words(PREFIX + text)["input_ids"]
        assert whole["labels"] == masked["labels"] == words(principal_sentence(text))["input_ids"]
        assert masked["input_ids"].count(words.mask_token_id) == 1
        shown = words.decode(masked["input_ids"], skip_special_tokens=True)
        assert shown == (PREFIX + text).replace(" " + principal_sentence(text), "", 1)


def test_what_is_too_long_is_cut_at_a_sentence_or_into_blocks(words):
    text = " ".join(documents(30))
    (gap,) = gaps([text], words, 100)
    assert len(gap.row(None)["input_ids"]) <= 100
    shown = words.decode(gap.row(None)["input_ids"], skip_special_tokens=True).removeprefix(PREFIX)
    assert text.startswith(shown + " ") and shown.endswith(".")
    parts = blocks([text, "a"], words, 50)
    assert [token for part in parts for token in part] == words(text, add_special_tokens=False)["input_ids"]
    assert max(map(len, parts)) == 49


def test_passes_differ_and_a_row_is_always_the_same(words):
    texts = documents(12)
    parts = blocks(texts, words, 64), gaps(texts, words, 64)
    rows, again = (Views(*parts, words, seed=3, views=4) for _ in range(2))
    assert len(rows) == 4 * rows.items == 4 * (len(parts[0]) + len(parts[1]))
    assert [again[i] for i in reversed(range(len(rows)))] == [rows[i] for i in reversed(range(len(rows)))]
    lengths = [len(row["input_ids"]) for row in rows]
    longest = [max(lengths[item :: rows.items]) for item in range(rows.items)]  # of a gap, with its sentence in place
    assert rows.lengths()[len(parts[0]) :] == longest[len(parts[0]) :]
    assert all(a >= b for a, b in zip(rows.lengths(), longest, strict=True)) and max(rows.lengths()) <= 64
    first = len(parts[0])
    for item in range(rows.items):
        seen = [rows[view * rows.items + item]["input_ids"] for view in range(4)]
        if item < first and len(parts[0][item]) > 20:
            assert len(set(map(tuple, seen))) > 1
        elif item >= first:
            assert sorted(ids.count(words.mask_token_id) for ids in seen) == [0, 0, 1, 1]


def test_the_first_passes_are_copies_of_tokens_in_random_order(words):
    texts = documents(12)
    parts = blocks(texts, words, 64), gaps(texts, words, 64)
    rows, without = Views(*parts, words, seed=3, views=3, copies=1), Views(*parts, words, seed=3, views=3)
    documents_of = [*parts[0], *(gap.row(None)["input_ids"][:-1] for gap in parts[1])]
    for item, known in enumerate(documents_of):
        *copied, end = rows[item]["input_ids"]
        assert rows[item]["labels"] == rows[item]["input_ids"] and end == words.eos_token_id
        assert not Counter(copied) - Counter(known) and len(copied) == min(COPIED, len(known))
    assert any(rows[item]["input_ids"][:-1] != known for item, known in enumerate(documents_of))
    assert [rows[i] for i in range(rows.items, len(rows))] == [without[i] for i in range(rows.items, len(rows))]


def test_a_block_meets_each_noise_in_turn(words):
    (block,) = blocks([" ".join(documents(3))], words, 200)
    rows = list(Views([block], [], words, seed=1, views=6))
    marks = words.convert_tokens_to_ids(SENTINELS)
    for first, second in zip(rows[:3], rows[3:], strict=True):
        counts = [(sum(t in marks for t in row["input_ids"]), row["input_ids"].count(words.mask_token_id))
                  for row in (first, second)]
        assert counts[0] == counts[1] and first != second
    infilled = rows[2]
    assert infilled["labels"] == [*block, words.eos_token_id]
    kept = [token for token in infilled["input_ids"] if token != words.mask_token_id]
    assert len(kept) == len(block) + 1 - WHOLE.counts(len(block))[0]
    rest = iter(infilled["labels"])
    assert all(token in rest for token in kept), "what is kept stands in the document's order"


def test_a_batch_pads_inputs_and_ignores_padded_labels():
    rows = [{"input_ids": [5, 6, 7], "labels": [8]}, {"input_ids": [9], "labels": [2, 3]}]
    batch = collate_seq2seq(rows, 0)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [9, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[8, -100], [2, 3]]


def test_the_tokenizer_knows_its_marks(words):
    assert words.convert_tokens_to_ids(["<pad>", "</s>", "<mask>", *SENTINELS]) == list(range(103))
    assert words("the film").input_ids[-1] == words.eos_token_id == 1
    assert words.decode(words("film <extra_id_7> 雪").input_ids, skip_special_tokens=True) == "film  雪"
