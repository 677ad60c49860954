"""Training on the user's columns and past their bad rows: what the config says is what a run reads and records."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
import tiny

from peftlab.config import load_config, to_toml
from peftlab.data.overlap import leaked
from peftlab.data.records import KINDS, Record, parse_row
from peftlab.data.sources import load_records
from peftlab.errors import UserError
from peftlab.recipes import load
from peftlab.recipes.common import load_rows
from peftlab.recipes.launch import dry_run, launch
from peftlab.runs.atomic import read_rows
from peftlab.runs.rundir import RunDir
from peftlab.training.arguments import TrainConfig

# Which column of the user's file each verb reads, under a name of the user's.
COLUMNS = {"sft": {"text": "review"}, "classify": {"text": "review", "label": "stars"}}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> dict[str, str]:
    """The workshop; `mine`: its reviews under other names and with three bad rows, `good`: without them.

    What is trained on is evaluated on under another name, with `_test`.
    """
    folder = tmp_path_factory.mktemp("own")
    shop = tiny.workshop(folder)
    rows = [
        {"id": f"r{number}", "review": row["text"], "stars": row["label"], "text": "no"}
        for number, row in enumerate(tiny.reviews(40))
    ]
    bad = [{"review": ""}, {"stars": 1}, {"review": 7, "stars": 0}]
    for end in ("", "_test"):
        shop["good" + end] = tiny.write_rows(folder / f"good{end}.jsonl", rows)
        shop["mine" + end] = tiny.write_rows(folder / f"mine{end}.jsonl", [*rows[:20], *bad, *rows[20:]])
    return shop | {"runs": str(folder / "runs")}


def pairs(shop: dict[str, str], verb: str, *more: str) -> list[str]:
    columns = [f"columns.{name}={column}" for name, column in COLUMNS[verb].items()]
    return tiny.overrides(shop, verb, *columns, "eval_data={good_test}".format(**shop), *more)


def trained(shop: dict[str, str], verb: str, name: str, *more: str, resume: bool = False) -> Path:
    launch(verb, None, pairs(shop, verb, *more), Path(shop["runs"]), name, resume)
    return Path(shop["runs"]) / name


@pytest.mark.parametrize("verb", COLUMNS)
def test_past_bad_rows_a_run_is_the_run_without_them(verb, shop, capsys):
    clean = trained(shop, verb, f"{verb}-clean", f"train_data={shop['good']}")
    past = trained(shop, verb, f"{verb}-past", f"train_data={shop['mine']}", "on_bad_row=skip")
    weights = [(run / "adapter" / "adapter_model.safetensors").read_bytes() for run in (clean, past)]
    assert weights[0] == weights[1]
    hashes = [json.loads((run / "environment.json").read_text())["data"] for run in (clean, past)]
    assert hashes[0][shop["good"]] == hashes[1][shop["mine"]]

    skipped = list(read_rows(past / "skipped.jsonl"))
    assert [(row["data"], row["row"]) for row in skipped] == [("train", f"{shop['mine']}:{n}") for n in (21, 22, 23)]
    assert skipped[0]["reason"] == "text: empty" and "no column 'review'; it has 'stars'" in skipped[1]["reason"]
    [event] = [row for row in read_rows(past / "events.jsonl") if row["kind"] == "rows_skipped"]
    assert (event["data"], event["rows"]) == ("train", 3)
    assert f"{shop['mine']}: 3 bad rows skipped" in capsys.readouterr().err
    assert not (clean / "skipped.jsonl").exists()


@pytest.mark.parametrize("verb", COLUMNS)
def test_without_skip_a_bad_row_stops_run_and_dry_run(verb, shop):
    with pytest.raises(UserError, match="3 of 43 rows are not usable") as caught:
        dry_run(verb, None, pairs(shop, verb, f"train_data={shop['mine']}"))
    assert "on_bad_row=skip" in str(caught.value) and "--columns text=review" in str(caught.value)
    with pytest.raises(UserError, match="3 of 43 rows are not usable"):
        trained(shop, verb, f"{verb}-stopped", f"train_data={shop['mine']}")
    sizes = dry_run(verb, None, pairs(shop, verb, f"train_data={shop['mine']}", "on_bad_row=skip"))
    assert sizes["rows"] > 0


def test_rows_of_a_job_that_has_no_key_for_bad_ones_are_refused_without_it(shop, tmp_path):
    bad = tiny.write_rows(tmp_path / "bad.jsonl", [{"prompt": "The film"}, {"prompt": ""}])
    with pytest.raises(UserError, match="1 of 2 rows are not usable") as caught:
        dry_run("ppo", None, tiny.overrides(shop, "ppo", f"train_data={bad}", "task=custom", "reward=rubric:length"))
    assert str(caught.value).endswith(" lists them all")


def test_a_run_that_skipped_may_be_resumed_and_one_that_failed_begun_again(shop):
    keys = (f"train_data={shop['mine']}", f"eval_data={shop['mine_test']}", "on_bad_row=skip")
    run = trained(shop, "classify", "again", *keys)
    (run / "summary.json").unlink()  # as a kill before the last line leaves it
    trained(shop, "classify", "again", *keys, resume=True)
    rows = [(row["data"], row["row"]) for row in read_rows(run / "skipped.jsonl")]
    files = {"train": shop["mine"], "eval": shop["mine_test"]}
    assert rows == [(data, f"{file}:{n}") for data, file in files.items() for n in (21, 22, 23)]

    with pytest.raises(UserError, match="nowhere.jsonl"):
        trained(shop, "classify", "mended", *keys, "eval_data=nowhere.jsonl")
    assert (Path(shop["runs"]) / "mended" / "skipped.jsonl").exists()
    assert trained(shop, "classify", "mended", *keys) == Path(shop["runs"]) / "mended"


# Verbs whose training data may be their evaluation data too, the kind they read, and the workshop's rows for it.
ONE_FILE = {"pretrain": ("sft", "texts"), "sft": ("sft", "texts"), "classify": ("classify", "labelled"),
            "summarize": ("summarize", "summaries")}


@pytest.mark.parametrize("verb", ONE_FILE)
def test_of_one_file_evaluation_takes_the_rows_that_training_left(verb, shop):
    kind, name = ONE_FILE[verb]
    file, runs = shop[name], Path(shop["runs"])
    keys = tiny.overrides(shop, verb, f"train_data={file}", f"eval_data={file}", "max_steps=1")
    with pytest.raises(UserError, match="eval_data .*training takes all .*another eval_data, or a train_limit below"):
        launch(verb, None, [*keys, "eval_limit=9"], runs, f"{verb}-all")
    # As many rows for both, so that nothing but the rows tells the two apart.
    launch(verb, None, [*keys, "train_limit=12", "eval_limit=12"], runs, f"{verb}-shared")
    told = json.loads((runs / f"{verb}-shared" / "environment.json").read_text())["data"]
    assert [entry["rows"] for entry in told.values()] == [12, 12]
    config = load_config(load(verb).CONFIG, None, [*keys, "train_limit=12", "eval_limit=12"])
    train, held_out = (load_rows(config, which, kind) for which in ("train", "eval"))
    assert {entry["sha256"] for entry in told.values()} == {train.sha256, held_out.sha256}
    assert not {record.id for record in train.records} & {record.id for record in held_out.records}
    assert train.records == load_records(file, kind, 12, config.seed).records, "training draws as it does alone"


def test_what_is_left_is_all_the_rest_and_its_hash_is_of_it(shop, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keys = ["columns.text=review", "columns.label=stars", "on_bad_row=skip", "train_limit=25", "seed=3"]
    keys += [f"{which}_data={shop['mine']}" for which in ("train", "eval")]
    config = load_config(load("classify").CONFIG, None, keys)
    train, held_out = (load_rows(config, which, "classify") for which in ("train", "eval"))
    whole = load_records(shop["good"], "classify", columns=config.columns).records
    assert held_out.records == [record for record in whole if record not in train.records]
    assert (len(train.records), len(held_out.records)) == (25, 15)
    rows = [{"id": r.id, "text": r.text, "label": r.label} for r in held_out.records]
    assert load_records(tiny.write_rows(tmp_path / "rest.jsonl", rows), "classify").sha256 == held_out.sha256
    assert load_rows(config, "eval", "classify") == held_out
    # The same file by another path is the same file; the same rows in another file are not.
    (tmp_path / "linked.jsonl").symlink_to(shop["mine"])
    assert load_rows(config.with_(eval_data="./linked.jsonl"), "eval", "classify").records == held_out.records
    assert len(load_rows(config.with_(eval_data=shop["mine_test"]), "eval", "classify").records) == 40


def test_the_example_on_the_page_about_data_holds_rows_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parent.parent / "docs/data.md").read_text(encoding="utf-8")
    Path("mine.toml").write_text(re.search(r"`mine.toml`.*?```toml\n(.*?)```", page, re.S)[1])
    config = load_config(load("classify").CONFIG, "mine.toml")
    lines = [f"review {number},{number % 5 + 1}" for number in range(config.train_limit + 30)]
    Path("stars.csv").write_text("\n".join(["review,stars", *lines, "bad,0"]))
    train, held_out = (load_rows(config, which, "classify", config.labels) for which in ("train", "eval"))
    assert (len(train.records), len(held_out.records)) == (config.train_limit, 30)
    assert not {record.id for record in train.records} & {record.id for record in held_out.records}


def test_skipped_rows_are_kept_by_the_data_they_are_of(tmp_path):
    run = RunDir.create(tmp_path, "run", "sft", "")
    with run.session():
        run.record_skipped("train", [("a:1", "x"), ("a:2", "y")])
        run.record_skipped("eval", [("b:1", "z")])
        run.record_skipped("train", [("a:1", "x")])
        run.finish({}, {})
    rows = [tuple(row.values()) for row in read_rows(tmp_path / "run" / "skipped.jsonl")]
    assert rows == [("eval", "b:1", "z"), ("train", "a:1", "x")]


def test_a_mapping_outlives_its_toml(tmp_path):
    config = load_config(load("classify").CONFIG, None, ['columns={ text = "the \\"review\\"", label = "stars" }'])
    assert config.columns == {"text": 'the "review"', "label": "stars"}
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert tomllib.loads(to_toml(config))["columns"] == config.columns
    assert load_config(load("classify").CONFIG, str(tmp_path / "config.toml")) == config


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        ("columns.txet=review", ["columns", "'txet' is no field", "did you mean text"]),
        ("columns=review", ["columns", "dictionary"]),
        ("columns.text=3", ["columns.text", "string"]),
        ("on_bad_row=ignore", ["on_bad_row", "'stop' or 'skip'"]),
    ],
)
def test_wrong_keys_are_named(pair, words):
    with pytest.raises(UserError) as caught:
        load_config(TrainConfig, None, [pair])
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("kind", KINDS)
def test_a_held_out_row_that_is_trained_on_is_found_under_another_id(kind):
    def row(number: int, **more: object) -> dict[str, object]:
        texts = ("text", "prompt", "completion", "document", "summary", "chosen", "rejected")
        return {"label": number % 2} | {name: f"{name} {number}" for name in texts} | more

    def records(*rows: dict[str, object]) -> list[Record]:
        return [parse_row(kind, each, number) for number, each in enumerate(rows)]

    train, same = records(*map(row, range(8))), 3
    held_out = records(*map(row, range(8, 12)), row(same, id="other", label=0, margin=2.0))
    assert [record.id for record in leaked(train, held_out)] == ["other"]
    assert leaked(train, train) == train and leaked([], held_out) == []


@pytest.mark.parametrize("verb", COLUMNS)
def test_a_dry_run_refuses_held_out_rows_that_training_leaves_none_of(verb, shop):
    given = pairs(shop, verb, f"train_data={shop['good']}", f"eval_data={shop['good']}")
    with pytest.raises(UserError, match="training takes all of its 40 rows"):
        dry_run(verb, None, given)
    assert dry_run(verb, None, [*given, "train_limit=30"])["rows"]
