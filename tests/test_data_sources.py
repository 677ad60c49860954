"""A data spec becomes records: what is joined, drawn, hashed and refused."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import commands
import pytest

from peftlab.data import sources
from peftlab.data.hub import refusal
from peftlab.data.records import LabelledText, Prompt, SummaryPair, Text
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


def test_ids_are_unique_over_the_parts_of_a_spec(rows, tmp_path):
    def ids(spec):
        return [record.id for record in load_records(spec, "classify").records]

    assert ids(f"{rows}+{rows}") == [*map(str, range(5)), *(f"2:{n}" for n in range(5))]
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"id": own, "text": "a", "label": 1}) + "\n" for own in ("0", "2:0", "new")))
    assert ids(f"{rows}+{other}+{other}")[5:] == ["2:0", "2:2:0", "new", "3:0", "3:2:0", "3:new"]
    assert ids(f"imdb:train+{rows}")[20:] == [*map(str, range(5))], "nothing is taken"


def test_the_hash_of_the_reviews_is_what_it_was(monkeypatch):
    """Runs that are recorded can be resumed: nothing in how data is read changes ids or order of the reviews."""
    more = [LabelledText(f"rotten-tomatoes/{i}", f"line {i}", i % 2) for i in range(5)]
    monkeypatch.setattr(sources, "load_block", lambda name: more if name == "rotten-tomatoes" else REVIEWS)
    assert load_records("imdb:judge+rotten-tomatoes", "classify").records == REVIEWS + more
    assert load_records("imdb:train", "sft").sha256.startswith("f13054b81a72")
    assert load_records("imdb:judge+rotten-tomatoes", "classify", 12, 4).sha256.startswith("a14a6d5e8f51")


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


def test_bad_rows_are_counted_and_the_first_of_each_mistake_named(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "a"}\n' + '{"text": ""}\n' * 8 + "no json\n")
    with pytest.raises(UserError) as caught:
        load_records(str(path), "sft")
    lines = str(caught.value).splitlines()
    assert lines[0] == "9 of 10 rows are not usable:"
    assert lines[1:6] == [f"{path}:{line}: text: empty" for line in range(2, 7)]
    assert lines[6].startswith(f"{path}:10: not valid JSON") and lines[7] == f"... and 3 more rows like {path}:2"
    assert len(lines) == 9 and f"data check {path} --for sft" in lines[8]


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


def test_what_the_hub_means_is_said_in_words():
    """No class of a library's, whatever is under the error that it raised; its own words, where we know no better."""
    import datasets.exceptions
    from huggingface_hub import errors

    httpx = sys.modules[errors.HfHubHTTPError.__mro__[1].__module__.partition(".")[0]]  # or its successor
    response = httpx.Response(404, request=httpx.Request("GET", "https://example.org"))
    lost = errors.LocalEntryNotFoundError("Got: ConnectError: [Errno -2] ...")
    lost.__cause__ = errors.OfflineModeIsEnabled("offline")
    busy, full = errors.LocalEntryNotFoundError("Got: 429"), errors.LocalEntryNotFoundError("Got: OSError")
    busy.__cause__ = errors.HfHubHTTPError("429", response=httpx.Response(429, request=response.request))
    full.__cause__ = OSError(28, "No space left on device")
    plain = ValueError("Unknown split 'dev'")
    plain.__context__, plain.__suppress_context__ = ConnectionError("earlier"), True
    for error, words in (
        (lost, "HF_HUB_OFFLINE is set"),
        (errors.LocalEntryNotFoundError("Got: ConnectError"), "it cannot be reached"),
        (busy, "it has had too many requests"),
        (full, "no space is left on this disk"),
        (plain, "Unknown split 'dev'"),
        (httpx.ConnectError("[Errno -2] Name or service not known"), "it cannot be reached"),
        (httpx.ReadTimeout("timed out"), "it did not answer in time"),
        (ConnectionError("nowhere"), "it cannot be reached"),
        (errors.RepositoryNotFoundError("404", response=response), "it has none of that name, or a private one"),
        (errors.GatedRepoError("403", response=response), "its terms are to be accepted"),
        (datasets.exceptions.DatasetNotFoundError("none"), "it has none of that name"),
        (errors.HFValidationError("Repo id must ..."), "that is no name there"),
        (ValueError("Unknown split\n 'dev'; there are train, test"), "Unknown split 'dev'; there are train, test"),
        (RuntimeError(), "without a word"),
    ):
        assert refusal(error).startswith(words) and "Error" not in refusal(error)


@pytest.fixture
def hub(monkeypatch):
    """What `datasets` would give: a dict from (repository, config, split) to rows, to be filled by the test."""
    import datasets

    there: dict = {}

    def load_dataset(name, config=None, *, split):
        if (name, config, split) not in there:
            raise ValueError(f"Unknown split {split!r}.\nShould be one of {[split for *_, split in there]}.")
        return there[name, config, split]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return there


def test_rows_of_a_hub_dataset_are_checked_and_mapped(hub):
    hub["some/reviews", None, "good"] = [{"review": "good", "label": 1}]
    hub["some/reviews", None, "train"] = [{"review": "good", "label": 1}, {"review": " ", "label": 0}]
    found = load_records("some/reviews:good", "classify", columns={"text": "review"})
    assert found.records == [LabelledText("0", "good", 1)]
    with pytest.raises(UserError, match=r"1 of 2 rows.*\nsome/reviews:train: row 1: text: empty\ncolumns maps"):
        load_records("some/reviews", "classify", columns={"text": "review"})


