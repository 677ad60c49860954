"""Preference pairs: a row's optional fields, and pairs that are built from a policy's own answers."""

from __future__ import annotations

import itertools
import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny
from commands import peftlab
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import decoders

from peftlab.data.check import check_file
from peftlab.data.records import PreferencePair, Prompt
from peftlab.errors import Interrupted, LabError, UserError
from peftlab.recipes.build_preferences import PreferenceOptions, build_preferences
from peftlab.recipes.launch import launch
from peftlab.recipes.makers import sample_texts
from peftlab.recipes.pairing import Answer, pairs_of, split
from peftlab.recipes.preview import preview
from peftlab.recipes.tools import load_sampler
from peftlab.runs.signals import StopSignals
from peftlab.sampling.sampler import Decoding, Sampler

pytestmark = pytest.mark.usefixtures("one_thread")

PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
SCORE = '''
def letters(prompts, completions, records):
    """How many letters e and o an answer has."""
    return {"e": [c.count("e") for c in completions], "o": [c.count("o") for c in completions]}


def same(prompts, completions, records):
    return [1.0] * len(completions)
'''


# Rows


@pytest.mark.parametrize(("more", "record"), [
    ({"margin": 1.5}, PreferencePair("0", "a", "b", "c", None, 1.5)),
    ({"margin": 0, "label": "pos"}, PreferencePair("0", "a", "b", "c", 1, 0.0)),
    ({"margin": None, "label": None}, PreferencePair("0", "a", "b", "c")),
    ({"margin": "", "label": ""}, PreferencePair("0", "a", "b", "c")),
    ({"margin": "0.25", "label": 0, "source": {"any": 1}}, PreferencePair("0", "a", "b", "c", 0, 0.25)),
])
def test_margin_and_label_are_optional(more, record, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(PAIR | more))
    assert check_file(path, "preferences").records == [record]


@pytest.mark.parametrize(("field", "value"), [
    ("margin", "-0.1"), ("margin", "NaN"), ("margin", "Infinity"), ("margin", "true"), ("margin", '"much"'),
    ("margin", "[1]"), ("margin", "1e999"), ("margin", "1" + "0" * 400), ("label", "2"), ("label", '"maybe"'),
])
def test_a_bad_margin_or_label_is_named(field, value, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{json.dumps(PAIR)[:-1]}, "{field}": {value}}}')
    ((line, reason),) = check_file(path, "preferences").bad
    assert line == 1 and reason.startswith(f"{field}: ")


def test_columns_map_margin_and_label(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,chosen,rejected,gap,stars\na,b,c,0.5,neg\n")
    found = check_file(path, "preferences", columns={"margin": "gap", "label": "stars"})
    assert found.records == [PreferencePair("0", "a", "b", "c", 0, 0.5)]


def test_a_preview_shows_prompt_and_both_answers(tmp_path):
    shop = tiny.workshop(tmp_path)
    found = preview(shop["preferences"], "preferences", shop["gpt2"], 2, [])
    rows = list(map(json.loads, Path(shop["preferences"]).read_text().splitlines()))
    for row, shown in zip(rows, found["rows"], strict=False):
        assert [piece["name"] for piece in shown["pieces"]] == ["prompt", "chosen", "rejected"]
        assert ["".join(piece["tokens"]).removesuffix("<eos>") for piece in shown["pieces"]] == [
            row[name] for name in ("prompt", "chosen", "rejected")
        ]
        assert [all(piece["learned"]) for piece in shown["pieces"]] == [False, True, True]


# Pairs of scored answers


def answers(*scores: float, texts: str = "") -> list[Answer]:
    words = texts or "abcdefgh"
    return [Answer(i, 100 + i, f" {words[i]}", score, {"x": score}, True) for i, score in enumerate(scores)]


def pair_up(own: list[Answer], margin: float = 0.1, most: int = 99) -> tuple[list[dict[str, Any]], dict[str, int]]:
    return pairs_of([Prompt("p", "the film", 1)], [own], margin, most, {"policy": "me"})


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=8), st.floats(0, 2), st.integers(1, 30))
def test_pairs_are_apart_ordered_and_all_accounted_for(scores, margin, most):
    rows, dropped = pair_up(answers(*scores), margin, most)
    assert len(rows) + sum(dropped.values()) == len(list(itertools.combinations(scores, 2)))
    apart = [a - b for a, b in itertools.permutations(scores, 2) if a - b >= margin and a > b]
    assert [row["margin"] for row in rows] == pytest.approx(sorted(apart, reverse=True)[:most], abs=1e-6)
    for row in rows:
        told = row["source"]["scores"]
        assert told["chosen"]["x"] > told["rejected"]["x"]
        assert {row["source"]["chosen_seed"], row["source"]["rejected_seed"]} <= set(range(100, 108))


