"""Two processes make the run of one: the same figures, the same weights up to the order of sums, one writer."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rank_group
import torch
from commands import peftlab
from rank_group import DROPPED, GATE, MORE, POLICY, SECONDS, free_port, launched, pairs, started, two
from safetensors.torch import load_file

from peftlab.recipes import RECIPES
from peftlab.recipes.launch import launch
from peftlab.runs.atomic import read_rows

pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = 1e-4  # of weights up to 1 after 9 updates at lr 1e-3; 8e-6 at most was measured


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> dict[str, str]:
    return rank_group.workshop(tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def runs(shop) -> tuple[Path, Path, list[str]]:
    """Folders of the runs in two processes and in one, and what the processes printed."""
    root = Path(shop["root"])
    jobs: list[dict[str, Any]] = [{"verb": verb, "pairs": pairs(shop, verb), "run": verb} for verb in MORE]
    jobs += [{"verb": "sft", "pairs": pairs(shop, "sft", DROPPED), "run": "dropped"}]
    jobs += [jobs[-1] | {"run": "stopped", "stop": 5}, jobs[-1] | {"run": "stopped", "resume": True}]
    jobs += [{"verb": "sft", "pairs": pairs(shop, "sft"), "run": "apart", "last": ["lr=5e-2", "seed=1"]}]
    for name in ("early", "broken"):
        jobs += [{"verb": "ppo", "pairs": pairs(shop, "ppo", [*POLICY, f"reward=rank_gate:{name}"]), "run": name}]
    (root / "jobs.json").write_text(json.dumps(jobs))
    ended = two(root, str(Path(__file__).with_name("rank_jobs.py")), str(root / "jobs.json"))
    assert [code for code, *_ in ended] == [0, 0], ended
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)  # where the reward is
        for verb in MORE:
            launch(verb, None, pairs(shop, verb), root / "alone", verb)
    return root / "runs", root / "alone", [out for _, out, _ in ended]


def logged(run: Path) -> list[dict[str, float]]:
    rows = read_rows(run / "metrics.jsonl")
    return [{name: v for name, v in row.items() if not name.startswith("time")} for row in rows]


def weights(run: Path) -> dict[str, torch.Tensor]:
    files = sorted(file for file in run.glob("*/*.safetensors"))
    return {f"{file.name} {name}": value.float() for file in files for name, value in load_file(file).items()}


def test_every_recipe_is_among_them():
    assert set(MORE) == set(RECIPES)


@pytest.mark.parametrize("verb", MORE)
def test_two_processes_make_the_run_of_one(runs, verb):
    several, alone = runs[0] / verb, runs[1] / verb
    ends = weights(several), weights(alone)
    assert ends[0] and ends[0].keys() == ends[1].keys()
    for name, value in ends[1].items():
        assert ends[0][name].numpy() == pytest.approx(value.numpy(), abs=TOLERANCE), name
    rows = logged(several), logged(alone)
    assert [row.keys() for row in rows[0]] == [row.keys() for row in rows[1]]
    for mine, theirs in zip(*rows, strict=True):
        clipped = [row.pop("policy/clip_fraction", 0.0) for row in (mine, theirs)]
        assert mine == pytest.approx(theirs, rel=TOLERANCE, abs=TOLERANCE)
        # A count of tokens: one whose advantage is 0 but for rounding, as in a group of equal rewards, may fall in it.
        assert clipped[0] == pytest.approx(clipped[1], abs=0.01)
    for name in ("samples.jsonl", "rollouts.jsonl"):
        texts = [[row.get("completion") for row in read_rows(run / name)] for run in (several, alone)]
        assert texts[0] == texts[1]


@pytest.mark.parametrize("verb", MORE)
def test_one_process_writes(runs, verb):
    run = runs[0] / verb
    assert [row["kind"] for row in read_rows(run / "events.jsonl") if row["kind"] in ("start", "finish")] == [
        "start", "finish"
    ]
    assert json.loads((run / "environment.json").read_text())["processes"] == 2
    names = [(row["step"], name) for row in logged(run) for name in row.keys() - {"step"}]
    assert len(names) == len(set(names))
    assert (run / "report.html").is_file()


def test_a_stop_of_one_process_stops_both_and_the_resume_gives_the_same_bytes(runs):
    stopped, whole = runs[0] / "stopped", runs[0] / "dropped"
    for said in runs[2]:
        assert "stopped: Interrupted: stopped by SIGTERM; this, launched in 2 processes again, continues" in said
    assert [row["kind"] for row in read_rows(stopped / "events.jsonl")].count("resume") == 1
    assert logged(stopped) == logged(whole)
    for name in ("adapter_model.safetensors", "stack.json"):
        assert (stopped / "adapter" / name).read_bytes() == (whole / "adapter" / name).read_bytes()


def test_what_fails_in_one_process_ends_both(runs):
    summary = json.loads((runs[0] / "broken" / "summary.json").read_text())
    assert summary["status"] == "failed"
    told = "reward rank_gate:broken: rank_gate.py, line 23: ValueError: no reward today; the weights were not updated"
    assert summary["reason"] == f"step 1: process 1: {told}"
    assert [said.splitlines()[-1] for said in runs[2]] == [
        f"broken: LabError: {summary['reason']}", f"broken: LabError: step 1: {told}"
    ]


def test_what_fails_in_one_process_before_the_training_ends_both_with_its_reason(runs):
    told = "reward rank_gate:early: rank_gate.py, line 18: ValueError: no label"
    assert json.loads((runs[0] / "early" / "summary.json").read_text())["reason"] == f"process 1: {told}"
    assert f"early: LabError: {told}" in runs[2][1].splitlines()


def test_a_launcher_that_is_told_to_end_leaves_a_run_that_resumes(shop, runs, tmp_path):
    (tmp_path / "rank_gate.py").write_text(GATE)
    line = ["-m", "peftlab.cli", "ppo", *pairs(shop, "ppo"), "--run", "ppo"]
    begin = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
             "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(free_port())]
    said = tmp_path / "said"
    env = os.environ | {"GATE": "1", "OMP_NUM_THREADS": "1"}
    with said.open("w") as file, started(tmp_path, *begin, *line, env=env, stderr=file) as launcher:

        def wait_for(fact: Callable[[], bool], words: str) -> None:
            end = time.monotonic() + SECONDS
            while not fact():
                assert launcher.poll() is None and time.monotonic() < end, f"never {words}: {said.read_text()}"
                time.sleep(0.02)

        wait_for(lambda: all((tmp_path / f"waiting{n}").exists() for n in range(2)), "reached the third step")
        launcher.send_signal(signal.SIGTERM)
        wait_for(lambda: "stopping after this step" in said.read_text(), "handed the signal on")
        (tmp_path / "go").touch()
        launcher.communicate(timeout=SECONDS)
    errors = said.read_text()
    assert errors.count("peftlab: stopped by SIGTERM; this, launched in 2 processes again, continues the run:") == 1
    run = tmp_path / "runs" / "ppo"
    assert json.loads((run / "summary.json").read_text())["status"] == "stopped"
    assert max(row["step"] for row in logged(run)) < 4
    ended = two(tmp_path, *line, "--resume", "--quiet")
    assert [code for code, *_ in ended] == [0, 0], ended
    assert ended[1][1:] == ("", "")
    whole = runs[0] / "ppo"
    assert logged(run) == logged(whole)
    assert (run / "adapter/adapter_model.safetensors").read_bytes() == (
        whole / "adapter/adapter_model.safetensors"
    ).read_bytes()


FAILS = """
from peftlab import cli
from peftlab.errors import LabError
from peftlab.ops import ranks
from peftlab.recipes.several import joined

def app():
    with joined("cpu"):
        if ranks.rank() == 1:
            raise LabError("the reason")
        ranks.objects(None)

cli.app = app
cli.main()
"""


def test_the_process_that_knows_why_it_ended_is_the_one_that_says_it(tmp_path):
    (tmp_path / "fails.py").write_text(FAILS)
    code, said = launched(tmp_path, "fails.py")
    assert code == 1
    assert "process 1: peftlab: the reason\n" in said
    assert "another of the 2 processes" not in said


def test_another_number_of_processes_is_refused(shop, runs, monkeypatch):
    monkeypatch.chdir(shop["root"])
    outcome = peftlab(f"sft {' '.join(pairs(shop, 'sft'))} --run sft --resume")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == (
        "peftlab: cannot resume run 'sft' in 1 process: it began in 2; launch as many, or choose another --run\n"
    )


def test_processes_launched_with_different_jobs_are_refused_with_the_keys_that_differ(runs):
    for said in runs[2]:
        assert (
            "apart: UserError: the processes were launched with different jobs: lr (0.001 in process 0, 0.05 in "
            "process 1), seed (0 in process 0, 1 in process 1)"
        ) in said.splitlines()
    assert not (runs[0] / "apart").exists()
