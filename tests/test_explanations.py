"""Explanations and gists: what is spelled is read back, reviews are joined by hash, makers keep to the review."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest
import tiny
import torch
from commands import peftlab
from hypothesis import given
from hypothesis import strategies as st

from peftlab.data import joined
from peftlab.data.explanations import (
    SENTIMENTS,
    answer_of,
    occurs,
    prompt_of,
    quotations,
    reason_of,
    review_of,
    stated_label,
    unquoted,
)
from peftlab.data.joined import digest
from peftlab.data.overlap import words
from peftlab.data.records import LabelledText, Prompt, PromptCompletion, SummaryPair
from peftlab.data.sources import load_records
from peftlab.errors import LabError, UserError
from peftlab.evaluation.explanations import evaluate_explanations
from peftlab.models.classifier import TextClassifier
from peftlab.recipes import build_explanations, build_gist, makers
from peftlab.recipes.evidence import Evidence, clauses, windows
from peftlab.rewards.rubric import rubric_scores
from peftlab.runs.metrics import metric
from peftlab.sampling.sampler import Decoding, Sampler

LABELS = st.sampled_from([0, 1])
GOOD = "It begins badly, but the two leads are a great joy to watch. The music moved us all to tears. See it soon."
BAD = "Nice scenery, but this plot makes no sense at all. The jokes are painfully flat. I left after one awful hour."
REVIEWS = [
    LabelledText(f"imdb/{i}", f"{GOOD if i % 2 else BAD} Number {i} was {'seen' if i % 3 else 'shown'} at noon.", i % 2)
    for i in range(24)
]


# ----- spelled and read back


@given(label=LABELS, reason=st.text(min_size=1, max_size=60).filter(lambda t: t.strip() == t and t[0].isalnum()))
def test_an_answer_is_read_back(label, reason):
    if stated_label(reason) is not None:
        return  # a reason that begins with a label's name is no reason
    answer = answer_of(label, reason)
    assert answer[0] == " " and stated_label(answer) == label and reason_of(answer) == reason


@given(review=st.text(max_size=200))
def test_a_prompt_gives_its_review_back(review):
    assert review_of(prompt_of(review)) == review
    assert review_of(f"<|user|>{prompt_of(review)}<|assistant|>") == review


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        (" Positive.", 1), ("NEGATIVE: dull", 0), ("positive", 1), (" This review is negative, since it bores.", 0),
        (" It isn't positive.", None), (" Not negative at all.", None), (" Positively lovely.", None), ("", None),
        (' The writer says "nothing positive" and is negative.', 0), (" Positive or negative, who knows.", 1),
        (" It is positive and negative.", None), (" A film.\nPositive.", None),
    ],
)
def test_the_stated_label(answer, label):
    assert stated_label(answer) == label


def test_quotations():
    assert quotations('He says "a b" and “c d”, not "e') == ["a b", "c d"]
    assert unquoted('He says "a b" now').split() == ["He", "says", "now"]
    assert occurs("B  c!", "a b, C d") and not occurs("b", "ab c") and not occurs("", "anything")


# ----- joined with the reviews


@pytest.fixture
def blocks(monkeypatch):
    """The train block is the even half of the reviews, prompts the odd one; both labels in each."""
    halves = {"train": REVIEWS[:16], "prompts": REVIEWS[16:]}
    for module in (joined, makers):
        monkeypatch.setattr(module, "load_block", halves.__getitem__)


def write(path, rows) -> str:
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return str(path)


def row(review: LabelledText, **changes: object) -> dict[str, object]:
    answer = answer_of(review.label, 'It says "at noon".')
    return {"id": review.id, "sha": digest(review.text), "answer": answer, "maker": "m"} | changes


def test_rows_get_their_review_by_id(blocks, tmp_path):
    path = write(tmp_path / "e.jsonl.gz", [row(REVIEWS[3]), row(REVIEWS[20])])
    found = load_records(f"imdb-explanations:{path}", "sft").records
    review = REVIEWS[3]
    answer = answer_of(1, 'It says "at noon".')
    assert found[0] == PromptCompletion("imdb/3", prompt_of(review.text), answer, 1) and found[1].id == "imdb/20"
    asked = load_records(f"imdb-explanations:{path}", "prompts").records
    assert asked[0] == Prompt("imdb/3", prompt_of(review.text), 1)
    with pytest.raises(UserError, match="serves sft and prompts, not classify"):
        load_records(f"imdb-explanations:{path}", "classify")
    path = write(tmp_path / "g.jsonl.gz", [row(REVIEWS[3], summary="A gist.")])
    assert load_records(f"imdb-gist:{path}", "summarize").records == [SummaryPair("imdb/3", review.text, "A gist.")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sha": "0" * 16}, ":2: review imdb/4 is not the text that this row was made of"),
        ({"id": "imdb/999"}, ":2: review imdb/999 is not in the block train or prompts"),
        ({"answer": None}, ":2: expected text in id, sha, answer and maker"),
    ],
)
def test_a_row_whose_review_is_another_is_refused(blocks, tmp_path, changes, message):
    path = write(tmp_path / "e.jsonl.gz", [row(REVIEWS[3]), row(REVIEWS[4], **changes)])
    with pytest.raises(UserError, match=message):
        load_records(f"imdb-explanations:{path}", "sft")


def test_what_is_no_such_file_is_refused(blocks, tmp_path):
    broken = tmp_path / "b.jsonl.gz"
    for content in (b"no gzip", gzip.compress(b"{nonsense\n"), gzip.compress(b"[1]\n")[:-9]):
        broken.write_bytes(content)
        with pytest.raises(UserError, match="no gzipped JSONL file"):
            load_records(f"imdb-explanations:{broken}", "sft")
    with pytest.raises(UserError, match="splits train, test"):
        load_records("imdb-explanations:judge", "sft")
    with pytest.raises(UserError, match="there is no such file"):
        load_records("imdb-gist:absent.jsonl.gz", "summarize")


@pytest.mark.parametrize(("name", "kind"), [("imdb-gist", "summarize"), ("imdb-explanations", "sft")])
@pytest.mark.parametrize("split", ["train", "test", "absent.jsonl.gz"])
def test_what_is_not_there_says_how_it_is_built_and_then_loaded(name, kind, split, blocks, tmp_path, monkeypatch):
    monkeypatch.setattr(joined, "SHIPPED", tmp_path / "nothing")
    with pytest.raises(UserError) as caught:
        load_records(f"{name}:{split}", kind)
    what = name.removeprefix("imdb-")
    assert f"`peftlab data {what} --output FOLDER`" in str(caught.value)
    # What the builder writes into the folder is what the spec names.
    names = [f"{what}-{part}.jsonl.gz" for part in joined.BLOCK_OF]
    for file in names:
        write(tmp_path / file, [row(REVIEWS[3], summary="A gist.")])
    spec = re.search(r"give (\S+)$", str(caught.value))[1]
    assert Path(spec).name == f"{what}-{split if split in joined.BLOCK_OF else 'train'}.jsonl.gz"
    assert len(load_records(spec.replace("FOLDER", str(tmp_path)), kind).records) == 1


@pytest.mark.parametrize("name", joined.COLUMNS)
@pytest.mark.parametrize("split", joined.BLOCK_OF)
def test_what_is_shipped_joins_and_holds(name, split):
    rows = joined.load_joined(name, split)
    assert len({item.review.id for item in rows}) == len(rows) >= {"train": 5_500, "test": 850}[split]
    if name == "imdb-explanations":
        prompts = [prompt_of(item.review.text) for item in rows]
        scores = rubric_scores(prompts, [r.text for r in rows], [Prompt(r.review.id, "", r.review.label) for r in rows])
        assert all(min(scores[part]) == 1 for part in ("label", "explained", "evidence", "ended"))
        assert all(r.text.startswith(f" {SENTIMENTS[r.review.label].capitalize()}. ") for r in rows)


# ----- makers


class Lexicon(TextClassifier):
    """A classifier of two words' worth of taste, to keep these tests in seconds."""

    def logits(self, texts, batch_size=64):
        good, bad = ("joy", "great", "moved"), ("no sense", "flat", "awful")
        return torch.tensor([[3.0 * sum(w in t for w in told) for told in (bad, good)] for t in texts])


