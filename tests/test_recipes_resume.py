"""A run that stopped and resumed is the run that never stopped, to the last bit."""

from __future__ import annotations

import itertools
import json
import os
import pkgutil
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch

from peftlab import cli
from peftlab.errors import Interrupted, LabError
from peftlab.recipes.launch import launch
from peftlab.runs.atomic import read_rows
from peftlab.runs.rundir import RunDir, vacant

# Six batches an epoch or ten, so that each stop below is in the middle of one; where there is dropout, it draws from
# the global generator.
LONG = {
    "sft": ["max_steps=16", "lora.dropout=0.1", "max_length=16", "train_limit=30", "save_every=6"],
    "classify": ["max_steps=16", "batch_size=4", "lora.dropout=0.1", "save_every=6"],
    "summarize": ["max_steps=16", "beams=1", "save_every=6"],
    "pretrain": ["max_steps=16", "max_length=16", "save_every=6"],
    "ppo": ["steps=6", "reward=gate:count", "kl_target=1.0", "critic=adapter", "gradients=bfloat16", "save_every=2"],
}
STOPS = {"sft": (3, 13), "classify": (3, 13), "summarize": (3, 13), "pretrain": (9,), "ppo": (1, 4, 6)}

# A reward that, once told to, holds the run in the middle of step 3 until the file `go` is there. Its first call is of
# an evaluation prompt, before the training.
GATE = '''
import os, time

calls = 0

def count(prompts, completions, records):
    global calls
    calls += 1
    if calls == 4 and os.environ.get("GATE"):
        open("waiting", "w").close()
        while not os.path.exists("go"):
            time.sleep(0.01)
    return [float(c.count("e")) for c in completions]
'''
SECONDS = 100  # far more than a run here takes; past it the test fails instead of hanging


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("resume")
    shop = tiny.workshop(root) | {"root": str(root)}
    (root / "gate.py").write_text(GATE)
    launch("classify", None, tiny.overrides(shop, "classify"), root, "judge")
    LONG["ppo"].append(f"judge={root / 'judge'}")
    return shop


@pytest.fixture(scope="module")
def whole(shop) -> dict[str, Path]:
    """The run of each recipe that nothing stopped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(shop["root"])
        for verb in LONG:
            go(shop, verb, Path(shop["root"]) / "whole")
    return {verb: Path(shop["root"]) / "whole" / verb for verb in LONG}


@pytest.fixture(autouse=True)
def at_home(shop, monkeypatch) -> None:
    """Rewards are looked up in the working directory."""
    monkeypatch.chdir(shop["root"])


def go(shop: dict[str, str], verb: str, runs: Path, resume: bool = False) -> dict:
    return launch(verb, None, tiny.overrides(shop, verb, *LONG[verb]), runs, verb, resume)


def weights(run: Path) -> bytes:
    return next(run.glob("*/*.safetensors")).read_bytes()


def logged(run: Path) -> list[dict[str, float]]:
    """The rows of metrics.jsonl without what depends on the clock."""
    rows = read_rows(run / "metrics.jsonl")
    return [{name: v for name, v in row.items() if not name.startswith("time")} for row in rows]


def assert_same(run: Path, whole: Path) -> None:
    assert weights(run) == weights(whole)
    assert logged(run) == logged(whole)
    names = [(row["step"], name) for row in logged(run) for name in row.keys() - {"step"}]
    assert len(names) == len(set(names))
    summary, expected = (json.loads((path / "summary.json").read_text()) for path in (run, whole))
    assert summary["status"] == "done"
    for key in ("metrics", "baseline", "intervals", "artifacts"):
        assert summary[key] == expected[key]


@pytest.mark.parametrize(("verb", "step"), [(verb, step) for verb, steps in STOPS.items() for step in steps])
def test_a_stopped_run_resumes_to_the_same_bits(shop, whole, tmp_path, monkeypatch, verb, step):
    asked = itertools.count(1)
    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "stop_requested", property(lambda _: signal.SIGTERM if next(asked) == step else None))
        with pytest.raises(Interrupted):
            go(shop, verb, tmp_path)
    run = tmp_path / verb
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["status"], summary["artifacts"]) == ("stopped", {})
    assert (run / "checkpoints" / f"step-{step:08d}").is_dir()
    assert not (run / "adapter").exists()
    assert (run / "report.html").is_file()
    torch.manual_seed(step)  # whatever the process drew before the resume does not matter
    resumed = go(shop, verb, tmp_path, resume=True)
    assert_same(run, whole[verb])
    assert resumed["time"]["step_s"] != 0, "where no step was left, none took a time"


@pytest.mark.parametrize("verb", LONG)
def test_a_run_that_broke_resumes_from_its_newest_checkpoint(shop, whole, tmp_path, monkeypatch, verb):
    """Steps past the checkpoint were logged already; the resume drops them and makes them again."""
    last, keep = (5, 4) if verb == "ppo" else (9, 6)
    log = RunDir.log

    def broken(self, metrics, step):
        log(self, metrics, step)
        if step == last:
            raise LabError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "log", broken)
        with pytest.raises(LabError, match="disk"):
            go(shop, verb, tmp_path)
    run = tmp_path / verb
    assert json.loads((run / "summary.json").read_text())["status"] == "failed"
    assert max(row["step"] for row in logged(run)) == last
    newest = run / "checkpoints" / f"step-{keep:08d}"
    assert newest.is_dir()
    go(shop, verb, tmp_path, resume=True)
    assert_same(run, whole[verb])


@pytest.mark.parametrize(
    ("verb", "place", "saved"),
    [
        ("sft", "peftlab.evaluation.perplexity.token_logprobs", []),
        ("sft", "peftlab.evaluation.perplexity.token_logprobs", ["step-00000012", "step-00000016"]),
        ("summarize", "peftlab.evaluation.targets.token_logprobs", []),
        ("ppo", "peftlab.recipes.rl_common._score_two", []),
        ("ppo", "peftlab.evaluation.policy.token_logprobs", ["step-00000004", "step-00000006"]),
    ],
)
def test_a_stop_while_a_model_is_measured_is_obeyed_at_the_next_batch(
    shop, whole, tmp_path, monkeypatch, capfd, verb, place, saved
):
    """Before the steps none is made for it; behind them the last one's checkpoint is there."""
    run, measured, batches = tmp_path / verb, pkgutil.resolve_name(place.rpartition(".")[0]), []
    work = getattr(measured, place.rpartition(".")[2])

    def signalled(*given):
        if sorted(path.name for path in (run / "checkpoints").glob("step-*")) == saved:
            batches.append(given)
            if len(batches) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
        return work(*given)

    with monkeypatch.context() as patch:
        patch.setattr(place, signalled)
        with pytest.raises(Interrupted):
            go(shop, verb, tmp_path)
    assert len(batches) == 1
    assert "stopping in a moment; nothing that was learned is lost; a second signal leaves" in capfd.readouterr().err
    assert json.loads((run / "summary.json").read_text())["status"] == "stopped"
    assert sorted(path.name for path in (run / "checkpoints").glob("*")) == saved
    if not (saved or (run / "metrics.jsonl").exists()):
        assert vacant(run), "the command may be typed again as it was, too"
    go(shop, verb, tmp_path, resume=True)
    assert_same(run, whole[verb])


