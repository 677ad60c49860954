"""What newcomers stumbled over: which run a resume takes, what a stop and a start say, what changed under a run."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Literal
from unittest.mock import Mock

import pytest
import tiny
import torch
from commands import peftlab

from peftlab.config import Config, command_for, to_toml
from peftlab.errors import Interrupted, LabError, UserError
from peftlab.models.catalog import named, resolve
from peftlab.recipes import sft
from peftlab.recipes.launch import free_name, launch, stopped
from peftlab.runs.atomic import read_rows
from peftlab.runs.progress import Progress, say
from peftlab.runs.rundir import RunDir
from peftlab.runs.typed import typed

pytestmark = pytest.mark.usefixtures("one_thread")
FLAT = "def same(prompts, completions, records):\n    return [0.1] * len(completions)\n"
GOLD = "def gold(prompts, completions, records):\n    return [1.0 + record.label for record in records]\n"
# Long enough to be stopped after its first step.
LONG = {"sft": ["max_steps=9", "max_length=16"], "classify": ["max_steps=9"], "ppo": ["steps=3"]}


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> dict[str, str]:
    """The workshop, two classifiers, and rewards that teach nothing or ask for a label."""
    root = tmp_path_factory.mktemp("newcomer")
    shop = tiny.workshop(root) | {"root": str(root)}
    for name, seed in (("reward", 1), ("judge", 2)):
        launch("classify", None, tiny.overrides(shop, "classify", f"seed={seed}"), root / "runs", name)
        shop[name] = str(root / "runs" / name)
    (root / "my_flat.py").write_text(FLAT)
    (root / "my_gold.py").write_text(GOLD)
    return shop


@pytest.fixture(autouse=True)
def at_home(shop, monkeypatch) -> None:
    """Rewards are looked up in the working directory."""
    monkeypatch.chdir(shop["root"])


def pairs(shop: dict[str, str], verb: str, *more: str) -> list[str]:
    judges = ["reward={reward}", "judge={judge}"] if verb == "ppo" else []
    return tiny.overrides(shop, verb, *(pair.format(**shop) for pair in [*judges, *LONG[verb], *more]))


def stop(monkeypatch, verb: str, given: list[str], runs: Path, name: str | None = None) -> Interrupted:
    """A run that a signal stops after its first step; what it raised."""
    asked = itertools.count(1)
    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "stop_requested", property(lambda _: signal.SIGINT if next(asked) == 1 else None))
        with pytest.raises(Interrupted) as caught:
            launch(verb, None, given, runs, name)
    return caught.value


def test_a_bare_resume_takes_the_run_that_was_stopped(shop, tmp_path, monkeypatch, capsys):
    """Rejected data leaves no run, which could take the name or be met by the resume."""
    good, bad = pairs(shop, "sft"), pairs(shop, "sft", "train_data=missing.jsonl")
    with pytest.raises(UserError, match=r"missing\.jsonl"):
        launch("sft", None, bad, tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="no run of sft .* drop --resume"):
        launch("sft", None, bad, tmp_path, resume=True)
    stop(monkeypatch, "sft", good, tmp_path)
    with pytest.raises(UserError, match=r"missing\.jsonl"):
        launch("sft", None, bad, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["sft"]
    capsys.readouterr()
    summary = launch("sft", None, good, tmp_path, resume=True)
    assert (summary["run"], summary["status"]) == ("sft", "done")
    said = capsys.readouterr().err
    assert said.startswith("sft: resuming this run\n") and "sft: goes on after step 1\n" in said
    assert "sft: measures the model as it was before the first step, to compare with; then goes on\n" in said
    assert "as it is" not in said
    assert launch("sft", None, good, tmp_path, resume=True)["run"] == "sft"
    (end,) = [row["time"] for row in read_rows(tmp_path / "sft/events.jsonl") if row["kind"] == "finish"][-1:]
    since = f"{end[:10]} {end[11:16]}Z"
    told = f"sft: already done, since {since}; nothing to resume, more steps take a new --run NAME\n"
    assert capsys.readouterr().err == told
    monkeypatch.chdir(tmp_path)
    tmp_path.joinpath("runs").symlink_to(tmp_path)
    again = peftlab(shlex.join(["sft", *good, "--run", "sft", "--resume", "--quiet"]))
    assert (again.code, again.out, again.err) == (0, "", told), "no figures, as though it had worked now"
    found = json.loads(peftlab(shlex.join(["sft", *good, "--run", "sft", "--resume", "--quiet", "--json"])).out)
    assert found == json.loads((tmp_path / "sft/summary.json").read_text()) | {"finished": since}


def test_a_name_that_is_taken_is_told_with_the_one_in_its_place(tmp_path, monkeypatch, capsys):
    (tmp_path / "job").mkdir()
    assert free_name(tmp_path, "job", False, Job()) == "job" and not capsys.readouterr().err
    ended(tmp_path, "job", Job(), None)
    for quiet in (False, True):
        monkeypatch.setattr(Progress, "quiet", quiet)
        assert free_name(tmp_path, "job", False, Job()) == "job-2"
        told = "there is a run job already, so this one is job-2; --resume goes on with one that was stopped, --run "
        assert capsys.readouterr().err.startswith(told) != quiet
    assert free_name(tmp_path, "job", True, Job()) == "job" and not capsys.readouterr().err


class Job(Config):
    recipe: Literal["job"] = "job"
    size: int = 0


def ended(root: Path, name: str, config: Job, error: Exception | None) -> None:
    run = RunDir.create(root, name, "job", to_toml(config))
    if error is None:
        with run.session():
            run.finish({}, {})
        return
    with pytest.raises(type(error)), run.session():
        run.log({"train/loss": 1.0}, 1)
        raise error


def test_the_newest_run_of_the_same_config_is_resumed_before_any_other(tmp_path):
    stopped, failed = Interrupted(signal.SIGINT), LabError("nan")
    ended(tmp_path, "a", Job(), stopped)
    ended(tmp_path, "b", Job(), failed)
    ended(tmp_path, "c", Job(), None)
    ended(tmp_path, "d", Job(size=1), stopped)
    ended(tmp_path, "e", Job(size=2), None)
    assert free_name(tmp_path, "job", True, Job()) == "b"
    assert free_name(tmp_path, "job", True, Job(size=1)) == "d"
    assert free_name(tmp_path, "job", True, Job(size=2)) == "e", "done, which is then said"
    with pytest.raises(UserError) as refused:
        free_name(tmp_path, "job", True, Job(size=3))
    assert "has this configuration; drop --resume to start one. Run d can go on with its own" in str(refused.value)
    command = f"peftlab job {tmp_path / 'd' / 'config.toml'} --run d --resume"
    assert f"differs in size (1 there, 3 now):\n  {command}" in str(refused.value)
    for name in "abd":
        shutil.rmtree(tmp_path / name)
    with pytest.raises(UserError, match="can be resumed: none was stopped after its first figure or checkpoint; drop"):
        free_name(tmp_path, "job", True, Job(size=3))
    with RunDir.create(tmp_path, "f", "job", to_toml(Job(size=3))).session() as run:
        with pytest.raises(UserError, match="can be resumed: f is still running; drop"):
            free_name(tmp_path, "job", True, Job(size=3))
        run.finish({}, {})


def test_a_resume_of_a_run_that_left_nothing_says_why_and_what_starts_it(shop, tmp_path, monkeypatch, capsys):
    """It names no other run; as it is told the command starts this one, and with --run a resume does, and says so."""
    monkeypatch.chdir(tmp_path)
    runs, bad = Path("runs"), pairs(shop, "sft", "seed=5")
    stop(monkeypatch, "sft", pairs(shop, "sft"), runs, "other")
    with monkeypatch.context() as full:
        full.setattr(sft, "load_both", Mock(side_effect=LabError("the disk is full")))
        with pytest.raises(LabError, match="the disk is full"):
            launch("sft", None, bad, runs, "mine")
        with pytest.raises(UserError) as refused:
            launch("sft", None, bad, runs, resume=True)
        told, command = str(refused.value).split(":\n  ")
        why = "it failed before its first figure (the disk is full)"
        assert told.endswith(f": mine has nothing to go on from, {why}; drop --resume to start it anew")
        assert "other" not in told and shlex.split(command) == ["peftlab", "sft", *bad, "--run", "mine"]
        capsys.readouterr()
        with pytest.raises(LabError, match="the disk is full"):
            launch("sft", None, bad, runs, "mine", resume=True)
        assert f"mine: has nothing to resume, {why}; this starts it anew\n" in capsys.readouterr().err
    again = peftlab(shlex.join([*shlex.split(command)[1:], "--quiet"]))
    assert again.code == 0 and json.loads(Path("runs/mine/summary.json").read_text())["status"] == "done", again.err


def test_a_resume_that_finds_another_config_tells_the_command_that_goes_on(shop, tmp_path, monkeypatch):
    """As it is told it goes on with that run, whose config the user need not type again."""
    given = pairs(shop, "sft")
    stop(monkeypatch, "sft", given, tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refused:
        launch("sft", None, [*given, "lr=0.5"], Path("runs"), resume=True)
    first, command = str(refused.value).splitlines()
    assert first.endswith("Run sft can go on with its own, which differs in lr (0.01 there, 0.5 now):")
    assert not (tmp_path / "runs" / "sft-2").exists()
    outcome = peftlab(command.split(maxsplit=1)[1])
    assert outcome.code == 0 and "sft: goes on after step 1" in outcome.err and "sft: done" in outcome.out


def test_a_name_that_is_taken_is_not_given_again(tmp_path):
    ended(tmp_path, "b", Job(), None)
    assert (free_name(tmp_path, "a", False, Job()), free_name(tmp_path, "b", False, Job())) == ("a", "b-2")


def test_a_run_that_failed_before_its_first_figure_leaves_its_name_to_the_next(tmp_path):
    """Also where the next says --resume, in vain, and its config is the mended one."""
    for resume in (False, True):
        with pytest.raises(LabError), RunDir.create(tmp_path, "job", "job", to_toml(Job(size=9))).session():
            raise LabError("no such model")
        assert free_name(tmp_path, "job", False, Job()) == "job"
        run = RunDir.create(tmp_path, "job", "job", to_toml(Job()), resume=resume)
        assert not run.resumed
        with run.session():
            run.finish({}, {})
        assert free_name(tmp_path, "job", False, Job()) == "job-2"
        shutil.rmtree(run.path)


def test_a_command_that_is_told_is_found_where_it_is_told(tmp_path, monkeypatch):
    """By its name where PATH finds the program that runs; else by a path that works in the current folder."""
    ours, other = tmp_path / "lab" / "bin" / "peftlab", tmp_path / "other" / "peftlab"
    for script in (ours, other):
        script.parent.mkdir(parents=True)
        script.write_text(f"#!/bin/sh\necho {script.parent.name} \"$@\"\n")
        script.chmod(0o755)
    system = os.environ["PATH"]

    def answers(folder: Path, path: Path | None) -> tuple[str, str]:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", [os.path.relpath(ours) if path is None else str(ours), "demo"])
        monkeypatch.setenv("PATH", f"{path or tmp_path}:{system}")
        command = typed("chat", "a b")
        return command, subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True).stdout

    assert answers(tmp_path, ours.parent) == ("peftlab chat 'a b'", "bin chat a b\n")
    for path in (None, other.parent):
        assert answers(tmp_path, path) == ("lab/bin/peftlab chat 'a b'", "bin chat a b\n")
        assert answers(ours.parent, path) == ("./peftlab chat 'a b'", "bin chat a b\n")
        assert answers(other.parent, path) == (f"{ours} chat 'a b'", "bin chat a b\n")
        assert str(stopped(signal.SIGINT, ["demo"])).endswith(f":\n  {ours} demo --resume")


def test_a_stop_tells_the_command_that_continues(shop, tmp_path, monkeypatch):
    """As it was typed, with the run's name: it is run as it stands."""
    given = [*pairs(shop, "sft"), 'lora.targets=["c_attn", "c_fc"]']
    told = str(stop(monkeypatch, "sft", given, tmp_path / "runs"))
    first, command = told.splitlines()
    assert first == "stopped by SIGINT; this continues the run:"
    assert shlex.split(command) == ["peftlab", "sft", *given, "--run", "sft", "--resume"]
    monkeypatch.chdir(tmp_path)
    outcome = peftlab(command.replace("peftlab ", "", 1).replace("{", "{{").replace("}", "}}"))
    assert outcome.code == 0 and "sft: done" in outcome.out


