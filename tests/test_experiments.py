"""The grids of benchmarks/experiments.py: their commands are valid, and each runs once, behind what it stands on."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest

from peftlab.config import load_config
from peftlab.recipes import load

PROGRAM = Path(__file__).parents[1] / "benchmarks" / "experiments.py"
# A lab whose runs take no time: it says what it was asked, fails where a command says so, and else is done.
STUB = """
import json, pathlib, sys
words = sys.argv[1:]
if "fail" in words:
    sys.exit(3)
name = words[words.index("--run") + 1] if "--run" in words else None
place = pathlib.Path("runs", name) if name else pathlib.Path(words[words.index("--output") + 1])
place.mkdir(parents=True)
with open("asked", "a") as asked:
    asked.write(place.name + "\\n")
figures = {"eval/judge": 0.25 * len(words[0]), "time/step_s": 1.0}
summary = {"status": "done", "metrics": figures, "baseline": {"eval/judge": 0.5}, "intervals": {"eval/judge": [0, 1]}}
(place / "summary.json").write_text(json.dumps(summary))
"""


@pytest.fixture
def experiments(monkeypatch):
    spec = importlib.util.spec_from_file_location("experiments", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "experiments", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_every_job_stands_behind_what_it_needs_and_has_a_valid_config(experiments):
    for name, make in experiments.EXPERIMENTS.items():
        seen = set()
        for job in make():
            assert job.name not in seen and seen.issuperset(job.after), f"{name}: {job.name}"
            seen.add(job.name)
            verb, config, *pairs = job.command.split()
            if verb != "data":
                load_config(load(verb).CONFIG, config, pairs)


def test_a_grid_runs_in_order_once_and_tells_its_figures(experiments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiments, "PROGRAM", [sys.executable, "-c", STUB])
    jobs = [
        experiments.Job("first", "a"),
        experiments.Job("pairs", "data", ("first",)),
        experiments.Job("last-s0", "bb", ("first", "pairs")),
        experiments.Job("last-s1", "bbbb", ("first", "pairs")),
    ]
    runs = Path("runs/grid")
    for _ in range(2):
        assert experiments.execute(jobs, runs, experiments.Machine(["cpu", "cpu"]))
        asked = Path("asked").read_text().split()
        assert asked[:2] == ["first", "pairs"] and sorted(asked[2:]) == ["last-s0", "last-s1"]
    first, last = experiments.rows(jobs, runs)
    assert (first["group"], first["eval/judge"]) == ("first", [0.25, 0, 1])
    assert (last["seeds"], last["eval/judge"], last["before"]) == (2, [0.75, 0.5, 1.0], {"eval/judge": 0.5})
    assert "time/step_s" not in last


def test_a_fit_finds_the_curve_that_the_gains_lie_on(experiments):
    def row(kl):
        d = math.sqrt(kl)
        gains = {"eval/judge": d * (0.5 - 0.2 * math.log(d)), "eval/reward": d * (1.5 + 0.1 * math.log(d))}
        told = {score: [0.25 + gain, 0, 1] for score, gain in gains.items()}
        return {"group": f"rm500-noisy-kl{kl}", "eval/kl": [kl], **told, "before": dict.fromkeys(gains, 0.25)}

    plain = {"group": "rm500-noisy", "eval/pair_accuracy": [0.9]}
    judge, proxy = experiments.gao_fits([plain, *map(row, (2, 5, 10, 20, 40))])
    assert (judge["fit"], judge["score"], judge["points"]) == ("rm500-noisy", "eval/judge", 5)
    assert (judge["alpha"], judge["beta"], judge["r2"], judge["best_at_kl"]) == (0.5, 0.2, 1.0, 20)
    assert (proxy["alpha"], proxy["beta"], proxy["best_at_kl"]) == (1.5, -0.1, 40)


def test_what_stands_on_a_failed_job_is_not_run(experiments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiments, "PROGRAM", [sys.executable, "-c", STUB])
    jobs = [
        experiments.Job("broken", "fail"),
        experiments.Job("behind", "a", ("broken",)),
        experiments.Job("other", "a"),
    ]
    assert not experiments.execute(jobs, Path("runs/grid"), experiments.Machine(["cpu"]))
    assert Path("asked").read_text().split() == ["other"]
    told = capsys.readouterr().err
    assert "broken exit 3" in told and "behind" in told
    assert json.dumps(experiments.rows(jobs, Path("runs/grid"))).count("group") == 1
