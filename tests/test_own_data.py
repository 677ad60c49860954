"""Training on the user's columns and past their bad rows: what the config says is what a run reads and records."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny

from peftlab.config import load_config, to_toml
from peftlab.errors import UserError
from peftlab.recipes import load
from peftlab.recipes.launch import dry_run, launch
from peftlab.runs.atomic import read_rows
from peftlab.runs.rundir import RunDir
from peftlab.training.arguments import TrainConfig

# Which column of the user's file each verb reads, under a name of the user's.
COLUMNS = {"sft": {"text": "review"}, "classify": {"text": "review", "label": "stars"}}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with tiny.one_thread():
        yield


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> dict[str, str]:
    """The workshop; `mine`: its reviews under other names and with three bad rows, `good`: without them."""
    folder = tmp_path_factory.mktemp("own")
    shop = tiny.workshop(folder)
    rows = [
        {"id": f"r{number}", "review": row["text"], "stars": row["label"], "text": "no"}
        for number, row in enumerate(tiny.reviews(40))
    ]
    bad = [{"review": ""}, {"stars": 1}, {"review": 7, "stars": 0}]
    shop["good"] = tiny.write_rows(folder / "good.jsonl", rows)
    shop["mine"] = tiny.write_rows(folder / "mine.jsonl", [*rows[:20], *bad, *rows[20:]])
    return shop | {"runs": str(folder / "runs")}


def pairs(shop: dict[str, str], verb: str, *more: str) -> list[str]:
    columns = [f"columns.{name}={column}" for name, column in COLUMNS[verb].items()]
    return tiny.overrides(shop, verb, *columns, "eval_data={good}".format(**shop), *more)


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
    assert skipped[0]["reason"] == "text: empty" and "missing; the row has 'stars'" in skipped[1]["reason"]
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


def test_a_run_that_skipped_may_be_resumed_and_one_that_failed_begun_again(shop):
    keys = (f"train_data={shop['mine']}", f"eval_data={shop['mine']}", "on_bad_row=skip")
    run = trained(shop, "classify", "again", *keys)
    (run / "summary.json").unlink()  # as a kill before the last line leaves it
    trained(shop, "classify", "again", *keys, resume=True)
    rows = [(row["data"], row["row"]) for row in read_rows(run / "skipped.jsonl")]
    assert rows == [(data, f"{shop['mine']}:{n}") for data in ("train", "eval") for n in (21, 22, 23)]

    with pytest.raises(UserError, match="nowhere.jsonl"):
        trained(shop, "classify", "mended", *keys, "eval_data=nowhere.jsonl")
    assert (Path(shop["runs"]) / "mended" / "skipped.jsonl").exists()
    assert trained(shop, "classify", "mended", *keys) == Path(shop["runs"]) / "mended"


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