def test_the_last_line_of_progress_ends_before_what_is_said(monkeypatch):
    live = io.StringIO()
    live.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", live)
    progress = Progress(3)
    progress.show(1, "loss 1")
    say("peftlab: stopped")
    say("and more")
    assert live.getvalue().replace(" ", "").endswith("loss1\npeftlab:stopped\nandmore\n")
    progress.show(2, "loss 1")
    progress.show(3, "loss 1")
    say("done")
    assert live.getvalue().replace(" ", "").endswith("\rstep3/3loss1\ndone\n"), "one line's end is enough"


START = """
import io, sys
class Terminal(io.StringIO):
    def isatty(self):
        return True
    def write(self, text):
        if text.strip():
            print(text.strip(), "torch" in sys.modules)
        return len(text)
sys.stderr = Terminal()
sys.argv = ["peftlab", *%r]
from peftlab import cli
cli.main()
"""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("eval {gpt2} --data {texts_test}", "reads 20 rows of {texts_test} ...\n"),
        ("eval {reward} --data {labelled_test}", "classifies 20 rows of {labelled_test} ...\n"),
        ("eval {t5} --data {summaries_test}", "summarizes 6 rows of {summaries_test} ...\n"),
        ("doctor {gpt2}", "checks {gpt2}: sampling, weights, a step of training ...\n"),
    ],
)
def test_what_takes_seconds_says_on_a_terminal_what_it_does(line, told, shop, monkeypatch):
    monkeypatch.setenv("COLUMNS", "999")
    assert peftlab(line, **shop).err == "", "nothing in a pipe"
    with monkeypatch.context() as patch:
        patch.setattr("commands.io.StringIO", Terminal)
        shown = peftlab(line, **shop).err
    counts = "" if line.startswith("doctor") else "\r     \r"  # of one batch, which is done
    assert shown == "loading ...\n" + told.format(**shop) + counts


