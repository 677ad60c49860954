"""Damaged and forged adapters: see benchmarks/adapters_fuzz.py for the many."""

from __future__ import annotations

import importlib
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from peftlab.errors import UserError

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def fuzz() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        return importlib.import_module("adapters_fuzz")


@pytest.fixture(scope="module")
def bench(fuzz, tmp_path_factory) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fuzz.adapter_files, "load_backbone", fuzz.adapter_files.load_backbone)  # put back afterwards
        yield fuzz.Bench(tmp_path_factory.mktemp("fuzz"))


def test_each_is_refused_by_name_or_changes_nothing(fuzz, bench, capsys):
    found = fuzz.campaign(bench, 300, seed=3)
    assert [found[end] for end in fuzz.BAD] == [0] * len(fuzz.BAD), capsys.readouterr().out
    assert found["refused"] > 250 and sum(found.values()) == 300


def test_each_kind_of_adapter_says_something(bench):
    for kind, folder in bench.kinds.items():
        assert bench.numbers[kind].std() > 0, kind
        assert bench.load(kind, folder).equal(bench.numbers[kind]), kind


def test_an_adapter_without_hashes_loads_with_a_warning(bench, capsys):
    bench.load("foreign", bench.kinds["foreign"])
    assert "has no manifest.json" in capsys.readouterr().err
    bench.load("text", bench.kinds["text"])
    assert capsys.readouterr().err == ""


class Trap:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("unpickled",)


def test_a_pickle_is_refused_by_its_content(bench, tmp_path, monkeypatch):
    """Under the name of weights, where no hash speaks against it; what it would run does not run."""
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(bench.kinds["foreign"], tmp_path / "adapter")
    (folder / "adapter_model.safetensors").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match=r"adapter_model.safetensors: not a readable safetensors file"):
        bench.load("foreign", folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match="pickle files are not loaded"):
        bench.load("foreign", folder)
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize("file", ["manifest.json", "stack.json"])
def test_one_of_our_own_without_its_hashes_is_no_foreign_one(bench, tmp_path, file):
    folder = shutil.copytree(bench.kinds["classifier"], tmp_path / "adapter")
    (folder / file).unlink()
    with pytest.raises(UserError, match=f"{file} is missing"):
        bench.load("classifier", folder)


def test_what_would_fill_the_memory_is_refused_before_it_is_built(fuzz, bench, tmp_path):
    folder = shutil.copytree(bench.kinds["foreign"], tmp_path / "adapter")
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 2', '"r": 1000000000'))
    with pytest.raises(UserError, match="says r 1000000000"):
        bench.load("foreign", folder)
