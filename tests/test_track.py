"""Figures of a run in other tools: TensorBoard's own reader judges what was written; a stand-in plays trackio."""

from __future__ import annotations

import json
import math
import sys
import threading
import types

import pytest
from commands import peftlab
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from peftlab.errors import UserError
from peftlab.runs import track as tracking
from peftlab.runs.rundir import RunDir
from peftlab.runs.track import track


@pytest.fixture
def run(tmp_path):
    """A run that is done: two rows, one of them with a figure that was not finite, and a figure of the end."""
    made = RunDir.create(tmp_path / "runs", "mine", "ppo", 'recipe = "ppo"\nlr = 0.5\n\n[lora]\nr = 4\n')
    with made.session():
        made.log({"reward/mean": 0.25, "kl/reference": 0.0}, 1)
        made.log({"reward/mean": 0.75, "kl/reference": math.nan}, 2)
        made.finish({"eval/judge": 0.875, "reward/mean": 0.75}, {}, {}, {}, 1.0)
    return made.path


def series(folder):
    """{tag: [(step, value), ...]} as TensorBoard reads the folder."""
    read = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    read.Reload()
    return {
        tag: [(event.step, float(event.tensor_proto.float_val[0])) for event in read.Tensors(tag)]
        for tag in read.Tags()["tensors"]
    }


WANTED = {"reward/mean": [(1, 0.25), (2, 0.75)], "kl/reference": [(1, 0.0)], "eval/judge": [(2, 0.875)]}


def test_tensorboard_reads_every_finite_figure_once_however_often_it_is_tracked(run, tmp_path):
    for _ in range(2):
        rows, shown = track(run, "tensorboard", tmp_path / "board")
    assert (rows, shown) == (2, f"tensorboard --logdir {tmp_path / 'board'}")
    assert series(tmp_path / "board") == WANTED


def test_following_goes_on_until_the_run_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "POLL_S", 0.01)
    made = RunDir.create(tmp_path / "runs", "long", "ppo", 'recipe = "ppo"\n')
    found = []
    with made.session():
        made.log({"reward/mean": 0.25}, 1)
        follower = threading.Thread(
            target=lambda: found.append(track(made.path, "tensorboard", tmp_path / "board", follow=True))
        )
        follower.start()
        made.log({"reward/mean": 0.5}, 2)
        assert follower.is_alive()
        made.finish({"reward/mean": 0.5}, {}, {}, {}, 1.0)
    follower.join(60)
    assert found[0][0] == 2 and series(tmp_path / "board") == {"reward/mean": [(1, 0.25), (2, 0.5)]}


def test_trackio_is_given_config_rows_and_the_end(run, monkeypatch):
    given = []
    library = types.ModuleType("trackio")
    library.init = lambda **about: given.append(about)
    library.log = lambda figures, step: given.append((step, figures))
    library.finish = lambda: given.append("finished")
    monkeypatch.setitem(sys.modules, "trackio", library)
    assert track(run, "trackio") == (2, "trackio show --project peftlab")
    assert given == [
        {"project": "peftlab", "name": "mine", "config": {"recipe": "ppo", "lr": 0.5, "lora.r": 4}},
        (1, {"reward/mean": 0.25, "kl/reference": 0.0}),
        (2, {"reward/mean": 0.75}),
        (2, {"eval/judge": 0.875}),
        "finished",
    ]
    with pytest.raises(UserError, match="TRACKIO_DIR"):
        track(run, "trackio", run)


def test_what_is_not_there_is_one_message(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "trackio", None)
    for words, said in {
        "mine --to trackio": "pip install trackio",
        "mine --to wandb": "tensorboard, trackio",
        "none --to tensorboard": "none",
    }.items():
        outcome = peftlab(f"runs track {words}")
        assert outcome.code == 2 and said in outcome.err and "Traceback" not in outcome.err
    outcome = peftlab("runs track mine --to tensorboard")
    assert outcome.code == 0 and "2 rows of mine" in outcome.out
    assert series(tmp_path / "tensorboard" / "mine") == WANTED
    assert json.loads((run / "summary.json").read_text())["status"] == "done"
