"""Two processes make the run of one: the same figures, the same weights up to the order of sums, one writer."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
from commands import peftlab
from safetensors.torch import load_file

from peftlab.data.sources import RecordSet
from peftlab.errors import Interrupted, LabError, UserError
from peftlab.models.adapters import Lora
from peftlab.models.backbone import Backbone, fingerprint
from peftlab.models.roles import Roles
from peftlab.ops import ranks
from peftlab.recipes import RECIPES
from peftlab.recipes.common import note_data, note_model
from peftlab.recipes.launch import launch
from peftlab.recipes.several import joined, require_same_job
from peftlab.rl.control import FixedKL
from peftlab.rl.gather import gathered, require_same_weights
from peftlab.rl.ppo import PPOSettings, PPOTrainer
from peftlab.rl.rollout import PromptBatch
from peftlab.runs.atomic import read_rows
from peftlab.runs.launched import PeersLost
from peftlab.runs.rundir import RunDir
from peftlab.runs.signals import StopSignals
from peftlab.sampling.sampler import Decoding, Sampler

pytestmark = pytest.mark.usefixtures("one_thread")

# An epoch has a short last batch, of fewer rows than there are processes where it has one row. Prompts are whole, so
# that the two processes pad to different widths. No dropout: each process would draw masks of its own.
SUPERVISED = ["batch_size=8", "max_steps=9", "lr=1e-3"]
POLICY = ["task=custom", "reward=rank_gate:count", "steps=4", "kl_target=1.0", "save_every=2"]
MORE = {
    "pretrain": [*SUPERVISED, "dropout=0"],
    "sft": [*SUPERVISED, "max_length=16", "train_limit=30", "batch_size=4"],
    "classify": [*SUPERVISED, "model={plain_encoder}"],
    "summarize": [*SUPERVISED, "accumulate=2"],
    "reward": [*SUPERVISED, "batch_size=6"],
    "dpo": [*SUPERVISED, "task=custom", "train_limit=17"],
    "ppo": [*POLICY, "critic=adapter", "prompts_per_step=10"],
    "rloo": [*POLICY, "prompts_per_step=4", "minibatch_size=6", "epochs=2"],
}
DROPPED = [*MORE["sft"], "lora.dropout=0.1"]  # the generators of both processes are in the checkpoint
TOLERANCE = 1e-4  # of weights up to 1 after 9 updates at lr 1e-3; 8e-6 at most was measured
SECONDS = 100

# Told to, it holds the run in the middle of a step until the file `go` is there, or fails in the second process.
GATE = '''
import os, time

calls = 0

def count(prompts, completions, records):
    global calls
    calls += 1
    if calls > 3 and os.environ.get("GATE"):
        open("waiting" + os.environ["RANK"], "w").close()
        end = time.monotonic() + 100
        while not os.path.exists("go") and time.monotonic() < end:
            time.sleep(0.01)
    return [float(c.count("e")) for c in completions]

def early(prompts, completions, records):
    if len(completions) == 1 and os.environ["RANK"] == "1":
        raise ValueError("no label")
    return [0.0] * len(completions)

def broken(prompts, completions, records):
    if len(completions) == 4 and os.environ["RANK"] == "1":
        raise ValueError("no reward today")
    return [0.0] * len(completions)
'''


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("ranks")
    shop = tiny.workshop(root) | {"root": str(root)}
    plain = tiny.encoder_folder(root / "plain-encoder")
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(config | {"seq_classif_dropout": 0.0}))
    (root / "rank_gate.py").write_text(GATE)
    return shop | {"plain_encoder": str(plain)}


def pairs(shop: dict[str, str], verb: str, more: list[str] | None = None) -> list[str]:
    return tiny.overrides(shop, verb, *(pair.format(**shop) for pair in more or MORE[verb]))


def free_port() -> int:
    """Picked just before it is used: another program may take it meanwhile."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def group(number: int, **more: str) -> dict[str, str]:
    """The environment that torchrun gives a process."""
    told = {"MASTER_ADDR": "127.0.0.1", "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2"}
    return os.environ | {"OMP_NUM_THREADS": "1"} | told | more


