"""What processes that were launched together refuse, each in one message, and who shows a dry run."""

from __future__ import annotations

import json

import pytest
import rank_group
from commands import peftlab
from rank_group import group, pairs

from peftlab.data.sources import RecordSet
from peftlab.errors import UserError
from peftlab.ops import ranks
from peftlab.recipes.common import note_data, note_model
from peftlab.recipes.several import require_same_job
from peftlab.runs.rundir import RunDir

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> dict[str, str]:
    return rank_group.workshop(tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("sft batch_size=5", "batch_size: 5 cannot be shared evenly by 2 processes; give a multiple of 2"),
        ("sft batch_size=8 accumulate=8", "batch_size: 8 in 8 parts cannot be shared evenly by 2 processes; give a "
         "multiple of 16"),
        ("ppo prompts_per_step=7", "prompts_per_step: 7 cannot be shared evenly by 2 processes; give a multiple of 2"),
        ("ppo prompts_per_step=7 --dry-run", "prompts_per_step: 7 cannot be shared evenly by 2 processes; give a "
         "multiple of 2"),
        ("ppo device=mps", "device: "),
        ("demo", "demo: runs in one process; "),
    ],
)
def test_what_two_processes_cannot_do_is_refused(line, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in group(0).items():
        monkeypatch.setenv(name, value)
    outcome = peftlab(line)
    assert outcome.code == 2
    assert outcome.err.startswith(f"peftlab: {message}")
    assert not (tmp_path / "runs").exists()


def test_a_config_that_parts_the_model_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in group(0, ACCELERATE_USE_FSDP="true").items():
        monkeypatch.setenv(name, value)
    outcome = peftlab("sft")
    assert outcome.code == 2
    assert outcome.err.startswith("peftlab: accelerate is configured for FSDP, which parts a model")


@pytest.mark.parametrize("line", ["sft", "models"])
@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"WORLD_SIZE": ""}, "WORLD_SIZE: '' is no number; a launcher sets it, so unset it without one"),
        ({"RANK": "-1"}, "RANK: '-1' is no number"),
        ({"LOCAL_RANK": "one"}, "LOCAL_RANK: 'one' is no number"),
        ({"RANK": "5"}, "RANK: 5 is none of the 2 processes that WORLD_SIZE tells of; the first is 0"),
        ({"WORLD_SIZE": "0"}, "RANK: 0 is none of the 0 processes"),
    ],
)
def test_what_no_launcher_tells_is_refused_in_one_line(line, told, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name, value in group(0, **told).items():
        monkeypatch.setenv(name, value)
    outcome = peftlab(line)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith(f"peftlab: {message}") and outcome.err.count("\n") == 1


@pytest.mark.parametrize(("name", "value"), [("MASTER_ADDR", None), ("MASTER_PORT", "no port")])
def test_processes_that_cannot_meet_are_told_where(name, value, shop, monkeypatch):
    monkeypatch.chdir(shop["root"])
    for key, told in group(0, MASTER_PORT="1").items():
        monkeypatch.setenv(key, told)
    monkeypatch.delenv(name)
    if value:
        monkeypatch.setenv(name, value)
    outcome = peftlab(f"sft {' '.join(pairs(shop, 'sft'))}")
    assert (outcome.code, outcome.out) == (2, "")
    place = f"({name} is not set):1" if value is None else f"127.0.0.1:{value}"
    assert outcome.err.startswith(f"peftlab: the processes cannot meet at {place}: ValueError: ")


def test_a_run_that_one_process_names_otherwise_is_refused(monkeypatch):
    monkeypatch.setattr(ranks, "objects", lambda mine: [mine, (mine[0], mine[1] | {"--run": "b", "--resume": True})])
    with pytest.raises(UserError, match=r"jobs: --run \('a' in process 0, 'b' in process 1\), --resume \(False in pro"):
        require_same_job("sft", "lr = 1.0", "a", False)


def test_data_and_models_that_differ_between_processes_are_refused(monkeypatch, tmp_path):
    run = RunDir.create(tmp_path, "run", "sft", "")
    monkeypatch.setattr(ranks, "objects", lambda mine: [mine, "f" * 64])
    data = RecordSet([], "mine.jsonl", "a" * 64)
    with pytest.raises(UserError, match=r"^data 'mine.jsonl' is not .* \(sha256 a{12} in process 0, f{12} in pro"):
        note_data(run, data, 0)
    with pytest.raises(UserError, match="^model tiny-gpt2 is not the same for all processes"):
        note_model(run, "model", "tiny-gpt2", "b" * 64)
    monkeypatch.setattr(ranks, "objects", lambda mine: [mine, mine])
    note_data(run, data, 0)
    assert json.loads((run.path / "environment.json").read_text())["data"]["mine.jsonl"]["sha256"] == "a" * 64


def test_the_first_process_shows_a_dry_run(shop, monkeypatch):
    monkeypatch.chdir(shop["root"])
    line = f"sft {' '.join(pairs(shop, 'sft'))} --dry-run"
    shown = []
    for number in range(2):
        for name, value in group(number).items():
            monkeypatch.setenv(name, value)
        shown.append(peftlab(line))
    assert [outcome.code for outcome in shown] == [0, 0]
    assert "batch_size = 4" in shown[0].out and shown[1].out == ""
