"""The rubric: what each part rewards, what cannot fool it, and its range."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftlab.data.explanations import answer_of, prompt_of
from peftlab.data.records import Prompt
from peftlab.errors import LabError, UserError
from peftlab.rewards.rubric import RUBRIC, length_band, rubric_scores, style

REVIEW = "I saw it twice. A lovely,\nlovely film, and Ms. Smith is a joy to watch. This is a film of the year."
GOOD = ' Positive. The reviewer praises "a lovely, lovely film" and Ms. Smith.'
LABELS = st.sampled_from([0, 1])


def scores(answer: str, label: int = 1, prompt: str = prompt_of(REVIEW)) -> dict[str, float]:
    return {n: v for n, (v,) in rubric_scores([prompt], [answer], [Prompt("0", prompt, label)]).items()}


def test_a_good_answer_has_every_part():
    assert scores(GOOD) == dict.fromkeys(RUBRIC, 1.0)


@pytest.mark.parametrize(
    ("part", "answer"),
    [
        ("label", GOOD.replace("Positive", "Negative")),
        ("label", ' The reviewer praises "a lovely, lovely film" and Ms. Smith.'),
        ("label", ' Not positive: "a lovely, lovely film" is what the reviewer calls it.'),
        ("explained", " Positive."),
        ("explained", " Positive positive. Indeed."),
        ("evidence", ' Positive. The reviewer praises "a dreadful, dreadful film".'),
        ("evidence", ' Positive. The reviewer says "lovely" about it.'),
        ("evidence", " Positive. This is a film of the reviewer's taste."),
        ("evidence", " Positive. Is this review positive or negative, and why?"),
        ("length", " Positive."),
        ("length", " Positive." + " The reviewer liked all of it very much." * 7),
        ("repetition", " Positive. A lovely lovely film, a lovely lovely film, a lovely lovely film."),
        ("ended", ' Positive. The reviewer praises "a lovely, lovely film" and'),
    ],
)
def test_each_part_sees_its_fault(part, answer):
    assert scores(answer)[part] < 1


def test_evidence_reads_past_case_space_and_punctuation():
    assert scores(' Positive. "LOVELY,   lovely"')["evidence"] == 1
    assert scores(" Positive. The writer finds Ms Smith a joy to watch")["evidence"] == 1
    assert scores(' Positive. The reviewer says “lovely lovely film”.')["evidence"] == 1


def test_only_the_review_is_evidence_also_inside_a_chat_template():
    wrapped = f"<user>\n{prompt_of(REVIEW)}<assistant>\n"
    assert scores(GOOD, prompt=wrapped)["evidence"] == 1
    assert scores(" Positive. Is this review positive or negative, and why?", prompt=wrapped)["evidence"] == 0
    assert scores(' It is "a joy to watch".', prompt="She is a joy to watch.")["evidence"] == 1


@given(answer=st.text(max_size=200), review=st.text(min_size=1, max_size=200), label=LABELS)
def test_every_part_lies_between_0_and_1_for_any_text(answer, review, label):
    assert all(0 <= value <= 1 for value in scores(answer, label, prompt_of(review)).values())


@given(label=LABELS, words=st.lists(st.sampled_from(["dull", "plot", "superb", "waste"]), min_size=3, max_size=9))
def test_a_quotation_of_the_review_is_evidence_and_the_stated_label_counts_for_one_side_only(label, words):
    prompt = prompt_of("Well, " + " ".join(words) + ", I say.")
    answer = answer_of(label, f'The reviewer says "{" ".join(words)}".')
    assert scores(answer, label, prompt)["evidence"] == 1
    assert scores(answer, label, prompt)["label"] == 1 and scores(answer, 1 - label, prompt)["label"] == 0


@given(low=st.integers(1, 20), extra=st.integers(0, 20), count=st.integers(0, 80))
def test_the_length_band_is_1_inside_and_falls_on_both_sides(low, extra, count):
    part = length_band(low, low + extra)

    def at(number: int) -> float:
        return part([""], ["word " * number], [None])[0]

    assert (at(count) == 1) == (low <= count <= low + extra)
    assert at(count) >= at(count + 1) if count >= low else at(count) < at(count + 1)


def test_style_is_the_share_of_rules_kept():
    part = style(wanted=[r"\breviewer\b"], unwanted=["awesome", r"!$"])
    assert part([""] * 3, ["The Reviewer likes it.", "AWESOME!", "It is fine."], [None] * 3) == [1.0, 0.0, 2 / 3]


@pytest.mark.parametrize(
    "make", [lambda: style(), lambda: style(wanted=["("]), lambda: length_band(0, 3), lambda: length_band(5, 4)]
)
def test_what_cannot_score_is_refused(make):
    with pytest.raises(UserError, match="rubric part"):
        make()


def test_a_record_without_a_label_is_named():
    with pytest.raises(LabError, match="row 7 has no label"):
        rubric_scores(["p"], ["a"], [Prompt("7", "p")])


def test_the_rubric_needs_no_torch():
    code = "import sys, peftlab.rewards.rubric; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