def test_a_terminal_is_told_of_the_loading_before_it_begins():
    words = ["ppo", "want=", "--dry-run", "--json"]
    wide = os.environ | {"COLUMNS": "400"}  # so wide that a message is a line
    done = subprocess.run([sys.executable, "-c", START % words], capture_output=True, text=True, env=wide)
    first, second = done.stdout.splitlines()
    assert first == "loading ... False" and second.startswith("peftlab: the command line: want: ")
    assert peftlab("ppo want= --dry-run").err.startswith("peftlab: "), "and nobody else is"


def test_an_unknown_label_names_the_key_of_the_classes(shop, tmp_path):
    rows = [{"text": "good", "label": "fair"}, {"text": "bad", "label": "bad"}]
    bad = tiny.write_rows(tmp_path / "three.jsonl", rows)
    with pytest.raises(UserError, match="`labels` in a classifier's config names the classes"):
        launch("classify", None, pairs(shop, "classify", f"train_data={bad}"), tmp_path, "a")
    keys = [f"train_data={bad}", f"eval_data={tiny.write_rows(tmp_path / 'same.jsonl', rows)}", "labels=bad,fair,good"]
    summary = launch("classify", None, pairs(shop, "classify", *keys, "max_steps=1"), tmp_path, "b")
    assert summary["status"] == "done"
    assert json.loads((tmp_path / "b" / "adapter" / "stack.json").read_text())["labels"] == ["bad", "fair", "good"]