def two(folder: Path, *words: str, **more: str) -> list[tuple[int, str, str]]:
    """`python WORDS` in two processes; of each the exit code and what it said."""
    more = {"MASTER_PORT": str(free_port())} | more
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(started(folder, *words, env=group(number, **more), stderr=subprocess.PIPE))
            for number in range(2)
        ]
        said = [process.communicate(timeout=SECONDS) for process in processes]
    return [(process.returncode, *words) for process, words in zip(processes, said, strict=True)]


@contextlib.contextmanager
def started(folder: Path, *words: str, **given: Any) -> Iterator[subprocess.Popen[str]]:
    """`python WORDS`, which does not outlive the block."""
    with subprocess.Popen([sys.executable, *words], cwd=folder, text=True, stdout=subprocess.PIPE, **given) as process:
        try:
            yield process
        finally:
            process.kill()


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


def launched(folder: Path, *words: str) -> tuple[int, str]:
    """`python WORDS` in two processes of torchrun: its exit code and all that was said."""
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    done = subprocess.run([*run, *words], cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
                          capture_output=True, timeout=SECONDS)
    return done.returncode, done.stdout + done.stderr


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


def test_alone_nothing_is_shared():
    figures = [torch.tensor([1.0, 2.0])]
    ranks.add_up(figures)
    assert figures[0].tolist() == [1.0, 2.0]
    assert (ranks.size(), ranks.rank(), ranks.share(5), ranks.objects("x")) == (1, 0, range(5), ["x"])
    assert (ranks.agreed(None), ranks.agreed(15)) == (None, 15)


def ppo(tiny_causal) -> PPOTrainer:
    """PPO on a random model, whose reward is the length of a completion."""
    model, tokenizer = tiny_causal("gpt2")
    roles = Roles(Backbone("tiny", model, tokenizer, fingerprint(model)), Lora(r=2, alpha=2))

    def length(prompts, completions, records):
        return torch.tensor([float(len(text)) for text in completions]), {}

    return PPOTrainer(roles, Sampler(roles.twin, tokenizer), length, FixedKL(0.01), PPOSettings(), Decoding(4))


def prompts(count: int) -> PromptBatch:
    return PromptBatch([[3, 4]] * count, ["x"] * count, [None] * count)


@pytest.mark.parametrize(("theirs", "broken"), [([math.nan, 0.0], "first_kl"), ([0.0, math.nan], "first_ratio_error")])
def test_a_first_step_that_is_not_a_number_elsewhere_stops_this_process_too(tiny_causal, monkeypatch, theirs, broken):
    trainer = ppo(tiny_causal)
    rollout = trainer.collect(prompts(4))
    monkeypatch.setattr(ranks, "objects", lambda mine: [mine, theirs])
    with pytest.raises(LabError, match=f"{broken} is nan"):
        trainer.check_first(rollout)


GONE = RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234")


@pytest.fixture
def member(monkeypatch) -> Callable[..., None]:
    """Makes this process one of two that have met, with torch's own part faked: member(rank, objects)."""

    def join(number: int, objects: Callable[[Any], list[Any]]) -> None:
        for name, value in group(number).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(dist, "init_process_group", lambda backend: None)
        monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
        monkeypatch.setattr(ranks, "size", lambda: 2)
        monkeypatch.setattr(ranks, "rank", lambda: number)
        monkeypatch.setattr(ranks, "objects", objects)

    return join


def lost(mine: Any) -> list[Any]:
    raise GONE


def test_a_process_lost_outside_a_session_is_told_in_one_line_with_what_torch_said(member):
    member(0, lost)
    said = r"^another of the 2 .*\(RuntimeError: .*Connection closed"
    with pytest.raises(PeersLost, match=said) as end, joined("cpu"):
        ranks.objects(None)
    assert "\n" not in str(end.value)


