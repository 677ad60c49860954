"""The benchmarks of RL in a tiny configuration: rows with the keys that other tools read, and sides that fail aloud."""

from __future__ import annotations

import csv
import importlib
import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
ALWAYS = {"what", "device", "dtype", "model", "batch", "tokens", "ours_s", "ours_gb"}
BESIDE = {"peer", "peer_s", "peer_gb", "ratio"}
TINY = ["--device", "cpu", "--batch", "4", "--tokens", "2", "--epochs", "1", "--rounds", "1"]


@pytest.fixture
def benchmark(monkeypatch, capsys):
    """Runs a program of benchmarks/ and returns its rows; its sides are processes of one thread."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def run(name: str, *words: str):
        monkeypatch.setattr(sys, "argv", [name, *TINY, *words])
        importlib.import_module(name).main()
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


@pytest.mark.parametrize("line, what", [("ppo_step --what pg_step", "pg_step"), ("memory", "memory")])
def test_a_row_without_a_peer(benchmark, line, what):
    (row,) = benchmark(*line.split())
    assert row.keys() >= ALWAYS and not row.keys() & BESIDE
    assert (row["what"], row["model"], row["batch"], row["tokens"]) == (what, "tiny-gpt2", 4, 8)
    assert 0 < row["ours_rollout_s"] < row["ours_s"] and 0.1 < row["ours_gb"] < 10
    assert row["ratio_error"] < 1e-4
    if what == "memory":  # PPO with a reward model
        assert row["ours_bytes"].keys() == {"base", "reward", "policy", "value", "sampler"}


def test_a_step_of_two_processes_stands_beside_a_peers(benchmark):
    (row,) = benchmark("ppo_step", "--what", "ppo_update", "--ranks", "2", "--gradients", "bfloat16")
    assert (row["ranks"], row["dtype"], row["tokens"]) == (2, "float32, gradients bfloat16", 8)
    assert 0 < row["ours_rollout_s"] < row["ours_s"] and 0.2 < row["ours_gb"] < 10 and row["ratio_error"] < 1e-4


def test_rows_of_several_processes(benchmark):
    strong, weak = benchmark("ranks", "--ranks", "2")
    assert (strong["what"], strong["ranks"], strong["scaling"], weak["scaling"]) == ("ppo_ranks", 2, "strong", "weak")
    assert (strong["batch"], weak["batch"], strong["tokens"], weak["tokens"]) == (4, 8, 8, 16)
    assert strong["efficiency"] == 1.0 and 0 < strong["ours_rollout_s"] < strong["ours_s"]


def test_the_picture_of_over_optimization_is_that_of_the_logs_rows(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    drawn = importlib.import_module("overoptimization").picture()
    assert drawn == (BENCHMARKS.parent / "docs/pictures/overoptimization.svg").read_text(), "run the program again"
    log = (BENCHMARKS.parent / "LOG.md").read_text().partition("| pairs | accuracy; ECE, clean pairs |")[2]
    rows = list(csv.DictReader((BENCHMARKS / "overoptimization.csv").read_text().splitlines()))
    for at, row in enumerate(rows):
        name = f"{int(row['pairs']):,}" + ", turned" * (row["labels"] == "turned") + ", five" * (row["members"] == "5")
        (line,) = (line for line in log.splitlines() if line.startswith(f"| {name} |"))
        told = [float(number) for number in line.split("|")[3 + at % 5].split()]
        assert told == [float(row[key]) for key in ("kl", "judge", "proxy_gain", "distinct_2")], row
    assert len(rows) == 60 and ElementTree.fromstring(drawn).tag.endswith("svg")


def test_a_batch_that_cannot_be_compared_is_refused(benchmark):
    with pytest.raises(SystemExit, match="--batch 6: give a multiple of 4"):
        benchmark("ppo_step", "--batch", "6")


def test_a_peer_that_is_not_there_is_refused(benchmark, tmp_path):
    importlib.import_module("ppo_step")
    from beside import path_of

    with pytest.raises(SystemExit, match="--peer-site .*nowhere: no such folder"):
        path_of("trl-1.12", tmp_path / "nowhere")


def test_a_side_that_dies_hands_on_its_last_words(benchmark):
    importlib.import_module("ppo_step")
    from beside import Side
    from work import Job

    with pytest.raises(SystemExit, match=r"No such file(?s:.*)trl_nothing: ended with exit code 2"):
        Side("trl_nothing", Job("ppo", "cpu", "tiny-gpt2", 8, 4, 2))
