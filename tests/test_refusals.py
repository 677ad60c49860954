"""Small faults told in one message: memory, models of others, keys without effect, names, a line left open."""

from __future__ import annotations

import builtins
import json
import pickle
import sys
from pathlib import Path

import pytest
import tiny
import torch

from peftlab.config import load_config
from peftlab.errors import LabError, UserError
from peftlab.models.backbone import load_backbone
from peftlab.recipes.reward import RewardConfig
from peftlab.rewards.parts import Reward, RewardPart
from peftlab.rewards.spec import terms
from peftlab.runs.atomic import read_rows
from peftlab.runs.checkpoint import whole_folder
from peftlab.runs.memory import full_memory
from peftlab.runs.progress import Progress, say, watched
from peftlab.runs.rundir import RunDir

CUDA = (  # as torch 2.13 words it
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 3.12 GiB is "
    "free. Including non-PyTorch memory, this process has 75.98 GiB memory in use. Of the allocated memory 70 GiB is "
    "allocated by PyTorch, and 5.10 GiB is reserved by PyTorch but unallocated."
)  # fmt: skip


def test_a_full_gpu_is_told_with_the_keys_that_fill_it(tmp_path):
    run = RunDir.create(tmp_path, "full", "sft", "accumulate = 1\nbatch_size = 64\nmax_length = 512\nlr = 1e-3\n")
    with pytest.raises(LabError) as told, run.session():
        raise torch.OutOfMemoryError(CUDA)
    said = str(told.value)
    assert said.startswith("out of memory with accumulate=1, batch_size=64, max_length=512: CUDA out of memory. Tried")
    assert "20.00 GiB" in said and "3.12 GiB is free" in said and "\n" not in said and "reserved" not in said
    assert said.endswith("raise accumulate: the same step in smaller parts, or lower batch_size, or lower max_length")
    assert json.loads((run.path / "summary.json").read_text())["reason"] == said


def test_the_cpus_allocator_and_pythons_are_heard_too_and_other_errors_pass(tmp_path):
    config = tmp_path / "config.toml"
    config.write_text("prompts_per_step = 8\nmax_new_tokens = 64\n")
    with pytest.raises(LabError, match=r"prompts_per_step=8.*allocate.*lower prompts_per_step"), full_memory(config):
        torch.empty(2**50)
    with pytest.raises(LabError, match="max_new_tokens=64"), full_memory(config):
        raise MemoryError
    with pytest.raises(RuntimeError, match="shapes"), full_memory(config):
        raise RuntimeError("shapes do not fit")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny.causal_folder(tmp_path_factory.mktemp("base") / "gpt2")


def changed(folder: Path, file: str, data: bytes) -> None:
    (folder / file).write_bytes(data)


def config_with(folder: Path, **facts: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | facts))