def stop_at(step: int, shop: dict[str, str], verb: str, root: Path, monkeypatch) -> None:
    """A run that a signal stops after `step`."""
    asked = itertools.count(1)
    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "stop_requested", property(lambda _: signal.SIGINT if next(asked) == step else None))
        with pytest.raises(Interrupted):
            go(shop, verb, root)


@pytest.mark.parametrize("verb", ["sft", "ppo"])
def test_a_spoilt_checkpoint_is_passed_over(shop, whole, tmp_path, monkeypatch, verb):
    step = 5 if verb == "ppo" else 9
    stop_at(step, shop, verb, tmp_path, monkeypatch)
    run = tmp_path / verb
    state = max((run / "checkpoints" / f"step-{step:08d}").rglob("*.*"), key=lambda path: path.stat().st_size)
    state.write_bytes(state.read_bytes()[:-1])
    go(shop, verb, tmp_path, resume=True)
    assert [row["kind"] for row in read_rows(run / "events.jsonl")].count("checkpoint_skipped") == 1
    assert_same(run, whole[verb])


@pytest.mark.parametrize("verb", ["sft", "ppo"])
def test_a_stop_at_the_last_step_loses_nothing(shop, whole, tmp_path, monkeypatch, verb):
    last = 6 if verb == "ppo" else 16
    stop_at(last, shop, verb, tmp_path, monkeypatch)
    go(shop, verb, tmp_path, resume=True)
    assert_same(tmp_path / verb, whole[verb])


def test_a_finished_run_is_left_as_it_is(shop, whole, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole["sft"].rglob("*.safetensors")}
    summary = go(shop, "sft", whole["sft"].parent, resume=True)
    assert summary["status"] == "done"
    assert "nothing to resume" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in whole["sft"].rglob("*.safetensors")} == before


def test_signals_stop_a_real_process_and_resume_finishes(shop, whole, tmp_path, monkeypatch, capsys):
    """The whole path through the command line: 130 for SIGINT, 143 for SIGTERM, then --resume to the same bits."""
    processes = {number: command(shop, tmp_path / number.name) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, process in processes.items():
        wait_for(tmp_path / number.name / "waiting", process)
        process.send_signal(number)
        (tmp_path / number.name / "go").touch()
    for number, process in processes.items():
        _, errors = process.communicate(timeout=SECONDS)
        assert process.returncode == 128 + number, errors
        *_, said, line = errors.rstrip().splitlines()
        assert said == f"peftlab: stopped by {number.name}; this continues the run:"
        program, *words = shlex.split(line)
        assert (program, words) == ("peftlab", [*arguments(shop), "--resume"])
        assert "Traceback" not in errors
        run = tmp_path / number.name / "runs" / "ppo"
        assert json.loads((run / "summary.json").read_text())["status"] == "stopped"
        assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step-00000002", "step-00000003"]
        capsys.readouterr()
        monkeypatch.chdir(tmp_path / number.name)
        cli.app([*words, "--json"], standalone_mode=False)
        assert json.loads(capsys.readouterr().out) == json.loads((run / "summary.json").read_text())
        assert_same(run, whole["ppo"])


def arguments(shop: dict[str, str]) -> list[str]:
    return ["ppo", *tiny.overrides(shop, "ppo", *LONG["ppo"]), "--run", "ppo"]


def command(shop: dict[str, str], folder: Path) -> subprocess.Popen[str]:
    """`peftlab ppo` in a process of its own, in `folder`, with the gate closed."""
    folder.mkdir()
    (folder / "gate.py").write_text(GATE)
    return subprocess.Popen(
        [sys.executable, "-m", "peftlab.cli", *arguments(shop)],
        cwd=folder, env={**os.environ, "GATE": "1", "OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )


def wait_for(file: Path, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + SECONDS
    while not file.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, "the run never reached its third step"
        time.sleep(0.02)