def test_ppo_tells_its_own_reward_before_and_after(shop, tmp_path):
    given = pairs(shop, "ppo", "steps=1")
    prompts = tiny.write_rows(tmp_path / "p.jsonl", [{"prompt": "the film was", "label": n % 2} for n in range(8)])
    given += [f"train_data={prompts}", f"eval_data={prompts}"]
    summary = launch("ppo", None, [*given, "reward=my_gold:gold"], tmp_path, "gold")
    labels = [1.0 + int(row["prompt_id"]) % 2 for row in read_rows(tmp_path / "gold" / "samples.jsonl")][:6]
    for side in ("baseline", "metrics"):
        assert summary[side]["eval/reward"] == pytest.approx(sum(labels) / 6), "a reward that no policy can move"
    assert summary["intervals"]["eval/reward"][0] < summary["metrics"]["eval/reward"]
    steered = launch("ppo", None, [*given, f"reward={shop['reward']} + my_gold:gold"], tmp_path, "both")
    assert steered["metrics"]["eval/reward"] != steered["baseline"]["eval/reward"], "a classifier's is of the samples"


def test_progress_calls_its_kl_an_estimate_and_gives_0_no_sign(shop, tmp_path, monkeypatch, capsys):
    """The mean over sampled tokens is below 0 by chance, which no KL is."""
    monkeypatch.setattr("peftlab.rl.rollout.k1", lambda logp, logq: logp - logq - 1e-5)
    launch("ppo", None, pairs(shop, "ppo", "steps=1"), tmp_path, "small")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("  step 1/1 ")]
    assert re.fullmatch(r"  step 1/1  reward -?\d+\.\d\d  KL estimate 0\.00", line)
    monkeypatch.setattr("peftlab.rl.rollout.k1", lambda logp, logq: logp - logq - 1.0)
    launch("ppo", None, pairs(shop, "ppo", "steps=1"), tmp_path, "large")
    assert re.search(r"  KL estimate -\d\.\d\d\n", capsys.readouterr().err)