def test_equal_scores_prefer_nothing_even_where_no_margin_is_asked_for():
    rows, dropped = pair_up(answers(1.0, 1.0, 2.0), margin=0)
    assert len(rows) == 2 and dropped["near ties"] == 1


def test_answers_alike_count_once_and_bad_ones_not_at_all():
    rows, dropped = pair_up(answers(1.0, 1.0, 2.0, texts="aab"))
    assert [(row["chosen"], row["rejected"]) for row in rows] == [(" b", " a")]
    assert rows[0]["id"] == "p:2-0" and dropped["same answer"] == 2
    rows, dropped = pair_up(answers(1.0, 2.0, 3.0, texts="a \x07"))
    assert rows == [] and dropped["unusable"] == 3


def test_a_pair_that_another_prompt_gave_is_dropped():
    prompts = [Prompt("p", "the film"), Prompt("q", "the film"), Prompt("r", "a film")]
    rows, dropped = pairs_of(prompts, [answers(1.0, 2.0)] * 3, 0.1, 9, {})
    assert [row["id"] for row in rows] == ["p:1-0", "r:1-0"] and dropped["duplicates"] == 1
    assert "label" not in rows[0]


@given(st.lists(st.sampled_from([f"prompt {i}" for i in range(12)]), min_size=30, max_size=40), st.integers(1, 5))
def test_no_prompt_sits_on_both_sides(prompts, held_out):
    assume(held_out < len(set(prompts)))
    rows = [{"id": str(i), "prompt": prompt} for i, prompt in enumerate(prompts)]
    sides = split(rows, held_out)
    train, test = ({row["prompt"] for row in sides[side]} for side in ("train", "test"))
    assert not train & test and len(test) == held_out and train | test == set(prompts)
    assert sorted(map(str, sides["train"] + sides["test"])) == sorted(map(str, rows))
    again = split(random.Random(0).sample(rows, len(rows)), held_out)
    assert {row["prompt"] for row in again["test"]} == test


def test_a_prompts_side_of_a_share_follows_from_its_text_alone():
    rows = [{"prompt": f"prompt {i}"} for i in range(400)]
    few = [row["prompt"] for row in split(rows[:150], 0.25)["test"]]
    many = [row["prompt"] for row in split(rows, 0.25)["test"]]
    assert [p for p in many if p in {row["prompt"] for row in rows[:150]}] == few
    assert 0.15 < len(many) / 400 < 0.35


@pytest.mark.parametrize(("rows", "held_out", "message"), [
    ([{"prompt": "a"}], 1, "none to train on"), ([{"prompt": "a"}], 0.5, "none falls to"),
])
def test_a_split_that_leaves_nothing_says_so(rows, held_out, message):
    with pytest.raises(LabError, match=message):
        split(rows, held_out)


# Real answers


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("preferences")
    shop = tiny.workshop(root) | {"root": str(root)}
    rows = [{"id": f"q{i}", "prompt": row["text"], "label": row["label"]} for i, row in enumerate(tiny.reviews(16))]
    shop["asked"] = tiny.write_rows(root / "asked.jsonl", rows)
    shop["backwards"] = tiny.write_rows(root / "backwards.jsonl", rows[::-1][:9])
    (root / "my_scores.py").write_text(SCORE)
    launch("classify", None, tiny.overrides(shop, "classify"), root, "praise")
    model, words = tiny.causal()
    words.backend_tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)  # words with spaces between them
    for part in (model, words):
        part.save_pretrained(root / "words")
    return shop | {"policy": str(root / "words")}


