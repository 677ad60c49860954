"""The command line's contracts: what is instant, what is listed, what JSON holds, what a row of output answers."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from unittest import mock

import fake_runs
import pytest
import tiny
import typer
from commands import peftlab
from hypothesis import given
from hypothesis import strategies as st

from peftlab import cli
from peftlab.cli.runs import runs_list
from peftlab.cli.shared import print_rows
from peftlab.config import Config, keys, load_config, shipped_configs, to_toml
from peftlab.data.sources import RecordSet
from peftlab.errors import Interrupted, LabError, UserError
from peftlab.models.catalog import CONVERTED, known_names
from peftlab.models.classifier import TextClassifier
from peftlab.recipes import RECIPES, common, load
from peftlab.recipes.declared import declared, declared_keys
from peftlab.runs.progress import folded, folded_text, say
from peftlab.runs.rundir import RunDir

ROOT = Path(__file__).resolve().parent.parent
GROUP = typer.main.get_command(cli.app)
VERBS = [*GROUP.commands, "data check"]
HEAVY = {"torch", "transformers", "datasets", "peft", "pandas", "pyarrow"}


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> dict[str, str]:
    return tiny.workshop(tmp_path_factory.mktemp("cli"))


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def told(line: str, **names: str) -> str:
    """What a command that does its job prints."""
    outcome = peftlab(line, **names)
    assert outcome.code == 0, outcome
    return outcome.out


def test_help_names_every_verb_and_every_verb_has_help():
    everything = told("--help")
    for verb in GROUP.commands:
        assert f" {verb} " in everything
    assert set(RECIPES) <= set(GROUP.commands)
    for verb in VERBS:
        text = " ".join(told(f"{verb} --help").split())
        assert f"peftlab {verb} " in text and "--help" in text
        assert verb not in RECIPES or all(f" {name} " in text for name in ("--run", "--resume", "--dry-run", "--json"))


def loaded(line: str) -> list[str]:
    """What a command says on standard error, and in a last line its exit code and the heavy libraries it imported."""
    code = (
        "import sys; from peftlab import cli\n"
        f"sys.argv = {['peftlab', *line.split()]}\n"
        "try: cli.main()\nexcept SystemExit as end: code = end.code\n"
        f"print(code, *sorted({HEAVY} & set(sys.modules)), file=sys.stderr)"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr.splitlines()


@pytest.mark.parametrize(
    "line", ["--help", "--version", "sft --help", "configs", "data check rows.jsonl --for classify", "runs", "models"]
)
def test_what_needs_no_model_loads_no_library(line, place):
    tiny.write_rows(place / "rows.jsonl", tiny.reviews(4))
    assert loaded(line) == ["0"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("sfft sft-tiny", "No such command 'sfft'"),
        ("sft sft-tyni", "did you mean sft-tiny?"),
        ("ppo sft-tiny", "this config is for `peftlab sft`"),
        ("sft sft-tiny setps=3", "sft-tiny: unknown key setps; did you mean"),
        ("ppo lora.rank=3 --dry-run", "the command line: unknown key lora.rank; did you mean lora.r?"),
        ("dpo zzz.x=1 qqq=2", "unknown key zzz; known keys: recipe, task, model"),
        ("dpo zzz.x=1 qqq=2", "; unknown key qqq"),
        ("sft sft-tiny lr=abc", "sft-tiny: lr: is to be a number, not 'abc'"),
        ("ppo ppo-tiny want=foo", "ppo-tiny: want: input should be '', 'positive' or 'negative', not 'foo'"),
        ("reward lora.r=0 --dry-run", "the command line: lora.r: input should be greater than or equal to 1, not 0"),
        ("ppo ppo-tiny --steps 3", "no option --steps; a key of the config is given without dashes: steps=3"),
        ("sft sft-tiny --steps 3", "no option --steps; a key of the config is given without dashes: max_steps=3"),
        ("sft --train-limit=3 --dry-run", "is given without dashes: train_limit=3"),
        ("sft --lora 4", "a table of the config, whose keys are given as in lora.r=VALUE"),
        ("sft --smok", "no option --smok; `peftlab sft --help` lists the options"),
        ("sft sft-tiny --run a --lora.r lr=1", "is given without dashes: lora.r=VALUE"),
        ("sft sft-tiny --resum", "no option --resum; did you mean --resume?"),
        ("sft sft-tiny -x", "no option -x; `peftlab sft --help` lists the options"),
        ("sft sft-tiny model=tiny-gtp2", "model tiny-gtp2: no such model, run or folder; did you mean tiny-gpt2?"),
        ("ppo ppo-explanations", "run `peftlab sft smollm2-explanations` first"),
        ("rloo judge=imdb-juge --dry-run", "did you mean imdb-judge?"),
        ("sft sft-tiny train_data=mine.jsonl", "mine.jsonl: no such file"),
        ("classify eval_data=imdb:train+imdb:tets", "data imdb:tets: imdb has the splits train, prompts, judge, test"),
        ("dpo prompts=mine", "preferences/preferences-train.jsonl: no such file"),
        ("reward ood_data=mine train_data=imdb:train eval_data=imdb:test", "data mine: no such data; give imdb:SPLIT"),
    ],
)
def test_a_typo_is_told_before_any_library_loads(line, message):
    *told, end = loaded(line)
    assert message in " ".join(told) and end == "2"


@pytest.mark.parametrize("verb", RECIPES)
def test_the_keys_read_off_the_source_are_those_of_the_config(verb):
    known = keys(load(verb).CONFIG)
    assert sorted(declared_keys(verb)) == sorted(known)


def types_of(cls: type[Config], prefix: str = "") -> dict[str, object]:
    """A key's type, bounds and default; a table's defaults are those of its use, which need its class."""
    found = {}
    for name, field in cls.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Config):
            found |= types_of(field.annotation, f"{prefix}{name}.")
        else:
            found[prefix + name] = (field.annotation, field.metadata, field.default)
    return found


def refused(cls: type[Config], pair: str) -> str:
    try:
        load_config(cls, None, [pair])
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("verb", RECIPES)
def test_the_defaults_read_off_the_source_are_those_of_the_config(verb):
    assert tomllib.loads(to_toml(declared(verb)())) == tomllib.loads(to_toml(load(verb).CONFIG()))


@pytest.mark.parametrize("verb", RECIPES)
def test_a_value_is_refused_before_libraries_load_only_as_the_config_would_refuse_it(verb):
    """In the same words. No key has another type, bound or default than in the class."""
    cls = load(verb).CONFIG
    values = ("1", "0", "-1", "1.5", "1e-4", "abc", "true", "nan", "a,b", "[1, 2]", "3,4", "{ text = 'a' }", "''")
    early = 0
    for key in (*keys(cls), "lora", "max_lenth", "lora.rr"):
        for value in values:
            first, whole = refused(declared(verb), f"{key}={value}"), refused(cls, f"{key}={value}")
            assert first in ("", whole), "with the class's own words, or left to it"
            early += bool(first)
    assert early > 100
    told, own = types_of(declared(verb)), types_of(cls)
    assert told == own


def test_the_version_is_the_packages():
    facts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert told("--version") == f"peftlab {facts['project']['version']}\n"


def test_data_check_names_each_bad_row_by_line_and_counts(place):
    rows = ['\ufeff{"text": "good", "label": "pos"}', '{"text": " ", "label": 1}', "", '{"text": "x", "label": 2}']
    rows += ["{", '{"label": 0}', '{"text": "y", "label": 0}']
    (place / "my rows.jsonl").write_bytes("\r\n".join(rows).encode())
    outcome = peftlab("data check './my rows.jsonl' --for classify")
    lines = outcome.out.splitlines()
    assert (outcome.code, outcome.err, lines[-1]) == (2, "", "6 rows, 4 bad")
    assert [line.split(": ")[0] for line in lines[:-1]] == [f"./my rows.jsonl:{n}" for n in (2, 4, 5, 6)]
    assert all(len(line.split(": ", 1)[1]) > 5 for line in lines[:-1])
    Path("good.jsonl").write_text("\n".join(rows[:1] + rows[-1:]))
    assert told("data check good.jsonl --for classify") == "2 rows, 0 bad\n"


@pytest.mark.parametrize(("name", "text"), [("a.jsonl", ""), ("b.jsonl", "\ufeff\r\n \n"), ("c.csv", "text,label\n")])
def test_data_check_of_a_file_without_rows_is_an_error(name, text, place):
    Path(name).write_text(text, encoding="utf-8")
    outcome = peftlab(f"data check {name} --for sft")
    told = f"peftlab: {name}: holds no rows; a job takes one at least\n"
    assert (outcome.code, outcome.out, outcome.err) == (2, "0 rows, 0 bad\n", told)


def test_data_check_does_not_wrap_long_lines(place):
    Path("r.jsonl").write_text(json.dumps({"text": 1, **{f"a long field {i}": 1 for i in range(40)}}) + "\n")
    outcome = peftlab("data check r.jsonl --for prompts")
    assert len(outcome.out.splitlines()) == 2


def test_configs_lists_all_and_shows_one():
    listed = told("configs").splitlines()
    assert [line.split()[0] for line in listed] == list(shipped_configs())
    assert all(len(line.split()) > 3 for line in listed), "each says what it is for"
    for name, path in shipped_configs().items():
        assert told(f"configs {name}") == path.read_text()


def test_runs_of_an_empty_place(place):
    assert told("runs") == "(none)\n"
    assert json.loads(told("runs --json")) == []
    assert list(place.iterdir()) == []


def test_runs_and_report_of_runs(place):
    fake_runs.demo_run(place / "runs")
    fake_runs.sft_run(place / "runs", "mine")
    rows = json.loads(told("runs --json"))
    assert [row["run"] for row in rows] == ["demo", "demo/classify", "demo/sft", "demo/ppo", "mine"]
    assert {row["status"] for row in rows} == {"done"}
    assert rows[-1].keys() == {"run", "recipe", "status", "started", "reason", "seconds"}
    header, *table = told("runs").splitlines()
    assert header.split() == list(rows[0])
    assert [line.split()[:3] for line in table] == [[row["run"], row["recipe"], row["status"]] for row in rows]
    assert "<svg" in Path(told("report mine").strip()).read_text()


def test_a_reason_of_many_lines_keeps_the_table_of_runs_narrow(place):
    fake_runs.sft_run(place / "runs", "mine")
    summary = place / "runs" / "mine" / "summary.json"
    reason = "6 of 7 rows are not usable:\n" + "bad.jsonl:1: text: missing\n" * 9 + "on_bad_row=skip leaves them out"
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"status": "failed", "reason": reason}))
    lines = told("runs").splitlines()
    assert len(lines) == 2 and len(lines[1]) < 160
    assert "6 of 7 rows are not usable: ... on_bad_row=skip leaves them out" in lines[1]
    assert json.loads(told("runs --json"))[0]["reason"] == reason


def test_the_remedy_at_the_end_of_a_reason_is_not_cut(place, monkeypatch):
    reason = "out of memory with batch_size=64, max_length=512: 3.1 GiB were asked for; lower batch_size or max_length"
    with pytest.raises(LabError), RunDir.create(Path("runs"), "mine", "sft", 'recipe = "sft"\n').session():
        raise LabError(reason)
    assert reason in told("runs")
    monkeypatch.setenv("COLUMNS", "80")
    with contextlib.redirect_stdout(Screen()) as out:
        runs_list()
    lines = out.getvalue().splitlines()
    assert reason in " ".join(out.getvalue().split()) and max(map(len, lines)) <= 80


@pytest.mark.parametrize("verb", RECIPES)
def test_a_dry_run_prints_config_and_sizes_and_leaves_nothing(verb, shop, place):
    judges = ["reward=imdb-sentiment", "judge=imdb-judge"] if verb == "ppo" else []
    line = " ".join([verb, "--dry-run", "--json", *tiny.overrides(shop, verb, *judges, "seed=3")])
    plan = json.loads(told(line))
    assert (plan["config"]["recipe"], plan["config"]["seed"]) == (verb, 3)
    assert any("tokens" in key for key in plan)
    assert all(value for key, value in plan.items()), "no size is nothing"
    shown = told(line.replace("--json", ""))
    assert shown.startswith("config\n")
    toml, sizes = shown.removeprefix("config\n").split("\nsizes\n")
    (place / "shown.toml").write_text(toml)
    assert load_config(load(verb).CONFIG, "shown.toml").model_dump(mode="json") == plan.pop("config")
    (place / "shown.toml").unlink()
    assert [key for key in plan if f"\n{key}  " in sizes] == list(plan), "a size a line"
    for key, size in plan.items():
        if key.startswith("bytes"):
            line = re.search(rf"^{re.escape(key)}  (.*)$", sizes, re.M)[1]
            assert len(re.findall(r"\d\.\d [kMG]B", line)) == (len(size) if isinstance(size, dict) else 1), line
    assert list(place.iterdir()) == []


def test_an_override_may_come_first_and_a_shipped_name_may_take_overrides(shop):
    pairs = [f"model={shop['gpt2']}", f"train_data={shop['texts']}", "max_length=64"]
    plan = json.loads(told(" ".join(["sft", *pairs, "--dry-run --json"])))
    assert plan["config"]["max_length"] == 64
    named = json.loads(told(" ".join(["sft", "sft-tiny", *pairs, "--dry-run --json"])))
    assert named["config"]["max_length"] == 64


def test_doctor_finds_tiny_gpt2_fit(monkeypatch):
    findings = json.loads(told("doctor --json --device cpu"))
    assert findings.keys() == {"schema_version", "environment", "checks"} and findings["schema_version"] == 1
    checks = {check["name"]: check for check in findings["checks"]}
    assert len(checks) == len(findings["checks"]) >= 8
    for check in checks.values():
        assert check.keys() == {"name", "value", "limit", "ok", "detail"}
        assert check["ok"] is True and math.isfinite(check["value"]) and check["detail"], check
    assert (checks["invariant/first_kl"]["value"], checks["invariant/first_ratio_error"]["limit"]) == (0.0, 1e-5)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    table = told("doctor --device cpu")
    assert re.search(r"^hub_offline +no$", table, re.M) and "NO" not in table, "only a check that fails shouts"
    assert re.search(r"^model +tiny-gpt2$", table, re.M) and findings["environment"]["base"] == "tiny-gpt2"
    told_to_be = dict(re.findall(r"^(\w+/\w+) +\S+ +([<=>]+ \S+) +yes", table, re.M))
    assert told_to_be.keys() == checks.keys()
    for name, check in checks.items():
        bound, limit = told_to_be[name].split()
        assert eval(f"{check['value']} {bound} {check['limit']}") and float(limit) == check["limit"], check
        assert not 0 < check["limit"] < 1 or "rounding makes less" in check["detail"], "a small limit says why it is"
    assert told_to_be["training/adapter_moved"] == "> 0" and told_to_be["invariant/first_kl"] == "== 0"
    assert findings["environment"]["device"] == "cpu" and findings["environment"]["bytes_per_role"]


def test_doctor_fails_where_a_check_fails(shop, monkeypatch):
    from peftlab.models.roles import Roles

    hashes = iter("ABCD")
    monkeypatch.setattr(Roles, "frozen_hash", lambda self: next(hashes))
    outcome = peftlab("doctor {gpt2} --json --device cpu", **shop)
    failed = [check["name"] for check in json.loads(outcome.out)["checks"] if not check["ok"]]
    assert (outcome.code, failed) == (1, ["training/base_changed"])
    assert "NO" in peftlab("doctor {gpt2} --device cpu", **shop).out


def test_models_lists_what_loads_offline():
    rows = json.loads(told("models --json"))
    assert [row["name"] for row in rows] == known_names()
    assert set(CONVERTED) < {row["name"] for row in rows}
    assert all(row["size"] > 1000 and row["licence"] and row["kind"] for row in rows)
    bases = {row["name"]: row["base"] for row in rows}
    assert {bases[row["name"]] is None for row in rows if row["kind"] != "adapter"} == {True}
    assert {bases[row["name"]] for row in rows if row["kind"] == "adapter"} <= bases.keys() - {None}
    assert (bases["imdb-judge"], bases["tiny-critic"]) == ("smollm2-135m", "tiny-gpt2")
    header, *lines = told("models").splitlines()
    assert len(lines) == len(rows) and header.split()[-1] == "size"
    for line, row in zip(lines, rows, strict=True):
        size, unit = line.split()[-2:]
        assert unit == "MB" and float(size) * 1e6 == pytest.approx(row["size"], abs=5e4)


def test_predict_answers_each_row_in_order_under_its_id(place):
    texts = ["A wonderful, moving film. I loved it.", "Awful. The worst film I ever saw, dull and stupid."]
    rows = [{"id": "last", "text": texts[0] * 9}, {"text": texts[1]}, {"id": 7, "text": texts[0]}, {"prompt": texts[1]}]
    tiny.write_rows(place / "in.jsonl", rows)
    told("predict imdb-sentiment --input in.jsonl --output out.jsonl --device cpu")
    answers = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert [answer["id"] for answer in answers] == ["last", 1, 7, 3]
    assert [answer["label_name"] for answer in answers] == ["positive", "negative", "positive", "negative"]
    for answer in answers:
        assert answer.keys() == {"id", "label", "label_name", "probabilities"}
        assert sum(answer["probabilities"]) == pytest.approx(1, abs=1e-5)
        assert answer["label"] == answer["probabilities"].index(max(answer["probabilities"]))
        assert all(float(f"{p:.6g}") == p for p in answer["probabilities"]), "no digits that a float32 has not"
    alone = json.loads(told(f"predict imdb-sentiment --device cpu --text '{texts[1]}'"))
    assert alone["id"] == 0
    assert alone["probabilities"] == pytest.approx(answers[1]["probabilities"], abs=1e-5)
    printed = told("predict imdb-sentiment --input in.jsonl --device cpu")
    assert [json.loads(line) for line in printed.splitlines()] == answers


@pytest.mark.parametrize(
    ("words", "option", "command"),
    [
        ("rows.jsonl", "--input", "ADAPTER --input rows.jsonl"),
        ("imdb-sentiment rows.CSV --output o.jsonl", "--input", "imdb-sentiment --input rows.CSV"),
        ("mine.csv imdb-sentiment", "--input", "imdb-sentiment --input mine.csv"),
        ("imdb-sentiment 'my reviews'", "--input", "imdb-sentiment --input 'my reviews'"),
        ("imdb-sentiment a 'lovely film'", "--text", "imdb-sentiment --text 'a lovely film'"),
    ],
)
def test_predict_tells_where_a_file_and_a_text_go(words, option, command, place):
    Path("my reviews").write_text("")
    what = {"--input": "a file", "--text": "a text"}[option]
    told = f"predict: takes one argument, the adapter; {what} goes behind {option}:\n  peftlab predict {command}\n"
    outcome = peftlab(f"predict {words}")
    assert (outcome.code, outcome.out, outcome.err) == (2, "", f"peftlab: {told}")


def test_predict_of_a_text_model_continues_each_row(place, shop):
    tiny.write_rows(place / "in.jsonl", [{"text": "the film"}, {"id": "x", "prompt": "a plot " * 90}])
    answers = [json.loads(line) for line in told("predict {gpt2} --input in.jsonl", **shop).splitlines()]
    assert [answer["id"] for answer in answers] == [0, "x"]
    assert all(isinstance(answer["text"], str) and answer.keys() == {"id", "text"} for answer in answers)


def test_predict_reads_whatever_training_reads(place, shop):
    """The same rows give the same answers, and what is wrong with one is told as `data check` tells it."""
    import pyarrow
    import pyarrow.parquet

    rows = [{"id": "x", "text": "the film, and\nits plot"}, {"id": "7", "text": 'a "plot"'}]
    tiny.write_rows(place / "in.jsonl", rows)
    Path("in.csv").write_text('\ufeffid,text\r\nx,"the film, and\nits plot"\r\n7,"a ""plot"""\r\n', encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "in.parquet")
    others = ("named-by-nothing", "rows.2026-11-28", "in.txt", "in.json")
    for name in others:
        Path(name).write_bytes(Path("in.jsonl").read_bytes())
    Path("columns.csv").write_text('id,text,prompt\nx,"the film, and\nits plot",other\n7,,"a ""plot"""\n')
    halves = [rows[0] | {"prompt": None}, {"id": "7", "text": None, "prompt": rows[1]["text"]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(halves), "columns.parquet")
    said = [told(f"predict {{gpt2}} --input {name}", **shop)
            for name in ("in.jsonl", "in.csv", "in.parquet", "columns.csv", "columns.parquet", *others)]
    assert len(set(said)) == 1 and [json.loads(line)["id"] for line in said[0].splitlines()] == ["x", "7"]
    Path("bad.csv").write_text("review,stars\nA film.,5\n")
    Path("semicolons.csv").write_text("text;stars\nA film.;5\n")
    assert told("predict {gpt2} --input bad.csv --columns text=review", **shop).startswith('{"id": 0, "text": ')
    Path("torn.csv").write_text("id,text\nx,A film.\n1\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"id": 1.5, "text": "A film."}]), "odd.parquet")
    Path("in.tsv").write_text("text\nA film.\n")
    Path("null.jsonl").write_text('{"text": null, "prompt": null}\n')
    for name, message in {
        "bad.csv": "expected a row with a string `text` (or `prompt`, or `document`); the row has 'review', 'stars'; "
        "--columns text=COLUMN names another",
        "semicolons.csv": "semicolons.csv:1: cells are separated by ';'; save the file with commas",
        "bad.csv --columns text=reviews": "the row has 'review', 'stars'",
        "bad.csv --columns text=review,label=stars": "once for each field, --columns text=review --columns label=stars",
        "torn.csv": "torn.csv:3: 1 cells, but the header has 2",
        "odd.parquet": "odd.parquet:1: id: expected text or an integer, not 1.5",
        "null.jsonl": "null.jsonl:1: expected a row with a string `text` (or `prompt`, or `document`); `text` is null",
        "in.tsv": "in.tsv: expected a file that ends in .jsonl, .csv, .parquet",
    }.items():
        outcome = peftlab(f"predict {{gpt2}} --input {name}", **shop)
        assert outcome.code == 2 and message in outcome.err, outcome.err


def test_predict_names_every_bad_row_before_a_model_loads(place, shop, monkeypatch):
    monkeypatch.setattr(TextClassifier, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    rows = ['{"text": "A film."}', '{"text": 7}', "", "no json", '{"text": " "}', '{"title": "A film."}']
    Path("bad.jsonl").write_text("\n".join([*rows, *['{"text": null}'] * 20]))
    outcome = peftlab("predict imdb-sentiment --input bad.jsonl --output out.jsonl --device cpu")
    assert (outcome.code, outcome.out, Path("out.jsonl").exists()) == (2, "", False)
    count, *lines = outcome.err.splitlines()
    assert count == "peftlab: bad.jsonl: 24 of 25 rows are not usable:"
    assert [line.split(": ")[0] for line in lines] == [f"bad.jsonl:{n}" for n in (2, 4, 5, 6, *range(7, 27))]
    assert all(len(line.split(": ", 1)[1]) > 5 for line in lines)
    Path("bad.jsonl").write_text("\n".join([*rows[:1], *rows[-2:-1]]))
    assert peftlab("predict imdb-sentiment --input bad.jsonl").err == "peftlab: bad.jsonl:2: `text` is empty; give a " \
        "text, or take the row out\n"


def test_answers_of_predict_are_not_named_as_what_they_are_not(place):
    tiny.write_rows(place / "in.jsonl", [{"text": "A film."}])
    outcome = peftlab("predict imdb-sentiment --input in.jsonl --output out.csv --device cpu")
    assert outcome.code == 2 and "--output out.csv: answers are JSON" in outcome.err and not Path("out.csv").exists()


def test_rows_of_ones_own_with_held_out_rows_of_another_are_said_to_be(place, shop, monkeypatch):
    tiny.write_rows(place / "mine.jsonl", [{"text": "the film was a film, the plot a plot"}] * 8)
    monkeypatch.setattr(common, "load_rows", lambda *_: RecordSet([], "rows", "sha"))
    monkeypatch.setattr(common, "note_data", lambda *_: None)
    said: list[str] = []
    monkeypatch.setattr(common, "say", said.append)
    for held_out, told in (("imdb:test", 1), ("mine.jsonl", 0)):
        said.clear()
        config = load("sft").CONFIG(train_data="mine.jsonl", eval_data=held_out)
        for which in ("train", "eval"):
            common.load_recorded(None, config, which, "sft")
        assert len(said) == told and all("eval_data=FILE" in line for line in said)


def test_generate_says_the_same_under_the_same_seed(shop):
    line = "generate {gpt2} --prompt 'the film' -n 3 --max-new-tokens 12 --json --seed "
    first = told(line + "5", **shop)
    assert told(line + "5", **shop) == first
    rows = json.loads(first)
    assert [row["seed"] for row in rows] == [5, 6, 7]
    assert len({row["text"] for row in rows}) == 3
    assert json.loads(told(line.replace("-n 3", "-n 1") + "6", **shop))[0]["text"] == rows[1]["text"]
    assert told(line.replace("--json", "") + "5", **shop).startswith("the film")
    assert json.loads(told("generate {gpt2} --max-new-tokens 4 --json", **shop))[0]["prompt"] == "", "an empty prompt"


def test_generate_without_a_prompt_says_what_it_does_and_how_to_give_one(shop):
    """So too where it is empty, as a shell's variable that is not set leaves it."""
    line = "generate {gpt2} --max-new-tokens 4 --json"
    bare, empty, given = (peftlab(f"{line}{more}", **shop) for more in ("", " --prompt ''", " --prompt film"))
    assert bare.code == 0 and bare == empty and given.err == ""
    assert bare.err.startswith("generate: no prompt, ") and "--prompt TEXT" in bare.err and bare.err.count("\n") == 1
    misplaced = peftlab("generate missing the 'quiet film' -n 2")
    assert misplaced.code == 2 and misplaced.err.endswith("goes behind --prompt, as in --prompt 'the quiet film'\n")
    assert "No such option: --no-such" in peftlab("generate missing --no-such").err


def test_eval_measures_a_text_model_and_a_classifier(place, shop):
    result = json.loads(told("eval {gpt2} --data {texts} --json", **shop))
    low, high = result["intervals"]["eval/perplexity"]
    assert low < result["metrics"]["eval/perplexity"] < high
    assert result["rows"] == 40
    some = json.loads(told("eval {gpt2} --data {texts} --limit 8 --json", **shop))
    assert some["rows"] == 8 and some["sha256"] != result["sha256"]
    rows = [{"text": f"What a {word} film, I {verb} it.", "label": label} for word, verb, label in
            [("great", "loved", 1), ("terrible", "hated", 0), ("dull", "left", 0), ("lovely", "adored", "pos")]]
    tiny.write_rows(place / "rows.jsonl", rows)
    judged = json.loads(told("eval imdb-sentiment --data rows.jsonl --json"))
    assert judged["metrics"].keys() >= {"eval/accuracy", "eval/f1", "eval/ece"}
    assert judged["metrics"]["eval/accuracy"] == 1.0
    assert "eval/accuracy" in told("eval imdb-sentiment --data rows.jsonl")


def test_eval_reads_columns_of_another_name(place, shop):
    rows = [{"review": row["text"], "stars": row["label"], "text": "no"} for row in tiny.reviews(12)]
    own, same = tiny.write_rows(place / "own.jsonl", rows), tiny.write_rows(place / "same.jsonl", tiny.reviews(12))
    for stack, named in ((shop["gpt2"], "--columns text=review"),
                         ("imdb-sentiment", "--columns text=review --columns label=stars")):
        mapped = json.loads(told(f"eval {stack} --data {own} --device cpu --json {named}"))
        plain = json.loads(told(f"eval {stack} --data {same} --device cpu --json"))
        assert mapped | {"data": same} == plain
    documents = [{"dialogue": row["document"], "summary": row["summary"]} for row in tiny.summaries(3)]
    talk = tiny.write_rows(place / "talk.jsonl", documents)
    found = json.loads(told(f"eval {shop['t5']} --data {talk} --device cpu --json --columns document=dialogue"))
    assert found["rows"] == 3
    outcome = peftlab(f"eval {shop['gpt2']} --data {own} --columns txet=review")
    assert outcome.code == 2 and "did you mean text" in outcome.err and outcome.out == ""


def test_eval_of_a_text_model_on_labelled_pairs_is_the_rubric(place, shop):
    rows = [{"prompt": f"Review: {row['text'][:20]}\nAnswer:", "completion": " yes", "label": float(row["label"])}
            for row in tiny.reviews(6)]
    pairs = tiny.write_rows(place / "pairs.jsonl", rows)
    found = json.loads(told(f"eval {shop['gpt2']} --data {pairs} --limit 3 --device cpu --json"))
    assert found["rows"] == 3 and found["metrics"].keys() == found["intervals"].keys()
    assert found["metrics"].keys() >= {"rubric/label", "rubric/evidence", "rubric/all"}
    assert "eval/perplexity" not in found["metrics"]
    long = {"prompt": "a film " * 60, "completion": " yes", "label": 1}
    seven, one = tiny.write_rows(place / "seven.jsonl", [*rows, long]), tiny.write_rows(place / "one.jsonl", [long])
    some = peftlab(f"eval {shop['gpt2']} --data {seven} --device cpu --json")
    assert json.loads(some.out)["rows"] == 6 and "1 of 7 prompts are left out" in some.err
    none = peftlab(f"eval {shop['gpt2']} --data {one} --device cpu")
    assert none.code == 2 and "every prompt is longer than" in none.err
    mixed = tiny.write_rows(place / "mixed.jsonl", [*rows, {"text": "a film"}])
    bare = tiny.write_rows(place / "bare.jsonl", [{"prompt": "a", "completion": "b"}])
    for file in (mixed, bare):
        outcome = peftlab(f"eval {shop['gpt2']} --data {file} --device cpu")
        assert outcome.code == 2 and "`text`" in outcome.err and "`label`" in outcome.err


def test_a_training_verb_ends_with_its_figures_and_the_report(shop, place):
    out = told(" ".join(["sft", "--run", "mine", *tiny.overrides(shop, "sft", "max_steps=1")]))
    assert "eval/perplexity" in out and "mine: done" in out
    assert Path(out.rsplit("report: ")[1].strip()).is_file()


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("no \x1b[31mfile"), 2, "peftlab: no file\n"),
        (LabError("the disk is full"), 1, "peftlab: the disk is full\n"),
        (Interrupted(2), 130, "peftlab: stopped by SIGINT; --resume continues\n"),
        (Interrupted(15), 143, "peftlab: stopped by SIGTERM; --resume continues\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_each_way_to_end_has_its_exit_code(error, code, message):
    with mock.patch("peftlab.config.shipped_configs", side_effect=error):
        outcome = peftlab("configs")
    assert outcome.code == code and outcome.out == ""
    assert outcome.err.endswith(message)


def test_a_bug_of_ours_keeps_its_traceback():
    with mock.patch("peftlab.config.shipped_configs", side_effect=ZeroDivisionError), pytest.raises(ZeroDivisionError):
        peftlab("configs")


def test_a_pipe_that_closes_early_is_no_traceback(place):
    """More than a pipe holds, so that the program is still writing when its reader has gone."""
    (place / "rows.jsonl").write_text("[]\n" * 9000)
    check = [sys.executable, "-m", "peftlab.cli", "data", "check", "rows.jsonl", "--for", "sft"]
    with subprocess.Popen(check, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode not in (0, 2)


def test_tables_are_readable_whatever_is_in_them():
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        print_rows([{"name": "a", "value": None}, {"name": "longer", "value": 1.23456789}], False)
    assert out.getvalue().splitlines() == ["name    value", "a       -", "longer  1.235"]


def test_a_table_too_wide_leaves_out_what_may_go_until_its_last_column_has_half_the_terminal(monkeypatch):
    row = {"run": "r" * 20, "when": "w" * 15, "seconds": "s" * 10, "reason": "the file has no such rows " * 2}

    def shown(width: int, out: io.StringIO) -> list[str]:
        monkeypatch.setenv("COLUMNS", str(width))
        with contextlib.redirect_stdout(out):
            print_rows([row], False, may_go=("when", "seconds"))
        return out.getvalue().splitlines()

    heads = {width: shown(width, Screen())[0].split() for width in (40, 60, 80, 101, 102, 120)}
    whole = (heads[102], heads[120], shown(40, io.StringIO())[0].split())
    assert heads[40] == heads[60] == ["run", "reason"] and heads[80] == heads[101] == ["run", "seconds", "reason"]
    assert all(head == list(row) for head in whole), "whole where it has its half, or in a pipe"
    assert max(map(len, shown(80, Screen()))) <= 80


class Screen(io.StringIO):
    """A terminal that takes what it is given."""

    def isatty(self) -> bool:
        return True


@given(st.lists(st.text("abcdefg-.,", min_size=1, max_size=30), min_size=1, max_size=30), st.integers(0, 60))
def test_a_line_too_long_for_a_terminal_is_broken_at_words_only(words, below):
    line = " ".join(words)
    with mock.patch.dict(os.environ, {"COLUMNS": "40"}):
        assert folded(line, io.StringIO(), below) == line, "in a pipe it stays one line"
        assert folded(f"  {line}", Screen(), below) == f"  {line}", "a command can be copied"
        parts = folded(line, Screen(), below).split("\n")
    assert " ".join(part.strip() for part in parts).split() == line.split()
    assert all(len(part) <= 40 or len(part.split()) == 1 for part in parts)
    indent = below if below <= 20 else 2
    assert all(part.startswith(" " * indent) for part in parts[1:])


def test_tables_and_messages_fit_a_narrow_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    for command in ("configs", "personas list"):
        monkeypatch.setattr(sys, "stdout", Screen())
        with pytest.raises(SystemExit), mock.patch.object(sys, "argv", ["peftlab", *command.split()]):
            cli.main()
        lines = sys.stdout.getvalue().splitlines()
        assert len(lines) > 3 and max(map(len, lines)) <= 60
        assert any(line.startswith("  ") for line in lines), "it goes on below itself"
    monkeypatch.setattr(sys, "stderr", Screen())
    say("peftlab: model nobody: not known here, and the Hub did not give it; offline, use tiny-gpt2 or tiny-t5")
    assert max(map(len, sys.stderr.getvalue().splitlines())) <= 60


def test_a_text_of_many_lines_keeps_its_lists_and_commands(monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    words = "what a long sentence, and more of it"
    text = f"{words}\n\n- {words}\n  - {words}\n`peftlab {words}`\n  peftlab {words}"
    assert folded_text(text, io.StringIO()) == text
    assert folded_text(text, Screen()).splitlines() == [
        "what a long sentence, and more", "of it", "", "- what a long sentence, and", "  more of it",
        "  - what a long sentence, and", "    more of it", f"`peftlab {words}`", f"  peftlab {words}",
    ]  # fmt: skip


LONG = "It was a film of many words. " * 9


@pytest.mark.parametrize(
    "command",
    [
        "generate x",
        "data preferences --policy x --prompts p --output o",
        "data gist --output o",
    ],
)
def test_a_long_text_is_broken_at_words_on_a_terminal_and_stays_raw_in_a_pipe(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr("peftlab.recipes.tools.generate_texts", lambda *_: [{"prompt": "", "text": LONG}])
    for build in ("build_preferences.build_preferences", "makers.build_data"):
        monkeypatch.setattr(f"peftlab.recipes.{build}", lambda *_: None)
    for card in ("preferences_card.card", "makers.card"):
        monkeypatch.setattr(f"peftlab.recipes.{card}", lambda _: f"- {LONG}")
    shown = {}
    for out in (Screen(), io.StringIO()):
        argv = mock.patch.object(sys, "argv", ["peftlab", *command.split()])
        with contextlib.redirect_stdout(out), argv, pytest.raises(SystemExit):
            cli.main()
        shown[type(out)] = out.getvalue()
    assert max(map(len, shown[Screen].splitlines())) <= 60 and LONG in shown[io.StringIO]
    assert shown[Screen].split() == shown[io.StringIO].split()


def test_rows_of_predict_stay_whole_on_a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr("peftlab.recipes.predict.kind_of", lambda _: "causal")
    monkeypatch.setattr("peftlab.recipes.predict.resolve", lambda _: mock.Mock(kind="adapter"))
    monkeypatch.setattr("peftlab.recipes.predict._continue", lambda *_: [{"id": 0, "text": LONG}])
    out, argv = Screen(), mock.patch.object(sys, "argv", ["peftlab", "predict", "x", "--text", "film"])
    with contextlib.redirect_stdout(out), argv, pytest.raises(SystemExit):
        cli.main()
    assert json.loads(out.getvalue()) == {"id": 0, "text": LONG}


def test_details_of_doctor_stand_below_their_column(monkeypatch):
    from peftlab.recipes import doctor

    told = "log-probs of a padded row against it alone, and more of that, nats"
    checks = [doctor.Check("padding/left_pad_error_of_a_row", 1e-6, "<=", 1e-4, True, told)] * 2
    monkeypatch.setattr(doctor, "run_doctor", lambda *_: ({"model": "x"}, checks))
    monkeypatch.setenv("COLUMNS", "80")
    out = Screen()
    argv = mock.patch.object(sys, "argv", ["peftlab", "doctor"])
    with contextlib.redirect_stdout(out), argv, pytest.raises(SystemExit):
        cli.main()
    head, table = out.getvalue().split("\n\n")
    names, *lines = table.splitlines()
    column = names.index("detail")
    assert head.startswith("model") and column > 40, "in the right half"
    assert len(lines) > 4 and {line[column - 1] for line in lines} == {" "} and " ".join(
        line[column:] for line in lines
    ) == f"{told} {told}"


HALF_LOADED = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:  # as libraries do that try an import
    pass
print("went on half loaded")
"""


@pytest.mark.parametrize(
    ("verb", "told"),
    [
        ("import half_loaded", "\npeftlab: interrupted while loading\n"),
        ("os.kill(os.getpid(), signal.SIGINT); time.sleep(9)", "peftlab: interrupted\n"),
    ],
)
def test_ctrl_c_ends_a_verb_that_loads_and_one_that_works(tmp_path, verb, told):
    (tmp_path / "half_loaded.py").write_text(HALF_LOADED)
    code = f"import os, signal, time\nfrom peftlab import cli\ndef app():\n    {verb}\ncli.app = app\ncli.main()\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", told)
