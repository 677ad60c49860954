"""SIGKILL at random points of real runs, and two runs of one seed. See benchmarks/faults.py for the many."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from peftlab.errors import LabError
from peftlab.recipes import RECIPES, load
from peftlab.recipes.launch import launch
from peftlab.runs.atomic import read_rows
from peftlab.runs.rundir import RunDir

ROOT = Path(__file__).resolve().parent.parent
REWARD = "def count_e(prompts, completions, records):\n    return [float(c.count('e')) for c in completions]\n"

pytestmark = pytest.mark.usefixtures("one_thread")


def harness(*words: str) -> tuple[int, str]:
    """Exit code and output of benchmarks/faults.py: a process of its own, since one that has computed must not fork."""
    command = [sys.executable, str(ROOT / "benchmarks" / "faults.py"), *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)
    return done.returncode, done.stdout


def test_runs_killed_at_random_points_end_as_if_nothing_had_met_them():
    code, output = harness("--kills", "20", "--seed", "1", "--programs", "3")
    tally = json.loads(output.splitlines()[-1])
    assert tally == {"kills": 20, "hit": 20, "identical": 20, "different": 0, "unresumable": 0}, output
    assert code == 0
    assert output.count("as a program") == 3


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("twice")
    shop = tiny.workshop(root) | {"root": str(root)}
    (root / "twice_rewards.py").write_text(REWARD)
    launch("classify", None, tiny.overrides(shop, "classify"), root, "judge")
    return shop


def go(shop: dict[str, str], verb: str, runs: str, resume: bool = False) -> Path:
    """The folder of a run with seed 7."""
    fields = load(verb).CONFIG.model_fields
    pairs = ["reward=twice_rewards:count_e"] if "steps" in fields else []
    pairs += [f"judge={shop['root']}/judge"] if "judge" in fields else []
    launch(verb, None, tiny.overrides(shop, verb, "seed=7", *pairs), Path(shop["root"]) / runs, verb, resume)
    return Path(shop["root"]) / runs / verb


def left(run: Path) -> dict[str, object]:
    """All files of adapter or model but the card, samples, and each logged figure that is not a time."""
    files = [p for part in ("adapter", "model") for p in (run / part).rglob("*") if p.is_file() and p.suffix != ".md"]
    figures = [
        {name: value for name, value in row.items() if not name.startswith("time")}
        for row in read_rows(run / "metrics.jsonl")
    ]
    samples = [row for name in ("samples", "rollouts") for row in read_rows(run / f"{name}.jsonl")]
    assert files and figures
    return {str(p.relative_to(run)): p.read_bytes() for p in files} | {"figures": figures, "samples": samples}


@pytest.mark.parametrize("verb", RECIPES)
def test_two_runs_of_one_seed_are_one(shop, monkeypatch, verb):
    monkeypatch.chdir(shop["root"])
    first, second = left(go(shop, verb, "first")), left(go(shop, verb, "second"))
    assert first == second
    if config := first.get("adapter/adapter_config.json"):  # a set's order would be that of this process
        targets = json.loads(config).get("target_modules") or []
        assert targets == sorted(targets)


@pytest.mark.parametrize("verb", RECIPES)
def test_a_run_that_broke_after_its_last_figures_tells_them_once(shop, monkeypatch, verb):
    monkeypatch.chdir(shop["root"])

    def broken(self, metrics, baseline, *args, status="done", **kwargs):
        if status == "done":
            raise LabError("broken")
        return finish(self, metrics, baseline, *args, status=status, **kwargs)

    finish = RunDir.finish
    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "finish", broken)
        with pytest.raises(LabError, match="broken"):
            go(shop, verb, "third")
    assert left(go(shop, verb, "third", resume=True)) == left(go(shop, verb, "whole"))