def test_a_process_lost_when_all_leave_leaves_a_run_that_is_done(member, capsys):
    member(0, lost)
    with joined("cpu"):
        pass
    assert capsys.readouterr().err == "another of the 2 processes ended too early; the work of this one is done\n"
    with pytest.raises(Interrupted), joined("cpu"):
        raise Interrupted(signal.SIGTERM)


def test_no_signal_that_comes_late_takes_a_process_from_the_first_one(member):
    """A process that heeded them would end, and with it this test."""
    heard = []

    def leaving(mine: Any) -> list[Any]:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        heard.append("left")
        return [mine, mine]

    member(1, leaving)
    with joined("cpu"), StopSignals() as session:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert session.requested == signal.SIGTERM
    assert heard == ["left"]


def test_a_signal_before_the_session_stops_the_session():
    with StopSignals() as outer:
        os.kill(os.getpid(), signal.SIGTERM)
        with StopSignals() as session:
            assert session.requested == outer.requested == signal.SIGTERM


def test_a_reward_that_gives_other_parts_in_another_process_ends_all_with_both_names(tiny_causal, monkeypatch):
    trainer = ppo(tiny_causal)
    mine = replace(trainer.collect(prompts(2)), score_parts={"a": torch.zeros(2), "b": torch.zeros(2)})
    monkeypatch.setattr(ranks, "size", lambda: 2)
    monkeypatch.setattr(ranks, "objects", lambda told: [told, (told[0], {"a": torch.zeros(2)}, told[2])])
    with pytest.raises(LabError) as end:
        gathered(mine, prompts(4))
    assert str(end.value) == "reward: process 0 gave parts a, b, process 1 a; give the same parts for every list"

    measured = {"logprobs": torch.zeros(2, 4)}
    monkeypatch.setattr(ranks, "objects", lambda told: [told, (measured, told[1], told[2])])
    with pytest.raises(LabError, match="process 0 measured .*exact_kl.*, process 1 logprobs$"):
        gathered(mine, prompts(4))
    monkeypatch.setattr(ranks, "objects", lambda told: [told, told])
    both = gathered(mine, prompts(4))
    assert both.score_parts.keys() == {"a", "b"} and len(both.scores) == len(both.completions) == 4


def test_what_two_processes_cannot_share_evenly_is_refused_of_a_trainer_too(tiny_causal, monkeypatch):
    trainer = ppo(tiny_causal)
    rollout = trainer.collect(prompts(6))
    trainer.settings = replace(trainer.settings, minibatch_size=3)
    monkeypatch.setattr(ranks, "size", lambda: 2)
    with pytest.raises(LabError, match="^prompts: 5 cannot be shared evenly by 2 processes$"):
        trainer.collect(prompts(5))
    with pytest.raises(LabError, match="^minibatch_size: 3 cannot be shared evenly by 2 processes"):
        trainer.update(rollout, lambda rows: {"policy/approx_kl": 0.0})


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


def test_processes_launched_with_different_jobs_are_refused_with_the_keys_that_differ(runs):
    for said in runs[2]:
        assert (
            "apart: UserError: the processes were launched with different jobs: lr (0.001 in process 0, 0.05 in "
            "process 1), seed (0 in process 0, 1 in process 1)"
        ) in said.splitlines()
    assert not (runs[0] / "apart").exists()


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


@pytest.mark.parametrize(("named", "part"), [("policy_parameters", "the adapter"), ("frozen_parameters", "the frozen")])
def test_weights_that_differ_between_processes_stop_the_first_step(tiny_causal, monkeypatch, named, part):
    trainer = ppo(tiny_causal)
    other = []
    monkeypatch.setattr(ranks, "size", lambda: 2)
    monkeypatch.setattr(ranks, "objects", lambda mine: other.append(mine) or [mine, other[0]])
    require_same_weights(trainer.roles)
    with torch.no_grad():
        next(iter(getattr(trainer.roles, named)().values())).view(-1)[0] += 1
    with pytest.raises(LabError, match=f"^{part}.* of process 1 is not that of process 0 before any update"):
        require_same_weights(trainer.roles)


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