@pytest.fixture
def evidence():
    return Evidence(Lexicon("lexicon", torch.nn.Identity(), None, list(SENTIMENTS), 64))


def options(**changes):
    return makers.BuildOptions(**({"rows": 6, "held_out": 3, "samples": 2, "batch_size": 5, "device": "cpu"} | changes))


@pytest.fixture
def writer(tmp_path):
    from peftlab.recipes.tools import load_sampler

    return makers.Writer(load_sampler(str(tiny.causal_folder(tmp_path / "gpt2")), "cpu"), options(), max_new_tokens=8)


def test_telling_spans_are_pieces_of_the_review_that_speak_for_its_label(evidence):
    for review, spans in zip(REVIEWS, evidence.spans(REVIEWS), strict=True):
        assert spans and all(occurs(span.text, review.text) and span.score > 0 for span in spans)
        told = ("joy", "great", "moved") if review.label else ("sense", "flat", "awful")
        assert any(word in spans[0].text for word in told)


@given(review=st.text(alphabet=st.sampled_from("abc  \t,.;!?\"'-\n"), max_size=300))
def test_pieces_of_any_text_stand_in_it(review):
    for piece in [*clauses(review), *windows(review)]:
        assert piece in review and occurs(piece, review) and '"' not in piece and 3 <= len(words(piece)) <= 12