def test_an_id_of_a_hub_dataset_is_given_once(hub):
    hub["some/reviews", None, "train"] = [{"id": "a", "text": "x"}, {"id": 7, "text": "x"}, {"id": "a", "text": "x"}]
    with pytest.raises(UserError, match="row 2: id: 'a' is also in row 0"):
        load_records("some/reviews", "sft")


def test_a_config_stands_behind_an_at_sign(hub):
    hub["abisee/cnn_dailymail", "3.0.0", "test"] = [{"article": "long", "highlights": "short"}]
    columns = {"document": "article", "summary": "highlights"}
    found = load_records("abisee/cnn_dailymail@3.0.0:test", "summarize", columns=columns)
    assert found.records == [SummaryPair("0", "long", "short")]
    with pytest.raises(UserError, match=r"test: the Hub did not give it \(Unknown split 'test'. Should be one of"):
        load_records("abisee/cnn_dailymail:test", "summarize", columns=columns)


def test_a_dataset_of_the_libraries_own_format_loads(monkeypatch, tmp_path):
    """Files that `datasets` wrote, read by `datasets`; only the Hub's answer is ours."""
    import datasets

    rows = {"dialogue": ["A: hi\nB: ho", "A: no"], "summary": ["They greet.", "A refuses."], "id": ["x", "y"]}
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    load = datasets.load_dataset
    cache = str(tmp_path / "cache")
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, config, split: load(str(tmp_path), config, split=split, cache_dir=cache)
    )
    found = load_records("knkarthick/samsum:test", "summarize", columns={"document": "dialogue"})
    assert found.records == [SummaryPair("x", "A: hi\nB: ho", "They greet."), SummaryPair("y", "A: no", "A refuses.")]
    with pytest.raises(UserError, match="Unknown split"):
        load_records("knkarthick/samsum:validation", "summarize", columns={"document": "dialogue"})


@pytest.mark.parametrize(
    ("names", "labels", "expected"),
    [
        (["neg", "pos"], None, [0, 1]),
        (["pos", "neg"], None, [1, 0]),
        (["neg", "pos"], ["pos", "neg"], [1, 0]),
        (["World", "Sport"], ["sport", "world"], [1, 0]),
        (["1 star", "5 stars"], ["bad", "good"], [0, 1]),  # the names are the user's own: classes go by number
    ],
)
def test_classes_of_a_dataset_go_by_their_names(names, labels, expected, hub):
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "kind": ClassLabel(names=names)})
    hub["some/texts", None, "train"] = Dataset.from_dict({"text": ["a", "b"], "kind": [0, 1]}, features=features)
    found = load_records("some/texts", "classify", labels=labels, columns={"label": "kind"})
    assert [record.label for record in found.records] == expected


def test_an_unlabelled_row_of_a_dataset_is_a_bad_row(hub):
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    hub["some/texts", None, "train"] = Dataset.from_dict({"text": ["a"], "label": [-1]}, features=features)
    with pytest.raises(UserError, match="row 0: label: -1 is not one of"):
        load_records("some/texts", "classify")


def test_reviews_go_by_the_names_of_their_classes():
    turned = load_records("imdb:train", "classify", labels=["Positive", "negative"]).records
    assert [row.label for row in turned] == [1 - row.label for row in REVIEWS]
    three = load_records("imdb:train", "classify", labels=["neg", "neutral", "pos"]).records
    assert [row.label for row in three] == [2 * row.label for row in REVIEWS]
    for labels in (["ham", "spam"], ["positive", "other"], ["1", "2", "3", "4", "5"]):
        with pytest.raises(UserError, match="imdb:train: has the classes negative and positive; labels has"):
            load_records("imdb:train", "classify", labels=labels)


def test_bad_rows_can_be_skipped_and_are_told(tmp_path):
    path, clean = tmp_path / "some.jsonl", tmp_path / "clean.jsonl"
    lines = ['{"id": "a", "text": "one"}', '{"text": ""}', "{", '{"id": "b", "text": "two"}']
    path.write_text("\n".join(lines))
    clean.write_text("\n".join([lines[0], lines[3]]))
    found = load_records(str(path), "sft", on_bad_row="skip")
    assert [record.text for record in found.records] == ["one", "two"]
    assert [place for place, _ in found.skipped] == [f"{path}:2", f"{path}:3"]
    assert [reason.split(":")[0] for _, reason in found.skipped] == ["text", "not valid JSON"]
    good = load_records(str(clean), "sft", on_bad_row="skip")
    assert good.sha256 == found.sha256 == load_records(str(clean), "sft").sha256 and not good.skipped
    both = load_records(f"{path}+{path}", "sft", on_bad_row="skip")
    assert len(both.records) == len(both.skipped) == 4


def test_data_without_a_usable_row_is_refused_even_where_bad_rows_are_skipped(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": ""}\n{"text": 3}\n')
    with pytest.raises(UserError, match=r"holds no usable row; .*bad.jsonl:1: text: empty"):
        load_records(str(path), "sft", on_bad_row="skip")


def test_the_command_that_lists_all_bad_rows_can_be_typed(tmp_path):
    path = tmp_path / "my rows.csv"
    path.write_text("a review,stars\n" + ",9\n" * 7)
    with pytest.raises(UserError) as caught:
        load_records(str(path), "classify", labels=["x", "y"], columns={"text": "a review", "label": "stars"})
    command = re.search("`(.*)`", str(caught.value))[1]
    outcome = commands.peftlab(command.removeprefix("peftlab "))
    assert outcome.out.endswith("7 rows, 7 bad\n") and outcome.out.count("text: empty") == 7
