"""A data spec becomes records: what is joined, drawn, hashed and refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peftlab.data import sources
from peftlab.data.records import LabelledText, Prompt, Text
from peftlab.data.sources import load_records
from peftlab.errors import UserError

REVIEWS = [LabelledText(f"imdb/{i}", f"review {i}", i % 2) for i in range(20)]


@pytest.fixture(autouse=True)
def blocks(monkeypatch):
    """Every block holds the same 20 reviews."""
    monkeypatch.setattr(sources, "load_block", lambda name: REVIEWS)


@pytest.fixture
def rows(tmp_path):
    """A file of five texts."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {i}", "label": i % 2}) + "\n" for i in range(5)))
    return str(path)


def test_reviews_serve_three_kinds_of_job():
    assert load_records("imdb:train", "classify").records == REVIEWS
    assert load_records("imdb:test", "sft").records[3] == Text("imdb/3", "review 3")
    assert load_records("rotten-tomatoes", "prompts").records[3] == Prompt("imdb/3", "review 3", 1)
    with pytest.raises(UserError, match="do not serve preferences"):
        load_records("imdb:train", "preferences")


def test_parts_are_joined_in_order(rows):
    joined = load_records(f"imdb:judge + {rows}", "classify").records
    assert joined[:20] == REVIEWS
    assert [r.text for r in joined[20:]] == [f"text {i}" for i in range(5)]


def test_a_plus_in_a_files_name_is_no_join(tmp_path):
    (tmp_path / "a+b.jsonl").write_text('{"text": "a"}')
    assert load_records(str(tmp_path / "a+b.jsonl"), "sft").records == [Text("0", "a")]


def test_a_limit_draws_by_seed():
    drawn = load_records("imdb:train", "classify", limit=8, seed=1)
    assert len({r.id for r in drawn.records}) == 8 and set(drawn.records) <= set(REVIEWS)
    assert drawn == load_records("imdb:train", "classify", limit=8, seed=1)
    other = load_records("imdb:train", "classify", limit=8, seed=2)
    assert other.records != drawn.records and other.sha256 != drawn.sha256
    assert load_records("imdb:train", "classify", limit=100).records == REVIEWS
    with pytest.raises(UserError, match="a limit of 0 leaves no rows"):
        load_records("imdb:train", "classify", limit=0)


def test_the_hash_is_of_the_content(rows, tmp_path):
    before = load_records(rows, "classify").sha256
    lines = Path(rows).read_text().splitlines()
    reformatted = tmp_path / "again.jsonl"
    reformatted.write_text("\r\n".join(json.dumps(json.loads(line), sort_keys=True) for line in lines))
    assert load_records(str(reformatted), "classify").sha256 == before
    reformatted.write_text("\n".join(lines).replace("text 3", "text three"))
    assert load_records(str(reformatted), "classify").sha256 != before


def test_bad_rows_are_counted_and_the_first_named(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "a"}\n' + '{"text": ""}\n' * 8)
    with pytest.raises(UserError) as caught:
        load_records(str(path), "sft")
    lines = str(caught.value).splitlines()
    assert lines[0] == "8 of 9 rows are not usable:" and lines[1] == f"{path}:2: text: empty"
    assert len(lines) == 7 and "3 more" in lines[-1] and f"data check {path} --for sft" in lines[-1]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("imdb", "imdb has the splits train, prompts, judge, test"),
        ("imdb:all", "imdb has the splits"),
        ("imbd:train", "no such data; give imdb:SPLIT"),
        ("rotten-tomatoes:test", "no such data"),
        ("", "no such data"),
        ("imdb:train+", "no such data"),
        ("none.csv", "none.csv: no such file"),
    ],
)
def test_unknown_names_say_what_there_is(spec, message):
    with pytest.raises(UserError, match=message):
        load_records(spec, "classify")


def test_empty_data_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n \n")
    with pytest.raises(UserError, match="holds no rows"):
        load_records(str(tmp_path / "a.jsonl"), "sft")


def test_an_unreachable_hub_names_what_loads_offline():
    with pytest.raises(UserError, match=r"some/reviews:test: the Hub did not give it.*imdb:train.*\.jsonl"):
        load_records("some/reviews:test", "classify")


def test_rows_of_a_hub_dataset_are_checked_and_mapped(monkeypatch):
    import datasets

    rows = [{"review": "good", "label": 1}, {"review": " ", "label": 0}]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows[: 1 if split == "good" else 2])
    found = load_records("some/reviews:good", "classify", columns={"text": "review"})
    assert found.records == [LabelledText("0", "good", 1)]
    with pytest.raises(UserError, match="some/reviews:train: row 1: text: empty"):
        load_records("some/reviews", "classify", columns={"text": "review"})