def test_a_piece_of_a_long_clause_keeps_its_white_space_and_counts_for_the_review(evidence):
    """What is scored is what is left out: a review without its only telling piece says less."""
    long = "  ".join(f"w{n}" for n in range(7)) + "  a great \t joy  " + "  ".join(f"x{n}" for n in range(7))
    pieces = windows(long)
    assert len(pieces) > 1 and all(piece in long for piece in pieces)
    [[span]] = evidence.spans([LabelledText("imdb/1", long.replace("great \t joy", "great  thing"), 1)])
    assert "great  thing" in span.text and span.score == 6.0, "3 alone, and 3 that the review loses"


def test_the_extractive_maker_has_full_marks_and_says_the_same_again(evidence):
    maker = build_explanations.Extractive(evidence, seed=0)
    answers = maker.make(REVIEWS)
    scores = rubric_scores(
        [prompt_of(r.text) for r in REVIEWS], answers, [Prompt(r.id, "", r.label) for r in REVIEWS]
    )
    assert all(set(values) == {1.0} for values in scores.values())
    # Alone or among others, in any order: a row's answer is its own.
    assert maker.make(REVIEWS[5:6]) == answers[5:6] and maker.make(REVIEWS[::-1]) == answers[::-1]
    assert len({reason_of(a).split('"')[0] for a in answers}) > 3, "varied phrases"
    assert build_explanations.Extractive(evidence, seed=1).make(REVIEWS) != answers


def test_no_span_no_answer(evidence):
    mute = LabelledText("imdb/9", "Nothing is said here about it one way or the other, really.", 1)
    assert build_explanations.Extractive(evidence, 0).make([mute, REVIEWS[1]])[0] is None


def test_what_a_writer_writes_follows_from_seed_and_id_alone(writer):
    asked = [makers.few_shot([("the film was", "good")], r.text[:40]) for r in REVIEWS[:7]]
    openers = [["the film", "it was"]] * 7
    ids = [r.id for r in REVIEWS[:7]]
    texts = writer.write(asked, openers, ids)
    assert all(first.startswith("the film") and second.startswith("it was") for first, second in texts)
    assert writer.write(asked[3:4], openers[:1], ids[3:4]) == texts[3:4]
    assert writer.write(asked[3:4], openers[:1], ["another"]) != texts[3:4]


def test_of_samples_the_true_one_with_the_most_telling_evidence_is_kept(evidence, writer):
    maker = build_explanations.Written(writer, evidence, "m")
    good, bad = REVIEWS[1], REVIEWS[0]
    said = [
        ' Positive. The reviewer says "see it soon".',  # true, and tells nothing
        ' Positive. The reviewer says "the two leads are a great joy" and praises the music. Then it went on',
        ' Positive. The reviewer says "the music moved us all to tears" and his grandmother from Portugal sang opera.',
        ' Positive. The reviewer says "a marvel of a great joy".',  # not in the review
    ]
    wrong = [' Negative. The reviewer says "the jokes are painfully flat" and praises the scenery.']
    kept = maker.choose([good, bad], [["The reviewer says \""] * 4, ["The"]], [said, wrong])
    assert kept[0] == ' Positive. The reviewer says "the two leads are a great joy" and praises the music.'
    assert kept[1] == ' Negative. The reviewer says "the jokes are painfully flat".', "cut before the praise"
    assert maker.choose([good], [["x"]], [[said[3]]]) == [None]
    # Inventions go; what stands before them may stay, but not where it was given to the model.
    opening = 'The reviewer says "the music moved us all to tears"'
    assert maker.choose([good], [["x"]], [[said[2]]]) == [f" Positive. {opening}."]
    assert maker.choose([good], [[opening]], [[said[2]]]) == [None]


@pytest.mark.parametrize(
    ("gist", "fits"),
    [
        ("The film has two leads who are a joy to watch, and music.", True),
        ("The music moved us all to tears.", False),  # copied
        ("A great joy.", False),  # too short
        ("A drama about a grandmother in Portugal who sings opera with joy.", False),  # invented
        ("A great film with a great cast and a great story.", False),  # of any film
        ("I say that the two leads are a joy to watch.", False),  # the reviewer's voice
        ("The leads are a joy to watch, and the leads are a joy to watch.", False),
        ("The two leads are a joy to watch, and a sheepdog steals every scene.", False),  # the example's words
    ],
)
def test_what_holds_as_a_gist(gist, fits):
    assert build_gist.holds(gist, REVIEWS[1]) == fits


