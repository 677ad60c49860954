"""Configs: what is written is read back, overrides follow TOML, and a wrong key names the nearest right one."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from peftlab.config import Config, keys, load_config, shipped_configs, to_toml
from peftlab.errors import UserError
from peftlab.recipes import load


class Table(Config):
    rank: int = 4
    names: list[str] | Literal["all"] = "all"


class Job(Config):
    recipe: Literal["job"] = "job"
    model: str = "tiny"
    steps: int = Field(3, ge=1)
    lr: float = Field(1e-3, gt=0)
    span: tuple[int, int] = (2, 8)
    fast: bool = False
    words: list[str] = []
    table: Table = Table()


texts = st.text(st.characters(codec="utf-8"))
jobs = st.builds(
    Job,
    model=texts,
    steps=st.integers(1, 2**62),
    lr=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    span=st.tuples(st.integers(-(2**62), 2**62), st.integers(0, 9)),
    fast=st.booleans(),
    words=st.lists(texts, max_size=3),
    table=st.builds(Table, rank=st.integers(-9, 9), names=st.lists(texts, max_size=3)),
)


@given(jobs)
def test_what_is_written_is_read_back(tmp_path_factory, job):
    path = tmp_path_factory.getbasetemp() / "job.toml"
    path.write_text(to_toml(job), encoding="utf-8")
    assert load_config(Job, str(path)) == job


@given(model=texts, lr=st.floats(1e-30, 1e30), steps=st.integers(1, 10**9), rank=st.integers(-9, 9))
def test_an_override_in_toml_means_its_value(model, lr, steps, rank):
    written = dict(line.split(" = ", 1) for line in to_toml(Job(model=model)).splitlines() if " = " in line)
    pairs = [f"model={written['model']}", f"lr={lr!r}", f" steps = {steps} ", f"table.rank={rank}"]
    job = load_config(Job, None, pairs)
    assert (job.model, job.lr, job.steps, job.table.rank) == (model, lr, steps, rank)
    assert job == Job(model=model, lr=lr, steps=steps, table=Table(rank=rank)), "nothing else changed"


@given(st.text(string.ascii_letters + "/._-:", min_size=1).filter(lambda s: s not in ("true", "false", "nan", "inf")))
def test_text_needs_no_quotes(text):
    assert load_config(Job, None, [f"model={text}"]).model == text


@pytest.mark.parametrize(
    ("text", "names"),
    {
        "a,b": ["a", "b"],
        " a , b c ": ["a", "b c"],
        "a": ["a"],
        "[a, b]": ["a", "b"],
        '["a", "b"]': ["a", "b"],
        '"a","b"': ["a", "b"],
        '"a,b"': ["a", "b"],
        "1,2": ["1", "2"],
        "1": ["1"],
        "true,0.5": ["true", "0.5"],
        '["a,b"]': ["a,b"],
        "": [],
    }.items(),
)
def test_a_list_of_strings_needs_no_toml(text, names):
    assert load_config(Job, None, [f"words={text}"]).words == names
    if text:
        assert load_config(Job, None, [f"table.names={text}"]).table.names == names


@given(st.lists(st.text(string.ascii_letters + "._- /", min_size=1).map(str.strip).filter(bool), min_size=1))
def test_names_joined_by_commas_are_those_names(names):
    assert load_config(Job, None, [f"words={','.join(names)}"]).words == names


def test_a_choice_beside_a_list_is_no_list():
    assert load_config(Job, None, ["table.names=all"]).table.names == "all"
    assert load_config(Job, None, ["model=a,b"]).model == "a,b", "only where the key takes a list"


def test_later_overrides_win_and_tables_keep_their_other_keys(tmp_path):
    path = tmp_path / "j.toml"
    path.write_text('\ufeffrecipe = "job"\r\nsteps = 5\r\n[table]\r\nrank = 7\r\nnames = ["q"]\r\n', encoding="utf-8")
    job = load_config(Job, str(path), ["steps=6", "table.rank=8", "steps=7", 'words=["a", "b"]', "model=a=b"])
    assert (job.steps, job.table, job.words, job.model) == (7, Table(rank=8, names=["q"]), ["a", "b"], "a=b")


@pytest.mark.parametrize(
    ("pair", "words"),
    {
        "a slip": ("setps=3", ["setps", "did you mean steps"]),
        "a slip in a table": ("table.rnak=3", ["table.rnak", "did you mean table.rank"]),
        "nothing like it": ("zzz=3", ["zzz", "known keys", "table.names", "span"]),
        "a type": ("steps=soon", ["steps", "integer", "'soon'"]),
        "a range": ("lr=-1", ["lr", "greater than 0", "-1"]),
        "a length": ("span=[1, 2, 3]", ["span", "at most 2"]),
        "a choice": ("recipe=other", ["recipe"]),
        "a key as a table": ("steps.x=1", ["steps"]),
        "no equals sign": ("steps", ["'steps'", "key=value"]),
        "no key": ("=3", ["'=3'", "key=value"]),
    }.values(),
)
def test_a_wrong_override_is_named(pair, words):
    with pytest.raises(UserError) as told:
        load_config(Job, None, [pair])
    assert all(word in str(told.value) for word in words)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("learning_rate", "lr"), ("lerning_rate", "lr"), ("stesp", "max_steps"), ("data", "train_data"),
        ("eval_dat", "eval_data"), ("batchsize", "batch_size"),
    ],
)  # fmt: skip
def test_a_slip_in_the_name_that_another_library_gives_a_key_names_ours(key, meant):
    with pytest.raises(UserError, match=f"unknown key {key}; did you mean {meant}\\?"):
        load_config(load("sft").CONFIG, None, [f"{key}=1"])


def test_every_wrong_key_is_named_at_once(tmp_path):
    path = tmp_path / "j.toml"
    path.write_text("setps = 1\nlr = 0\n")
    with pytest.raises(UserError, match=r"j\.toml: .*lr: .*; unknown key setps"):
        load_config(Job, str(path))


def test_a_shipped_name_with_a_slip_names_the_nearest():
    name = next(iter(shipped_configs()))
    with pytest.raises(UserError, match=f"did you mean {name}"):
        load_config(Job, name[:-1])


def test_a_changed_copy_is_checked_too():
    job = Job()
    changed = job.with_(steps=9, table={"rank": 1})
    assert (changed.steps, changed.table, changed.lr) == (9, Table(rank=1, names="all"), job.lr)
    assert job == Job()
    for wrong in ({"steps": 0}, {"setps": 1}, {"table": {"rnak": 1}}):
        with pytest.raises(ValidationError):
            job.with_(**wrong)
    with pytest.raises(ValidationError):
        job.steps = 4  # frozen


def test_keys_are_those_of_the_file():
    assert keys(Job) == ["recipe", "model", "steps", "lr", "span", "fast", "words", "table.rank", "table.names"]


def test_a_file_comes_before_a_shipped_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = next(iter(shipped_configs()))
    Path(name).write_text("steps = 8\n")
    assert load_config(Job, name).steps == 8