@pytest.fixture(autouse=True)
def at_home(shop, monkeypatch) -> None:
    """A user's functions are looked up in the working directory."""
    monkeypatch.chdir(shop["root"])


def built(shop: dict[str, str], output: Path, **changes: Any) -> dict[str, Any]:
    given = {"prompts": shop["asked"], "scorer": "my_scores:letters", "k": 3, "max_new_tokens": 8, "batch_size": 16,
             "held_out": 4, "min_margin": 1, "device": "cpu"}
    return build_preferences(PreferenceOptions(shop["policy"], output=output, **(given | changes)))


def rows_in(*files: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_the_rows_are_pairs_that_pass_the_check(shop, tmp_path):
    summary = built(shop, tmp_path)
    files = [tmp_path / f"preferences-{side}.jsonl" for side in ("train", "test")]
    rows = rows_in(*files)
    assert all(not check_file(file, "preferences").bad for file in files)
    assert len(rows) == sum(split["rows"] for split in summary["splits"].values()) > 10
    assert len(rows) + sum(summary["dropped"].values()) == summary["possible pairs"] == 16 * 3
    asked = {row["id"]: row for row in rows_in(Path(shop["asked"]))}
    for row in rows:
        origin = asked[row["id"].split(":")[0]]
        assert (row["prompt"], row["label"]) == (origin["prompt"], origin["label"])
    assert json.loads((tmp_path / "preferences.json").read_text()) == summary
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "preferences-test.jsonl", "preferences-train.jsonl", "preferences.json", "preferences.md",
    ]


def test_the_scores_in_a_row_are_those_of_its_texts_and_give_its_order(shop, tmp_path):
    built(shop, tmp_path)
    for row in rows_in(tmp_path / "preferences-train.jsonl"):
        scores = row["source"]["scores"]
        for side in ("chosen", "rejected"):
            assert scores[side] == {"e": row[side].count("e"), "o": row[side].count("o")}
        gap = sum(scores["chosen"].values()) - sum(scores["rejected"].values())
        assert gap == row["margin"] >= 1


def test_the_seeds_in_a_row_give_its_answers_again(shop, tmp_path):
    built(shop, tmp_path)
    sampler = load_sampler(shop["policy"], "cpu")
    for row in rows_in(tmp_path / "preferences-train.jsonl")[:4]:
        ids = sampler.tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        for side in ("chosen", "rejected"):
            sampled = sampler.sample([ids], [row["source"][f"{side}_seed"]], Decoding(8))
            assert sampler.texts(sampled) == [row[side]]


def test_a_row_tells_of_each_answer_whether_eos_ended_it(shop, tmp_path):
    built(shop, tmp_path)
    sampler, seen = load_sampler(shop["policy"], "cpu"), set()
    for row in rows_in(tmp_path / "preferences-train.jsonl"):
        ids = sampler.tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        for side in ("chosen", "rejected"):
            sampled = sampler.sample([ids], [row["source"][f"{side}_seed"]], Decoding(8))
            assert row["source"][f"{side}_ended"] is bool(sampled.ended[0])
            seen.add(bool(sampled.ended[0]))
    assert seen == {True, False}


def test_a_rewards_line_scores_with_every_part(shop, tmp_path):
    line = f"{shop['root']}/praise + 0.5*my_scores:same + -0.25*rubric:length"
    built(shop, tmp_path / "line.jsonl", scorer=line, min_margin=1e-6)
    for row in rows_in(tmp_path / "line.jsonl"):
        chosen, rejected = (row["source"]["scores"][side] for side in ("chosen", "rejected"))
        assert chosen.keys() == {"praise", "same", "length"} and chosen["same"] == 1
        gap = chosen["praise"] - rejected["praise"] - 0.25 * (chosen["length"] - rejected["length"])
        assert gap == pytest.approx(row["margin"], abs=1e-5)


def test_batches_other_prompts_and_their_order_do_not_matter(shop, tmp_path):
    built(shop, tmp_path / "a", prompt_tokens=(2, 5))
    built(shop, tmp_path / "b", prompt_tokens=(2, 5), batch_size=5, prompts=shop["backwards"], held_out=0)
    whole = {row["id"]: row for row in rows_in(*(tmp_path / "a").glob("*.jsonl"))}
    part = rows_in(tmp_path / "b" / "preferences-train.jsonl")
    assert len(part) > 5 and all(whole[row["id"]] == row for row in part)
    built(shop, tmp_path / "c", prompt_tokens=(2, 5), seed=1)
    assert not {row["chosen"] for row in part} & {row["chosen"] for row in rows_in(*(tmp_path / "c").glob("*.jsonl"))}