def test_a_reward_that_cannot_read_the_evaluation_prompts_fails_before_training(shop, tmp_path):
    labelled = tiny.write_rows(tmp_path / "p.jsonl", [{"prompt": "the film was", "label": n % 2} for n in range(8)])
    given = pairs(shop, "ppo", "reward=my_gold:gold", f"train_data={labelled}")
    with pytest.raises(LabError, match=r"my_gold:gold: my_gold.py, line \d+: TypeError"):
        launch("ppo", None, given, tmp_path, "gold")
    assert not (tmp_path / "gold" / "metrics.jsonl").exists()


def test_a_reward_that_is_always_the_same_is_warned_of_once(shop, tmp_path, capsys):
    launch("ppo", None, pairs(shop, "ppo", "reward=my_flat:same"), tmp_path, "flat")
    warned = [line for line in capsys.readouterr().err.splitlines() if "no difference to learn" in line]
    assert len(warned) == 1 and "all 8 completions is 0.1" in warned[0]
    events = [row for row in read_rows(tmp_path / "flat" / "events.jsonl") if row["kind"] == "reward_flat"]
    assert [row["step"] for row in events] == [1]
    launch("ppo", None, pairs(shop, "ppo", "steps=1"), tmp_path, "other")
    assert "reward_flat" not in (tmp_path / "other" / "events.jsonl").read_text()


