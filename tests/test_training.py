"""What the supervised recipes train on: rows, packed blocks, masks, and the order of batches."""

from __future__ import annotations

import random
import shutil
from collections import Counter

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftlab.data.collate import collate_language
from peftlab.data.tokenize import IGNORED, document_ids, labelled, pack, prompt_completion
from peftlab.evaluation.perplexity import row_nlls
from peftlab.recipes.launch import dry_run, launch
from peftlab.runs.atomic import read_rows
from peftlab.training.sampler import BucketSampler

SPELLING = tiny.spelling_tokenizer()
EOS = SPELLING.eos_token_id
LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=120)
SENTENCES = st.lists(
    st.tuples(st.lists(st.sampled_from([*tiny.WORDS, "naïve", "雪"]), min_size=1, max_size=6), st.sampled_from(".!?")),
    min_size=1,
    max_size=6,
).map(lambda parts: " ".join(" ".join(words) + stop for words, stop in parts))


pytestmark = pytest.mark.usefixtures("one_thread")


def documents_of(lengths: list[int]) -> list[list[int]]:
    """Documents whose tokens are all different, so that each one's way can be followed."""
    numbers = iter(range(sum(lengths)))
    return [[next(numbers) for _ in range(length)] for length in lengths]


@given(LENGTHS, st.integers(1, 40))
def test_packing_keeps_every_token_once_and_every_document_whole(lengths, size):
    documents = documents_of(lengths)
    blocks = pack(documents, size)
    assert Counter(t for block in blocks for t in block["input_ids"]) == Counter(t for d in documents for t in d)
    assert all(1 <= len(block["input_ids"]) <= size for block in blocks)
    pieces = []
    for block in blocks:
        assert len(block["input_ids"]) == len(block["position_ids"]) == len(block["labels"])
        for token, position, label in zip(*(block[n] for n in ("input_ids", "position_ids", "labels")), strict=True):
            if position == 0:
                pieces.append([])
            assert position == len(pieces[-1])
            assert label == (IGNORED if position == 0 else token)
            pieces[-1].append(token)
    assert sorted(pieces) == sorted(d[i : i + size] for d in documents for i in range(0, len(d), size))


def test_a_block_of_last_tokens_teaches_nothing():
    """Twenty documents, each a token too long: a block of sixteen last tokens and one of four."""
    rows = pack(documents_of([17] * 20), 16)
    assert len(rows) == 22 and labelled(rows) == [row for row in rows if row["position_ids"] == list(range(16))]
    mixed = pack(documents_of([17, 5]), 16)
    assert labelled(mixed) == mixed


@given(LENGTHS, st.integers(1, 40))
def test_packing_wastes_no_block_that_a_neighbour_could_hold(lengths, size):
    filled = sorted(len(block["input_ids"]) for block in pack(documents_of(lengths), size))
    assert len(filled) == 1 or filled[0] + filled[1] > size


@given(st.lists(SENTENCES, min_size=1, max_size=4))
def test_a_document_is_its_text_and_an_end(texts):
    rows = document_ids(texts, SPELLING)
    assert [SPELLING.decode(row[:-1]) for row in rows] == texts
    assert all(row[-1] == EOS and EOS not in row[:-1] for row in rows)


@given(SENTENCES, st.integers(1, 40))
def test_a_shortened_document_ends_where_a_sentence_does_or_has_no_end(text, limit):
    (row,) = document_ids([text], SPELLING, limit)
    (whole,) = document_ids([text], SPELLING)
    first = text[: next(i for i, c in enumerate(text) if c in ".!?") + 1]
    assert 1 <= len(row) <= limit
    if row[-1] == EOS:
        kept = SPELLING.decode(row[:-1])
        assert text.startswith(kept) and kept[-1] in ".!?"
        # The longest such opening: with the next sentence it would not fit.
        rest = text[len(kept) :]
        following = kept + rest[: next((i for i, c in enumerate(rest) if c in ".!?"), -1) + 1]
        assert not rest or len(document_ids([following], SPELLING)[0]) > limit
    else:
        assert row == whole[:limit]
        assert len(document_ids([first], SPELLING)[0]) > limit