def test_the_rubric_keeps_every_part(shop, tmp_path):
    from peftlab.rewards.rubric import RUBRIC

    built(shop, tmp_path / "mean.jsonl", scorer="rubric", min_margin=0.01)
    for row in rows_in(tmp_path / "mean.jsonl"):
        chosen, rejected = (row["source"]["scores"][side] for side in ("chosen", "rejected"))
        assert chosen.keys() == rejected.keys() == RUBRIC.keys()
        means = [sum(parts.values()) / len(RUBRIC) for parts in (chosen, rejected)]
        assert means[0] - means[1] == pytest.approx(row["margin"], abs=1e-5)
    assert {p.name for p in tmp_path.iterdir()} == {"mean.jsonl", "mean-test.jsonl", "mean.json", "mean.md"}
    built(shop, tmp_path / "own.jsonl", scorer="rubric", min_margin=0.01, weights=(("length", 2.0), ("ended", 0.5)))
    for row in rows_in(tmp_path / "own.jsonl"):
        chosen, rejected = (row["source"]["scores"][side] for side in ("chosen", "rejected"))
        gap = 2 * (chosen["length"] - rejected["length"]) + 0.5 * (chosen["ended"] - rejected["ended"])
        assert gap == pytest.approx(row["margin"], abs=1e-5)


def test_a_classifier_prefers_what_is_wanted(shop, tmp_path):
    """Of each label's own sentiment; the other sentiment turns every pair round."""
    scorer = f"{shop['root']}/praise"
    kept = {"scorer": scorer, "min_margin": 1e-6, "pairs_per_prompt": 9, "held_out": 0}
    sides = {want: tmp_path / want for want in ("positive", "negative", "label")}
    for want, folder in sides.items():
        built(shop, folder, want=want, **kept)
    found = {want: {frozenset((r["chosen"], r["rejected"])): r for r in rows_in(folder / "preferences-train.jsonl")}
             for want, folder in sides.items()}
    assert found["positive"].keys() == found["negative"].keys() == found["label"].keys() and found["label"]
    for pair, row in found["label"].items():
        same, other = ("positive", "negative") if row["label"] else ("negative", "positive")
        assert row["chosen"] == found[same][pair]["chosen"] == found[other][pair]["rejected"]
        assert row["source"]["scores"]["chosen"].keys() == {"praise"}


def test_the_card_names_the_command_that_builds_the_same(shop, tmp_path):
    summary = built(shop, tmp_path / "a")
    line = summary["command"].removeprefix("peftlab ")
    assert summary["command"] in (tmp_path / "a" / "preferences.md").read_text()
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").glob("*.jsonl")}
    outcome = peftlab(f"{line} --device cpu")
    assert outcome.code == 0, outcome
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").glob("*.jsonl")} == before
    assert "of 48 possible pairs were kept" in outcome.out