def test_gap_sentences_are_sentences_of_the_review():
    for review, gist in zip(REVIEWS, build_gist.GapSentence().make(REVIEWS), strict=True):
        assert gist is None or (gist in review.text and 6 <= len(gist.split()) <= 30)


# ----- building


@pytest.mark.parametrize("what", ["explanations", "gist"])
def test_a_build_is_the_same_again_and_loads(what, blocks, evidence, tmp_path, monkeypatch):
    """Both makers, from the command line: a random model writes nothing that holds, and the extractive one serves."""
    monkeypatch.setattr(TextClassifier, "load", lambda *_, **__: evidence.classifier)
    model = tiny.causal_folder(tmp_path / "gpt2")
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        done = peftlab(
            f"data {what} --model {{model}} --rows 6 --held-out 3 --samples 2 --device cpu --output {{folder}}",
            model=str(model), folder=str(folder),
        )
        assert done.code == 0, done.err
        assert "train: 6 rows from 6 reviews" in done.out
    names = [f"{what}-train.jsonl.gz", f"{what}-test.jsonl.gz"]
    assert all((folders[0] / name).read_bytes() == (folders[1] / name).read_bytes() for name in names)
    summary = json.loads((folders[0] / f"{what}.json").read_text())
    tried = summary["splits"]["test"]["makers"]
    assert tried["extractive"]["made"] == 3 and tried[str(model)]["made"] == 0
    kind = "sft" if what == "explanations" else "summarize"
    spec = "+".join(f"imdb-{what}:{folders[0] / name}" for name in names)
    assert len(load_records(spec, kind).records) == 9
    column = "answer" if what == "explanations" else "summary"
    rows = [json.loads(line) for n in names for line in gzip.decompress((folders[0] / n).read_bytes()).splitlines()]
    assert all(row.keys() == {"id", "sha", column, "maker"} for row in rows), "no review is shipped"


@pytest.mark.parametrize(
    "changes",
    [{"maker": "x"}, {"samples": 0}, {"dtype": "int8"}, {"temperature": 0.0}, {"rows": -1}]
    + [{"temperature": float(value)} for value in ("nan", "inf", "-inf")],
)
def test_options_that_make_no_sense(changes):
    with pytest.raises(UserError, match="^--"):
        options(**changes)


@pytest.mark.parametrize("what", ["explanations", "gist"])
@pytest.mark.parametrize("output", ["taken", "taken/below", "taken/far/below"])
def test_an_output_that_is_a_file_is_refused_before_a_model_loads(what, output, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("taken").write_text("mine")
    done = peftlab(f"data {what} --model nowhere/model --classifier nowhere/model --output {output}")
    assert done.code == 2 and done.err == f"peftlab: --output {output}: taken is a file; give a folder\n"
    done = peftlab(f"data {what} --model nowhere/model --classifier nowhere/model --output fresh/folder")
    assert done.code == 2 and "nowhere/model" in done.err and not Path("fresh").exists()


def test_makers_that_make_nothing_stop_the_build(blocks, tmp_path):
    class Mute:
        name = "mute"

        def make(self, reviews):
            return [None] * len(reviews)

    with pytest.raises(LabError, match="no maker made anything"):
        makers.build("gist", "summary", [Mute()], options(), tmp_path)


# ----- evaluation


def test_answers_are_scored_in_the_order_of_their_reviews(tiny_causal):
    model, tokenizer = tiny_causal("gpt2")
    sampler = Sampler(model, tokenizer)
    records = [Prompt(r.id, r.text[: 20 + 3 * i], r.label) for i, r in enumerate(REVIEWS[:5])]
    decoding = Decoding(max_new_tokens=6, temperature=0.0)
    found = evaluate_explanations(sampler, records, decoding, batch_size=2)
    alone = [evaluate_explanations(sampler, [record], decoding).answers[0] for record in records]
    assert found.answers == alone
    metrics, intervals = found.metrics(), found.intervals()
    assert metrics.keys() == intervals.keys() and all(metric(name) for name in metrics)
    assert all(low <= metrics[name] <= high for name, (low, high) in intervals.items())
    assert metrics["rubric/all"] <= min(v for n, v in metrics.items() if n.startswith("rubric/"))
    with pytest.raises(UserError, match="row imdb/0: its prompt leaves no room"):
        evaluate_explanations(sampler, records, Decoding(max_new_tokens=64))