def test_a_text_of_long_tokens_is_not_ended_in_its_middle():
    """Twelve characters a token are read at most; what lies behind them still belongs to the text."""
    words = tiny.tokenizer()
    text = "x" * 200 + " good" * 5
    (row,) = document_ids([text], words, limit=10)
    assert words.eos_token_id not in row


@given(st.text("ab ", min_size=1, max_size=20), st.text("ab ", min_size=1, max_size=20), st.integers(1, 50))
def test_only_the_completion_and_its_end_are_learned(prompt, completion, length):
    row = prompt_completion(prompt, completion, SPELLING, length)
    asked, answer = (SPELLING(text)["input_ids"] for text in (prompt, completion))
    answer = [*answer, EOS][:length]
    kept = len(row["input_ids"]) - len(answer)
    assert len(row["input_ids"]) == min(length, len(asked) + len(answer))
    assert row["input_ids"] == [*asked[len(asked) - kept :], *answer]  # an overlong prompt loses its oldest tokens
    learned = [(i, label) for i, label in enumerate(row["labels"]) if label != IGNORED]
    assert learned == [(i, t) for i, t in enumerate(row["input_ids"]) if i >= max(1, kept)]
    assert row["position_ids"] == list(range(len(row["input_ids"])))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_packed_document_neither_sees_nor_predicts_its_neighbours(tiny_causal, kind, attention):
    model, tokenizer = tiny_causal(kind)
    model.set_attn_implementation(attention)
    documents = [torch.randint(2, 64, (length,)).tolist() for length in (20, 11, 7, 30, 3, 25)]
    alone = [row for document in documents for row in pack([document], 64)]
    packed = pack(documents, 48)
    assert len(packed) < len(alone)
    sums, counts = row_nlls(model, packed, tokenizer.pad_token_id)
    apart, counts_apart = row_nlls(model, alone, tokenizer.pad_token_id, batch_size=1)
    assert counts.sum() == counts_apart.sum() == sum(map(len, documents)) - len(documents)
    assert sums.sum() == pytest.approx(apart.sum(), rel=1e-5)
    # The same holds for the loss that Trainer takes, and for its gradient.
    model.config.use_cache = False
    model.requires_grad_(True)
    gradients = []
    for batch in ([packed], [[row] for row in alone]):
        model.zero_grad()
        for rows in batch:
            inputs = collate_language(rows, tokenizer.pad_token_id)
            model(**inputs, num_items_in_batch=counts.sum()).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


def batches_of(sampler: BucketSampler) -> list[list[int]]:
    """The sampler's rows as the data loader cuts them."""
    order = list(sampler)
    return [order[i : i + sampler.batch_size] for i in range(0, len(order), sampler.batch_size)]


def spread(sampler: BucketSampler, batches: list[list[int]]) -> int:
    """Longest less shortest row, summed over batches."""
    found = [[sampler.lengths[row] for row in batch] for batch in batches]
    return sum(max(lengths) - min(lengths) for lengths in found)


@given(LENGTHS, st.integers(1, 9), st.integers(0, 99), st.integers(0, 9), st.integers(1, 5))
def test_an_epoch_is_a_permutation_of_all_rows(lengths, batch_size, seed, epoch, window):
    sampler = BucketSampler(lengths, batch_size, seed, window)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert sorted(order) == list(range(len(lengths))) and len(sampler) == len(lengths)
    random.seed(seed + 1)
    torch.manual_seed(seed + 1)
    again = BucketSampler(lengths, batch_size, seed, window)
    list(again)  # what was drawn before does not matter, only seed and epoch do
    again.set_epoch(epoch)
    assert list(again) == order


@given(st.lists(st.integers(1, 60), min_size=1, max_size=120), st.integers(1, 9), st.integers(0, 99))
def test_rows_of_a_batch_are_neighbours_in_length(lengths, batch_size, seed):
    """Within one window the batches cut the sorted lengths, so their spreads add up to no more than the whole range."""
    sampler = BucketSampler(lengths, batch_size, seed)
    assert spread(sampler, batches_of(sampler)) <= max(lengths) - min(lengths)