@pytest.mark.parametrize(("line", "words"), [
    ("--k 1", ["--k 1", "2 or more"]),
    ("--temperature 0", ["--temperature"]),
    ("--held-out 1.5", ["--held-out 1.5", "whole number"]),
    ("--min-margin -1", ["--min-margin"]),
    ("--want happy", ["--want happy", "label"]),
    ("--weight tone=1", ["--weight tone", "evidence"]),
    ("--weight label", ["--weight label", "PART=NUMBER"]),
    ("--scorer my_scores:letters --weight label=1", ["--weight", "rubric"]),
    ("--scorer nowhere:f", ["nowhere"]),
    ("--scorer {gpt2}", ["not a classifier"]),
    ("--scorer {root}/praise+rubric:label", ["rubric:label", "has no label"]),
    ("--scorer {root}/praise+rubric:length --want label", ["--want label", "one classifier"]),
    ("--scorer 'p({root}/praise)' --want label", ["--want label", "without weight or p()"]),
    ("--scorer 2*", ["is no part"]),
    ("--prompt-tokens 3", ["--prompt-tokens 3", "LOW,HIGH"]),
    ("--prompt-tokens 5,2", ["--prompt-tokens"]),
    ("--prompt-tokens 2,90 --scorer my_scores:letters --max-new-tokens 8", ["--prompt-tokens", "56"]),
    ("--max-new-tokens 64 --scorer my_scores:letters", ["--max-new-tokens 64"]),
    ("--limit 0", ["--limit 0"]),
    ("--dtype int8", ["--dtype"]),
    ("", ["has no label", "--weight"]),
    ("--policy {root}/praise --scorer my_scores:letters", ["classifier"]),
])
def test_a_wrong_command_is_one_message(shop, line, words):
    before = sorted(Path(shop["root"]).iterdir())
    line = f"data preferences --policy {{policy}} --prompts {{prompts}} --output out --device cpu {line}"
    outcome = peftlab(line, **shop)
    assert outcome.code == 2 and outcome.err.startswith("peftlab: ") and "Traceback" not in outcome.err, outcome
    assert all(word in outcome.err for word in words), outcome.err
    assert [p for p in sorted(Path(shop["root"]).iterdir()) if p.name != "__pycache__"] == [
        p for p in before if p.name != "__pycache__"
    ]


def test_scores_that_tell_nothing_apart_leave_no_pair(shop, tmp_path):
    with pytest.raises(LabError, match=r"no pair is left \(.*near ties"):
        built(shop, tmp_path / "none", scorer="my_scores:same")
    assert not (tmp_path / "none").exists()


def test_an_output_that_is_a_file_is_refused_before_a_model_loads(shop, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="is a file"):
        built(shop, tmp_path / "taken")


@pytest.mark.parametrize(
    ("output", "pairs", "journal"),
    [
        ("folder", "preferences-train.jsonl", "preferences-train.labels.jsonl"),
        ("folder", "preferences-test.jsonl", "preferences-test.labels.jsonl"),
        ("folder", "preferences-train.jsonl", "anna.labels.jsonl"),
        ("folder/mine.jsonl", "mine.jsonl", "mine.labels.jsonl"),
        ("folder/mine.jsonl", "mine-test.jsonl", "mine-test.labels.jsonl"),
    ],
)
def test_pairs_that_a_person_has_labelled_are_not_overwritten(shop, tmp_path, monkeypatch, output, pairs, journal):
    """Before a model loads. An empty journal, of a person who looked and left, holds no labels."""
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    row = {"id": "a", "prompt": "a film", "chosen": "good", "rejected": "bad"}
    tiny.write_rows(Path("folder") / pairs, [row])
    line = f"data preferences --policy missing --prompts {{asked}} --weight length=1 --output {output}"
    (Path("folder") / journal).touch()
    assert "missing" in peftlab(line, **shop).err
    (Path("folder") / journal).write_text('{"choice": "chosen"}\n')
    outcome = peftlab(line, **shop)
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert f"--output {output}: folder/{journal} holds a person's labels" in outcome.err
    assert "give another --output" in outcome.err
    (Path("folder") / pairs).unlink()
    assert "missing" in peftlab(line, **shop).err, "nothing there to overwrite"


def test_labels_of_other_pairs_beside_a_file_of_pairs_are_no_hindrance(shop, tmp_path):
    output = tmp_path / "mine.jsonl"
    output.touch()
    (tmp_path / "other.labels.jsonl").write_text('{"choice": "chosen"}\n')
    assert built(shop, output)["splits"]


def test_a_stop_while_answers_are_sampled_is_obeyed_at_the_next_batch(monkeypatch):
    model, words = tiny.causal()
    sampler, sample, batches = Sampler(model, words), Sampler.sample, []

    def signalled(self, *given):
        batches.append(given)
        signal.raise_signal(signal.SIGINT)
        return sample(self, *given)

    monkeypatch.setattr(Sampler, "sample", signalled)
    with pytest.raises(Interrupted), StopSignals():
        sample_texts(sampler, [[3, 4]] * 6, list(range(6)), Decoding(4), batch_size=2)
    assert len(batches) == 1