# What a run stands on: the verb, the key that names it, and what takes its place under the same name.
UNDER = {
    "a base": ("sft", "model", "gpt2"),
    "an adapter": ("sft", "model", "under"),
    "an encoder": ("classify", "model", "encoder"),
    "a classifier to compare": ("classify", "compare", "reward"),
    "a teacher": ("classify", "teacher", "reward"),
    "a reward": ("ppo", "reward", "reward"),
    "a judge": ("ppo", "judge", "reward"),
}


@pytest.mark.parametrize("what", UNDER)
def test_a_resume_refuses_what_changed_under_the_run(what, shop, tmp_path, monkeypatch):
    verb, key, kind = UNDER[what]
    place, other = tmp_path / "place", tmp_path / "other"
    if kind == "under":
        for folder, seed in ((place, 3), (other, 4)):
            launch("sft", None, tiny.overrides(shop, "sft", f"seed={seed}"), tmp_path / "made", folder.name)
            shutil.copytree(tmp_path / "made" / folder.name / "adapter", folder)
    elif kind == "reward":
        for folder, name in ((place, "reward"), (other, "judge")):
            shutil.copytree(Path(shop[name]) / "adapter", folder)
    else:
        make = tiny.causal_folder if kind == "gpt2" else tiny.encoder_folder
        make(place, seed=3), make(other, seed=4)
    more = ["reward={judge}"] if what == "a judge" else []
    given = pairs(shop, verb, *more, f"{key}={place}")
    stop(monkeypatch, verb, given, tmp_path, "run")
    known = json.loads((tmp_path / "run" / "environment.json").read_text())["models"]
    assert f"{key} {place}" in known
    before = {file.name: file.read_bytes() for file in place.iterdir() if file.is_file()}
    shutil.copytree(other, place, dirs_exist_ok=True)
    with pytest.raises(UserError, match=rf"^{key} \S*place is not what run 'run' began with .* restore it"):
        launch(verb, None, given, tmp_path, "run", resume=True)
    for name, content in before.items():
        (place / name).write_bytes(content)
    assert launch(verb, None, given, tmp_path, "run", resume=True)["status"] == "done"


def test_a_resume_refuses_another_reward_function(shop, tmp_path, monkeypatch):
    file = Path(shop["root"]) / "my_changing.py"
    file.write_text(FLAT)
    given = pairs(shop, "ppo", "reward=my_changing:same")
    stop(monkeypatch, "ppo", given, tmp_path, "run")
    file.write_text(FLAT.replace("0.1", "0.2"))
    with pytest.raises(UserError, match="reward my_changing:same is not what run 'run' began with"):
        launch("ppo", None, given, tmp_path, "run", resume=True)


VERBS = (
    "generate {}", "predict {} --text film", "eval {} --data rows.jsonl", "export {} --as adapter --output out",
    "doctor {}", "chat {}", "serve {} --port 0", "data preview rows.jsonl --for sft --model {}",
    "data preferences --policy {} --prompts rows.jsonl --weight length=1 --output pairs",
    "data preferences --policy tiny-gpt2 --prompts rows.jsonl --scorer {} --output pairs",
    "data gist --model {} --output out", "data explanations --classifier {} --output out",
)  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_a_run_goes_by_its_name_in_every_verb(verb, tmp_path, monkeypatch):
    """A name of the lab's comes first, then the run of that name, then a folder or the Hub."""
    looked_up = []

    def seen(name: str) -> None:
        looked_up.append(name)
        raise UserError("seen")

    for module in ("adapter_files", "classifier", "stacks", "mix", "export"):
        monkeypatch.setattr(f"peftlab.models.{module}.resolve", seen)
    for module in ("chat.voices", "recipes.export", "recipes.predict", "recipes.preview"):
        monkeypatch.setattr(f"peftlab.{module}.resolve", seen)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "A film.", "prompt": "A film"}\n')
    for name in ("mine", "tiny-gpt2", "sft-tiny"):
        folder = tmp_path / "runs" / name
        (folder / "adapter").mkdir(parents=True)
        (folder / "config.toml").write_text('recipe = "sft"\n')
    for given, taken in (("mine", "runs/mine"), ("sft-tiny", "runs/sft-tiny"), ("tiny-gpt2", "tiny-gpt2"),
                         ("./runs/mine", "./runs/mine"), ("./mine", "./mine"),
                         ("OWNER/NAME", "OWNER/NAME")):  # fmt: skip
        looked_up.clear()
        outcome = peftlab(verb.format(given))
        assert (outcome.code, looked_up[:1]) == (2, [taken]), outcome.err