def test_windows_keep_most_of_the_saving_and_batches_come_in_no_order_of_length():
    draw = random.Random(0)
    sampler = BucketSampler([draw.randint(1, 512) for _ in range(1000)], 8, seed=0, window=10)
    batches = batches_of(sampler)
    shuffled = draw.sample(range(1000), 1000)
    chance = [shuffled[i : i + 8] for i in range(0, 1000, 8)]
    assert spread(sampler, batches) < 0.2 * spread(sampler, chance)
    firsts = torch.tensor([float(sampler.lengths[batch[0]]) for batch in batches])
    order = torch.stack([firsts, torch.arange(len(batches)).float()])
    assert abs(float(torch.corrcoef(order)[0, 1])) < 0.3


@given(LENGTHS, st.integers(1, 9), st.integers(1, 4))
def test_an_epoch_goes_through_a_pass_of_its_own(lengths, batch_size, passes):
    """In the order, by its own seed, that it has where all epochs share one pass."""
    plain, several = BucketSampler(lengths, batch_size, 3), BucketSampler(lengths, batch_size, 3, passes=passes)
    seen: list[int] = []
    for epoch in range(passes):
        for sampler in (plain, several):
            sampler.set_epoch(epoch)
        seen += several
        assert list(several) == [epoch * len(lengths) + row for row in plain]
    assert sorted(seen) == list(range(passes * len(lengths)))
    several.set_epoch(passes)
    assert sorted(several) == list(range(len(lengths)))


def test_epochs_and_seeds_differ():
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        sampler = BucketSampler([5] * 100, 4, seed)
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] != orders[1] != orders[2] != orders[0]


@pytest.mark.parametrize("epochs", [1, 3, 60])
def test_a_short_batch_is_told_by_its_rows(tmp_path, epochs):
    """Nothing is learned at this rate, so the mean over an epoch of 8 + 1 rows is that of one batch of 9."""
    shop = tiny.workshop(tmp_path)
    keys = ["train_limit=9", "lr=1e-30", f"epochs={epochs}", "max_steps=0", "lora.dropout=0"]

    def logged(size: int) -> list[dict[str, float]]:
        launch("classify", None, tiny.overrides(shop, "classify", *keys, f"batch_size={size}"), tmp_path, f"{size}")
        return [row for row in read_rows(tmp_path / f"{size}" / "metrics.jsonl") if "train/loss" in row]

    whole, rows = [row["train/loss"] for row in logged(9)], logged(8)
    assert len(rows) == {1: 2, 3: 6, 60: 61}[epochs], "every step, or of 120 the first and every second"
    assert [row["train/loss"] for row in rows if row["step"] % 2 == 0] == pytest.approx(whole, abs=1e-6)
    assert all(("train/grad_norm" in row) == (row["step"] % 2 == 1) for row in rows)


def test_a_resume_tells_the_same_of_a_short_batch(tmp_path):
    """What stands before it was logged by the process that was stopped."""
    shop, losses = tiny.workshop(tmp_path), []
    given = tiny.overrides(shop, "classify", "train_limit=9", "batch_size=8", "max_steps=4", "save_every=1")
    for name in ("whole", "stopped"):
        launch("classify", None, given, tmp_path, name)
        if name == "stopped":
            shutil.rmtree(tmp_path / name / "checkpoints" / "step-00000004", ignore_errors=False)
            (tmp_path / name / "summary.json").unlink()
            launch("classify", None, given, tmp_path, name, resume=True)
        rows = read_rows(tmp_path / name / "metrics.jsonl")
        losses.append([(row["step"], row["train/loss"]) for row in rows if "train/loss" in row])
    assert losses[0] == losses[1] and len(losses[0]) == 4


@pytest.mark.parametrize("verb", ["pretrain", "sft", "classify", "summarize"])
def test_a_dry_run_tells_the_steps_of_the_run(tmp_path, verb):
    """A part of an epoch too small for one step is one step; nobody trains for none."""
    pairs = tiny.overrides(tiny.workshop(tmp_path / "shop"), verb, "max_steps=0", "epochs=0.01")
    told = dry_run(verb, None, pairs)
    launch(verb, None, pairs, tmp_path, "run")
    done = max(row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl"))
    assert told.get("steps", told.get("steps (estimate)")) == done == 1