EVIL = "open('it-ran', 'w')\nclass Config: pass\nclass Model: pass\n"
CODE = {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}, "model_type": "evil"}
SPOILT = {
    "cut weights": lambda f: changed(f, "model.safetensors", (f / "model.safetensors").read_bytes()[:-9]),
    "a pickle": lambda f: changed(f, "model.safetensors", pickle.dumps({"a": 1})),
    "a torn tokenizer": lambda f: changed(f, "tokenizer.json", b"{"),
    "other sizes": lambda f: config_with(f, n_embd=64),
    "no such sizes": lambda f: config_with(f, n_head=5),
    "a layer that is not there": lambda f: config_with(f, n_layer=3),
    "an unknown type": lambda f: config_with(f, model_type="nothing"),
    "code of its own": lambda f: (changed(f, "evil.py", EVIL.encode()), config_with(f, **CODE)),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_base_that_cannot_be_read_is_one_message_and_asks_nothing(base, tmp_path, monkeypatch, what):
    """transformers would ask at the terminal whether to run a folder's code, and make up the weights that lack."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    folder = tmp_path / "model"
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    SPOILT[what](folder)
    with pytest.raises(UserError) as told:
        load_backbone(str(folder), device="cpu")
    assert str(folder) in str(told.value) and "\n" not in str(told.value) and len(str(told.value)) < 800
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize(
    ("pair", "told"),
    [
        ("std_weight=2", "std_weight: acts only where combine is mean-std"),
        ("combine=min", "combine: acts only where members is 2 or more"),
        ("centre=0.5", "centre: acts only where objective is pairwise"),
    ],
)
def test_a_key_that_would_do_nothing_is_refused(pair, told):
    pointwise = ["objective=pointwise"] if pair.startswith("centre") else []
    with pytest.raises(UserError, match=told):
        load_config(RewardConfig, None, [pair, *pointwise])
    load_config(RewardConfig, None, ["members=3", "combine=mean-std", "std_weight=2", "centre=0.5"])


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ('0.5*"runs/a+b/adapter" + rubric:length', [(0.5, "runs/a+b/adapter"), (1, "rubric:length")]),
        ("'x*y' + -2 * 'my runs/a + b'", [(1, "x*y"), (-2, "my runs/a + b")]),
        ("\"it's\"+b", [(1, "it's"), (1, "b")]),
    ],
)
def test_quotes_keep_a_name_together(line, parts):
    assert [(term.weight, term.name) for term in terms(line)] == parts


@pytest.mark.parametrize("line", ["a+", "+a", "a++b", '"a', "a*b", "x'y'", '""', "2*", "nan*a"])
def test_what_is_no_part_is_named(line):
    with pytest.raises(UserError, match="is no part; write NAME or WEIGHT"):
        terms(line)


@pytest.mark.parametrize("name", ["a\n", "", "a/b", "a b", "é", "x" * 65])
def test_a_parts_name_is_a_name_to_its_end(name):
    reward = Reward((RewardPart("part", lambda *_: {name: [1.0]}),))
    with pytest.raises(LabError, match="reward part"):
        reward(["p"], ["c"], [None])


def test_a_folder_of_weights_is_replaced_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "model"
    for text in ("first", "second"):
        with whole_folder(folder, marker="config.json") as place:
            (place / "config.json").write_text(text)
    with pytest.raises(RuntimeError), whole_folder(folder, marker="config.json") as place:
        (place / "config.json").write_text("third")
        raise RuntimeError("killed")
    assert (folder / "config.json").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_message_is_safe_and_a_run_that_ends_early_leaves_no_open_line(capsys, monkeypatch, tmp_path):
    say("name \x1b]0;owned\x07\u202e here")
    assert capsys.readouterr().err == "name  here\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "dumb")
    with watched("early", tmp_path):
        Progress(10).show(3, "loss 1.0")
    shown = capsys.readouterr().err
    assert shown.rstrip().endswith("step 3/10  loss 1.0") and shown.endswith("\n") and not Progress.open


def test_a_rejected_input_leaves_nothing_that_a_bare_resume_takes_up(tmp_path):
    from peftlab.recipes.launch import launch

    shop = {name: str(tmp_path / name) for name in ("gpt2", "texts", "texts_test")}
    for name in ("mine", "other"):
        with pytest.raises(UserError, match="no such folder"):
            launch("sft", None, tiny.overrides(shop, "sft"), tmp_path / "runs", name)
    assert list(read_rows(tmp_path / "runs/mine/metrics.jsonl")) == []
    with pytest.raises(UserError, match="no run of sft in .* can be resumed"):
        launch("sft", None, tiny.overrides(shop, "sft"), tmp_path / "runs", resume=True)


def test_a_refusal_that_cannot_be_withdrawn_is_still_the_error_that_is_told(tmp_path, monkeypatch):
    """The disk fails halfway, so that what is left is no run to report of."""
    from peftlab.recipes.launch import launch

    unlink = Path.unlink

    def fails(path, **given):
        if path.name == "summary.json" and path.exists():
            raise OSError(5, "Input/output error")
        unlink(path, **given)

    monkeypatch.setattr(Path, "unlink", fails)
    shop = {name: str(tmp_path / name) for name in ("gpt2", "texts", "texts_test")}
    with pytest.raises(UserError, match="no such folder"):
        launch("sft", None, tiny.overrides(shop, "sft"), tmp_path / "runs", "mine")
    assert (tmp_path / "runs/mine/summary.json").is_file() and not (tmp_path / "runs/mine/config.toml").exists()