def test_a_base_is_never_a_run_that_is_called_like_it(tmp_path, monkeypatch):
    """Else a run called gpt2 would stand on itself."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("peftlab.models.catalog._from_hub", lambda name: (_ for _ in ()).throw(UserError("the Hub's")))
    (tmp_path / "runs" / "gpt2" / "adapter").mkdir(parents=True)
    (tmp_path / "runs" / "gpt2" / "config.toml").touch()
    assert named("gpt2") == "runs/gpt2"
    with pytest.raises(UserError, match="the Hub's"):
        resolve("gpt2")


@pytest.mark.parametrize("name", ["sft-tiny", "runs/sft-tiny"])
def test_a_run_that_is_still_to_be_made_names_its_command(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = peftlab(f"generate {name}")
    assert outcome.code == 2 and "no " in outcome.err and "; run `peftlab sft sft-tiny` first; " in outcome.err
    (tmp_path / "runs" / "sft-tiny").mkdir(parents=True)
    (tmp_path / "runs" / "sft-tiny" / "config.toml").touch()
    outcome = peftlab("ppo model=sft-tiny --run other")  # a key takes the folder
    assert outcome.code == 2 and " first; " not in outcome.err and "did you mean runs/sft-tiny?" in outcome.err


def test_a_run_without_an_adapter_yet_tells_the_command_that_goes_on(shop, tmp_path, monkeypatch):
    """As it is told it goes on, to an adapter that the same verb then uses."""
    monkeypatch.chdir(tmp_path)
    stop(monkeypatch, "sft", pairs(shop, "sft"), Path("runs"), "short")
    asked = "generate {run} --prompt film --max-new-tokens 2"
    for run in ("short", "runs/short"):
        outcome = peftlab(asked, run=run)
        assert outcome.code == 2 and "this run was stopped before its end, `" in outcome.err, outcome.err
    command = outcome.err.split("`")[1]
    Path("runs/short/summary.json").rename("summary.json")
    assert f"has not ended; unless it goes on now, `{command}` continues it" in peftlab(asked, run="short").err
    Path("summary.json").rename("runs/short/summary.json")
    assert command == "peftlab sft runs/short/config.toml --run short --resume"
    assert peftlab(command.removeprefix("peftlab ")).code == 0
    assert peftlab(asked, run="short").code == 0
    broken = RunDir.create(Path("runs"), "broken", "sft", 'recipe = "sft"\n')
    with pytest.raises(LabError), broken.session():
        raise LabError("nan")
    assert "it is a run that left none: `peftlab runs list` says why" in peftlab(asked, run="broken").err
    Path("runs/whole/sft").mkdir(parents=True)
    Path("runs/whole/config.toml").write_text('recipe = "demo"\n')
    Path("runs/whole/summary.json").write_text('{"status": "done"}')
    Path("runs/short/adapter").rename("runs/whole/sft/adapter")
    assert "its stages: runs/whole/sft" in peftlab(asked, run="runs/whole").err


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("pull imbd", "pull imbd: no such data or model; did you mean imdb?"),
        ("pull smollm-135m", "did you mean smollm2-135m?"),
        ("pull nobody", "the Hub did not give it (HF_HUB_OFFLINE is set, and it was not downloaded before). Off"),
        ("pull a//b", "the Hub did not give it (that is no name there). Offline, use "),
        ("data preview OWNER/NAME:train --for sft", "the Hub did not give it ("),
    ],
)
def test_what_is_not_to_be_had_is_told_in_words(command, told):
    outcome = peftlab(command)
    assert outcome.code == 2 and told in outcome.err and "Error" not in outcome.err, outcome.err


def test_training_shows_its_first_step_and_soon_the_time_left(tmp_path, monkeypatch):
    """Step 1 is in the log too, though the others come there every so many steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("peftlab.runs.progress.EVERY_S", 0)
    words = " ".join(tiny.overrides(tiny.workshop(tmp_path), "sft", "max_steps=120"))
    outcome = peftlab(f"sft {words}")
    assert outcome.code == 0, outcome.err
    begins, *steps = outcome.err.splitlines()
    assert begins == "sft: measures the model as it is; then come the steps"
    assert re.fullmatch(r"  step 1/120  loss \d+\.\d{4}", steps[0])
    assert re.fullmatch(r"  step 3/120  loss \d+\.\d{4} at step 2  about 0:\d\d:\d\d left", steps[2]), "none of its own"
    assert len(steps) == 120 and "left" not in steps[-1]
    assert [row["step"] for row in read_rows(tmp_path / "runs" / "sft" / "metrics.jsonl")][:4] == [0, 1, 2, 4]
    assert not peftlab(f"sft {words} --quiet").err


def test_what_takes_long_on_a_cpu_is_told_before_it_begins(monkeypatch):
    told = []
    monkeypatch.setattr("peftlab.recipes.launch.start", lambda *_: (_ for _ in ()).throw(UserError("begun")))
    monkeypatch.setattr("peftlab.recipes.launch.say", told.append)
    monkeypatch.setattr("peftlab.recipes.declared.check_names", lambda _: None)  # other runs and data are not there

    def of(line: str) -> str:
        told.clear()
        assert peftlab(line).err == "peftlab: begun\n" and len(told) < 4
        return "".join(line for line in told if "hours" in line)

    assert of("sft smollm2-imdb device=cpu").startswith("smollm2-imdb is made for a GPU, and may take hours on a CPU: ")
    assert of("sft device=cpu").startswith("sft without a config trains on all of imdb:train, and may take hours on a ")
    for line in ("sft device=cpu", "classify classify-judge device=cpu", "rloo rloo-explanations device=cpu"):
        smaller, _, keys = of(line).partition(": ")[2].rpartition("; ")
        names = smaller.partition(" is smaller" if " is " in smaller else " are smaller")[0].split(", ")
        verb = line.split()[0]
        for name in names:
            assert command_for(name) == f"peftlab {verb} {name}" and not of(f"{verb} {name} device=cpu")
        pairs = keys.removesuffix(" makes it shorter").split(" or ")
        assert pairs and not any(of(f"{line} {pair}") for pair in pairs), "who takes the advice is not told again"
    alone = of("pretrain pretrain-tiny-t5 device=cpu")
    assert alone.endswith("on a CPU: max_steps=100 or train_limit=500 makes it shorter"), "of that verb none is smaller"
    assert not of("sft device=cpu train_data=mine.jsonl") and not of("ppo device=cpu")
    monkeypatch.setattr("peftlab.recipes.launch.pick_device", lambda _: torch.device("cuda"))
    assert not of("sft smollm2-imdb")


def test_a_mistyped_config_is_answered_with_the_nearest():
    near, far = peftlab("configs sft-tny"), peftlab("configs qqqqqq")
    assert (near.code, near.err) == (2, "peftlab: config sft-tny: not a shipped config; did you mean sft-tiny?\n")
    assert far.code == 2 and "sft-tiny" in far.err and "did you mean" not in far.err
