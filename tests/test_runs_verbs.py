"""`peftlab runs`: list, diff and prune; and what a terminal shows of a run while it trains."""

from __future__ import annotations

import io
import json
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import fake_runs
import pytest
from commands import peftlab

from peftlab.cli import runs as verbs
from peftlab.config import load_config, to_toml
from peftlab.errors import Interrupted
from peftlab.recipes import RECIPES, demo, load
from peftlab.runs import progress as progress_lines
from peftlab.runs.atomic import append_rows
from peftlab.runs.lock import locked
from peftlab.runs.panel import Pace, Panel
from peftlab.runs.progress import Progress, batch_starts, counting, doing, say, watched
from peftlab.runs.rundir import RunDir


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """runs/ with `base`, a `policy` on it, and two that failed, of which `tried` stands on `broken`."""
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "runs"
    make(root, "base")
    make(root, "broken", error=True)
    make(root, "tried", model="runs/broken", error=True)
    make(root, "policy", model="runs/base/adapter", reward="0.5*runs/tried/adapter + rubric:length")
    return root


def make(root: Path, name: str, error: bool = False, **keys: object) -> RunDir:
    """A run with a checkpoint and an adapter, with these keys in its config."""
    text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in {"recipe": "sft", "lr": 0.1, **keys}.items())
    run = RunDir.create(root, name, "sft", f"{text}\n[lora]\nr = {len(name)}\n")
    try:
        with run.session():
            run.log({"train/loss": 2.0}, 1)
            with run.checkpoints.stage(1) as folder:
                (folder / "state").write_bytes(b"x" * 1000)
            (run.path / "adapter").mkdir()
            if error:
                raise RuntimeError("no")
            run.finish({"eval/perplexity": 60.0 + len(name)}, {}, {"eval/perplexity": (60.0, 70.0)})
    except RuntimeError:
        pass
    return run


def test_show_tells_of_one_run_and_what_to_type_next(here):
    found = json.loads(peftlab("runs show policy --json").out)
    assert {key: found[key] for key in ("run", "status", "step", "folder")} == {
        "run": "policy", "status": "done", "step": 1, "folder": "runs/policy"
    }
    assert found["metrics"] == {"eval/perplexity": 66.0} and found["intervals"] == {"eval/perplexity": [60.0, 70.0]}
    assert found["config"].items() >= {"lr": 0.1, "lora.r": 6, "model": "runs/base/adapter"}.items()
    assert {"adapter/", "checkpoints/", "config.toml", "summary.json"} <= set(found["files"])
    uses = ["report policy", "chat policy", "export policy --as adapter --output policy-adapter"]
    assert found["next"] == [f"peftlab {use}" for use in uses]
    shown = peftlab("runs show runs/policy").out
    assert shown.startswith("policy: sft, done, ") and re.search(r"eval/perplexity +- +66 +60 to 70", shown)
    assert all(line in shown for line in (*found["next"], "lora.r", found["folder"])) and "recipe  " not in shown


def test_show_leads_from_a_run_that_ended_early_to_its_resume_and_from_a_demo_to_its_stages(here):
    found = json.loads(peftlab("runs show broken --json").out)
    assert (found["status"], found["metrics"]) == ("failed", {"train/loss": 2.0})
    assert found["next"][0] == "peftlab sft runs/broken/config.toml --run broken --resume"
    assert found["reason"] in peftlab("runs show broken").out
    begun = RunDir.create(here, "begun", "sft", 'recipe = "sft"\n')
    with pytest.raises(RuntimeError), begun.session():
        raise RuntimeError("at once")
    again = ["peftlab sft runs/begun/config.toml --run begun"]
    assert json.loads(peftlab("runs show begun --json").out)["next"] == again
    killed = RunDir.create(here, "killed", "sft", 'recipe = "sft"\n')
    with locked(killed.path):
        killed.log({"train/loss": 2.0, "train/lr": 0.5}, 3)
        live = json.loads(peftlab("runs show killed --json").out)
    assert (live["status"], live["step"], live["next"]) == ("running", 3, ["peftlab report killed"])
    assert live["metrics"] == {"train/loss": 2.0, "train/lr": 0.5}
    assert "last step 3" in peftlab("runs show killed").out
    fake_runs.demo_run(here)
    demo = json.loads(peftlab("runs show demo --json").out)
    assert demo["next"] == [f"peftlab runs show demo/{stage}" for stage in ("classify", "sft", "ppo")]
    (here / "demo/ppo/summary.json").unlink()
    resume = "peftlab demo --run demo --resume"
    assert json.loads(peftlab("runs show demo/ppo --json").out)["next"] == [resume, "peftlab report demo/ppo"]
    outcome = peftlab("runs show polcy")
    assert outcome.code == 2 and "did you mean policy?" in outcome.err


def test_show_tells_no_resume_that_would_not_find_the_run(here, tmp_path, monkeypatch):
    """--run looks below ./runs: not from a demo's own folder, nor for runs of another place."""
    fake_runs.demo_run(here)
    (here / "demo/ppo/summary.json").unlink()
    for name in ("broken", str(here / "broken"), "runs/broken", "./runs/demo/ppo"):
        assert json.loads(peftlab(f"runs show {name} --json").out)["next"][0].endswith(" --resume")
    monkeypatch.chdir(here / "demo")
    assert json.loads(peftlab("runs show ppo --json").out)["next"] == ["peftlab report ppo"]
    monkeypatch.chdir(tmp_path.parent)
    elsewhere = (here / "broken").relative_to(Path.cwd())
    assert json.loads(peftlab(f"runs show {elsewhere} --json").out)["next"] == [f"peftlab report {elsewhere}"]


def test_show_tells_in_how_many_processes_a_run_is_resumed(here):
    assert "\nnext\n" in peftlab("runs show broken").out
    for name in ("broken", "base"):
        file = here / name / "environment.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "processes": 2}))
    assert "\nnext; launch the resume in 2 processes, as the run began\n" in peftlab("runs show broken").out
    assert "\nnext\n" in peftlab("runs show base").out


@pytest.mark.parametrize(("stages", "option"), [(demo.STAGES, ""), (demo.FULL, "--full ")])
def test_the_resume_of_a_demo_is_of_the_same_stages(stages, option, here):
    config = demo.DemoConfig(stages=tuple(stage.name for stage in stages))
    run = RunDir.create(here, "whole", "demo", to_toml(config))
    with pytest.raises(RuntimeError), run.session():
        make(here, "whole/sft", error=True)
        raise RuntimeError("no")
    for name in ("whole", "whole/sft"):
        told = json.loads(peftlab(f"runs show {name} --json").out)["next"]
        assert told[0] == f"peftlab demo {option}--run whole --resume"


@pytest.mark.parametrize("recipe", RECIPES)
def test_show_tells_no_key_that_nobody_chose(recipe, here):
    for name, pairs in (("plain", []), ("own", ["seed=7", "lr=0.25"])):
        text = to_toml(load_config(load(recipe).CONFIG, None, pairs))
        RunDir.create(here, name, recipe, text).finish({}, {})
        chosen = json.loads(peftlab(f"runs show {name} --json").out)["config"]
        assert chosen == ({"lr": 0.25, "seed": 7} if pairs else {})


def test_show_tells_no_keys_of_a_demo(here):
    fake_runs.demo_run(here)
    assert json.loads(peftlab("runs show demo --json").out)["config"] == {}


def there(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


def test_runs_lists_with_and_without_its_verb(here):
    plain, named = peftlab("runs"), peftlab("runs list")
    assert plain.code == named.code == 0 and plain.out == named.out and "policy" in plain.out
    assert json.loads(peftlab("runs --json").out) == json.loads(peftlab("runs list --json").out)


def test_diff_shows_the_keys_that_differ_and_the_figures(here):
    found = json.loads(peftlab("runs diff base policy --json").out)
    keys = {row["key"]: (row["a"], row["b"]) for row in found["config"]}
    assert keys == {
        "lora.r": (4, 6),
        "model": (None, "runs/base/adapter"),
        "reward": (None, "0.5*runs/tried/adapter + rubric:length"),
    }
    row = {"metric": "eval/perplexity", "a": 64.0, "b": 66.0, "interval_a": [60.0, 70.0], "interval_b": [60.0, 70.0]}
    assert row in found["metrics"]
    shown = peftlab("runs diff base policy").out
    assert "64 (60 to 70)" in shown and "recipe" not in shown and max(map(len, shown.splitlines())) <= 80
    same = json.loads(peftlab("runs diff base base --json").out)
    assert same["config"] == [] and same["metrics"][0]["a"] == same["metrics"][0]["b"]
    assert "no run 'nowhere'" in peftlab("runs diff base nowhere").err


def test_diff_of_different_recipes_shows_what_both_have_and_counts_the_rest(here):
    run = RunDir.create(here, "other", "ppo", 'recipe = "ppo"\nlr = 0.2\nclip = 0.2\nlam = 1.0\n\n[lora]\nr = 4\n')
    with run.session():
        run.finish({"eval/perplexity": 50.0, "eval/judge": 0.5}, {})
    shown = peftlab("runs diff policy other").out.splitlines()
    assert shown[3:] == [
        "key     a    b",
        "recipe  sft  ppo",
        "lr      0.1  0.2",
        "lora.r  6    4",
        "",
        "metric           a              b",
        "eval/perplexity  66 (60 to 70)  50",
        "",
        "only in a: 2 keys (--json names them)",
        "only in b: 2 keys, 1 figure (--json names them)",
    ]
    keys = {row["key"] for row in json.loads(peftlab("runs diff policy other --json").out)["config"]}
    assert keys >= {"model", "reward", "clip", "lam"}
    apart = RunDir.create(here, "apart", "ppo", 'recipe = "ppo"\nlr = 0.2\n')
    with apart.session():
        apart.finish({"eval/judge": 0.5}, {})
    *_, line, _, _, alone = peftlab("runs diff policy apart").out.splitlines()
    assert line == "no figure that both have" and alone == "only in b: 1 figure (--json names them)"


def test_diff_takes_no_figure_of_the_model_before_the_job_for_a_result(here):
    """A run that was stopped has logged it at step 0, and nothing later under that name."""
    run = RunDir.create(here, "short", "sft", 'recipe = "sft"\n')
    with pytest.raises(Interrupted), run.session():
        run.log({"eval/perplexity": 99.0, "rubric/all": 0.1, "data/rows": 5}, 0)
        run.log({"train/loss": 2.0}, 1)
        raise Interrupted(signal.SIGINT)
    rows = {row["metric"]: row for row in json.loads(peftlab("runs diff base short --json").out)["metrics"]}
    assert (rows["eval/perplexity"]["a"], rows["eval/perplexity"]["b"]) == (64.0, None)
    assert (rows["data/rows"]["b"], rows["train/loss"]["b"]) == (5.0, 2.0), "these it did measure"
    assert "rubric/all" not in rows
    shown = peftlab("runs diff base short").out.splitlines()
    assert shown[:2] == ["a: base, sft, done", "b: short, sft, stopped (no result: that is measured at a run's end)"]
    assert "eval/perplexity  64 (60 to 70)  -" in shown


def test_prune_takes_the_checkpoints_of_runs_that_are_done(here):
    """The newest stays with --keep; adapters and runs stay, and those that can be resumed keep theirs."""
    told = json.loads(peftlab("runs prune --dry-run --json").out)
    assert [item["run"] for item in told["items"]] == ["base", "policy"] and told["bytes"] > 2000
    assert (here / "base" / "checkpoints").is_dir()
    assert peftlab("runs prune --keep 1 --yes").code == 0
    kept = {run: (here / run / "checkpoints").is_dir() for run in there(here)}
    assert kept == {"base": False, "policy": True, "broken": True, "tried": True}
    assert (here / "base" / "adapter").is_dir() and json.loads(peftlab("runs --json").out)[0]["status"] == "done"
    assert json.loads(peftlab("runs prune --yes --json").out)["items"][0]["run"] == "policy"


def test_prune_keeps_what_a_run_that_stays_stands_on(here):
    """`policy` was rewarded by `tried`, which was trained on `broken`: both stay, and it is said for whom."""
    shown = peftlab("runs prune --status failed --yes").out
    assert re.search(r"broken .*tried", shown) and re.search(r"tried .*policy", shown)
    assert there(here) == {"base", "policy", "broken", "tried"}
    make(here, "rewarding")
    make(here, "quoting", reward="rubric:length + 2*'runs/rewarding/adapter'", error=True)
    peftlab("runs prune --status done --yes")
    assert "rewarding" in there(here), "a reward may quote its paths"
    told = json.loads(peftlab("runs prune --status failed --status done --yes --json").out)
    assert all(not item["stays_for"] for item in told["items"]) and there(here) == set()


def test_prune_leaves_a_run_alone_that_a_process_works_in(here):
    with locked(here / "base"):
        outcome = peftlab("runs prune --yes")
    assert outcome.code == 2 and "is in use" in outcome.err and (here / "base" / "checkpoints").is_dir()
    assert (here / "policy" / "checkpoints").is_dir()


def test_prune_asks_first(here, monkeypatch):
    outcome = peftlab("runs prune")
    assert outcome.code == 2 and "--yes" in outcome.err and (here / "base" / "checkpoints").is_dir()
    for answer, stays in (("n\n", True), ("y\n", False)):
        monkeypatch.setattr(sys, "stdin", Screen(answer))
        assert peftlab("runs prune").code == 0
        assert (here / "base" / "checkpoints").is_dir() is stays


@pytest.mark.parametrize("words", ["--status lost", "--keep -1"])
def test_prune_names_what_it_does_not_know(here, words):
    outcome = peftlab(f"runs prune {words} --yes")
    assert outcome.code == 2 and words.split()[0] in outcome.err


def test_what_a_killed_prune_left_is_no_run_and_goes_with_the_next(here, monkeypatch):
    with monkeypatch.context() as killed:
        killed.setattr("peftlab.runs.prune.shutil.rmtree", lambda *_, **__: None)
        peftlab("runs prune --status done --yes")
    assert len(there(here)) == 4
    assert [run["run"] for run in json.loads(peftlab("runs --json").out)] == ["broken", "tried"]
    peftlab("runs prune --status failed --yes")
    assert there(here) == set()


def test_stages_go_with_their_demo(here):
    for name in ("demo", "demo/sft"):
        make(here, name, error=name == "demo")
    told = json.loads(peftlab("runs prune --status failed --status done --json --dry-run").out)
    assert {item["run"] for item in told["items"]} == {"base", "policy", "broken", "tried", "demo"}
    assert "demo/sft" in {item["run"] for item in json.loads(peftlab("runs prune --json --dry-run").out)["items"]}


def test_sizes_are_in_their_unit():
    assert [verbs.in_bytes(size) for size in (20, 3.2e6, 1.44e9)] == ["0.0 kB", "3.2 MB", "1.4 GB"]


class Screen(io.StringIO):
    """A terminal of 80 columns that keeps what was written to it."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch) -> Callable[..., Screen]:
    """Makes standard error one; called in the test, since pytest puts its own there before each phase."""

    def made(**names: str) -> Screen:
        found = Screen()
        monkeypatch.setattr(sys, "stderr", found)
        for key, value in ({"COLUMNS": "80", "LINES": "30", "TERM": "xterm", "NO_COLOR": "1"} | names).items():
            monkeypatch.setenv(key, value)
        monkeypatch.setattr(progress_lines, "LIVE_EVERY_S", 0)
        return found

    return made


def after(text: str) -> list[str]:
    """The lines that stand on a terminal after `text`: it knows how to go up and to clear below."""
    lines, row = [""], 0
    for piece in re.split(r"(\x1b\[\d*[AJ]|\n)", re.sub(r"\x1b\[[0-9;]*m", "", text)):
        if piece == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif piece.endswith("A") and piece.startswith("\x1b"):
            row -= int(piece[2:-1])
        elif piece == "\x1b[J":
            del lines[row + 1 :]
            lines[row] = ""
        else:
            lines[row] += piece
    return lines


def rows(run: RunDir, step: int) -> None:
    figures = {"reward/mean": step / 2, "policy/clip_fraction": 0.41, "policy/approx_kl": 0.001, "time/step_s": 2.0}
    run.log(figures, step)


def test_a_panel_shows_figures_ranges_and_a_sample(tmp_path, terminal):
    screen, run = terminal(), RunDir.create(tmp_path, "ppo", "ppo", fake_runs.PPO_CONFIG)
    hostile = "\x1b]0;owned\x07\x1b[2J\u202eevil [bold]x[/foo]\nline"
    with watched("ppo", run.path):
        progress = Progress(4)
        for step in (1, 2):
            rows(run, step)
            append_rows(run.path / "rollouts.jsonl", [{"step": step, "prompt": "This film", "completion": hostile}])
            progress.show(step, "reward 1")
        say("a word between")
        rows(run, 3)
        progress.show(3, "reward 1")
    say("done")
    lines = after(screen.getvalue())
    shown = "\n".join(lines)
    assert "ppo: step 3 of 4" in shown and "step 1 of 4" not in shown and "75%" in shown
    assert re.search(r"reward/mean +1.5 +0.5 +higher", shown)
    assert re.search(r"policy/clip_fraction +0.41 +0.41 +0 to 0.3 +OUTSIDE", shown)
    assert re.search(r"policy/approx_kl +0.001 +0.001 +0 to 0.02 +ok", shown) and "time/step_s" not in shown
    assert "step 2: This film -> evil [bold]x[/foo] line" in shown and "owned" not in shown
    assert lines.index("a word between") < lines.index("done"), "the panel stands below what was said in between"
    assert lines[lines.index("a word between") + 1].startswith("╭") and lines[-2:] == ["done", ""]
    assert {len(line) for line in lines if line.startswith(("│", "╭", "╰"))} == {80}
    used = set(re.findall(r"\x1b\[([\d;?]*[A-Za-z])", screen.getvalue()))
    assert {one[-1] for one in used} <= {"A", "J", "m"}, "no cursor is hidden, no mode is set"
    assert "\u202e" not in screen.getvalue() and "left" in shown


def test_a_stop_is_told_below_the_panel(tmp_path, terminal):
    """What the handler of signals writes goes round us: the next panel leaves it where it stands."""
    screen, run = terminal(), RunDir.create(tmp_path, "ppo", "ppo", fake_runs.PPO_CONFIG)
    with watched("ppo", run.path):
        progress = Progress(4)
        progress.show(1, "")
        Progress.open = False
        screen.write("\nstopping\n")
        progress.show(2, "")
    lines = after(screen.getvalue())
    assert lines.index("stopping") < next(i for i, line in enumerate(lines) if "step 2 of 4" in line)


@pytest.mark.parametrize(("name", "value"), [("TERM", "dumb"), ("LINES", "10")])
def test_a_terminal_that_holds_no_panel_has_a_line(tmp_path, terminal, name, value):
    screen = terminal(**{name: value})
    with watched("ppo", tmp_path):
        progress = Progress(2)
        progress.show(1, "loss 3")
        progress.show(2, "loss 2")
    assert screen.getvalue().split("\r")[1:] == [f"{'  step 1/2  loss 3':<79}", f"{'  step 2/2  loss 2':<79}\n"]


def test_quiet_shows_nothing_and_a_pipe_gets_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with watched("ppo", tmp_path):
        Progress(2).show(2, "loss 2")
        assert sys.stderr.getvalue() == "  step 2/2  loss 2\n"
        monkeypatch.setattr(Progress, "quiet", True)
        Progress(2).show(2, "loss 2")
        say("what went wrong")
    assert sys.stderr.getvalue() == "  step 2/2  loss 2\nwhat went wrong\n"


def test_a_job_tells_of_its_first_step_and_from_the_second_on_of_the_time_left(monkeypatch):
    pipe, clock = io.StringIO(), [100.0]
    monkeypatch.setattr(sys, "stderr", pipe)
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    progress = Progress(90)
    clock[0] += 600  # what comes before the first step, and within it, is no measure of the others
    for step, took in ((1, 0), (2, 4), (3, 4), (4, 4), (90, 344)):
        clock[0] += took
        progress.show(step, "loss 1")
    assert pipe.getvalue().splitlines() == [
        "  step 1/90  loss 1", "  step 4/90  loss 1  about 0:05:44 left", "  step 90/90  loss 1"
    ]  # fmt: skip


def test_rows_are_counted_on_a_terminal_until_the_last_one(terminal):
    """The line gives way to what is said, and is gone in the end; nothing is counted unasked, or at once in a pipe."""
    screen = terminal()
    with counting():
        for start in batch_starts(10, 4):
            if start == 8:
                say("here")
    assert screen.getvalue() == "\r  40%\r  80%\nhere\n\r     \r" and not Progress.open
    assert list(batch_starts(10, 4)) == [0, 4, 8]
    sys.stderr = pipe = io.StringIO()
    with counting():
        assert list(batch_starts(10, 4)) == [0, 4, 8]
    assert screen.getvalue().endswith("here\n\r     \r") and pipe.getvalue() == ""


def test_a_pipe_is_told_every_ten_seconds_what_is_done_and_how_far_it_is(monkeypatch):
    """Over all loops together: an evaluation may have many short ones."""
    pipe, clock = io.StringIO(), [100.0]
    monkeypatch.setattr(sys, "stderr", pipe)
    monkeypatch.setattr("time.monotonic", lambda: clock[0])

    def work(rows: int) -> None:
        for _ in batch_starts(rows, 1):
            clock[0] += 4

    doing("loading")
    work(99)
    assert pipe.getvalue() == "", "unasked"
    with counting():
        work(3)
        doing("reads 10 rows")
        work(10)
        work(2)
    lines = ["  100%", "  reads 10 rows  30%", "  reads 10 rows  60%", "  reads 10 rows  90%", "  reads 10 rows  100%"]
    assert pipe.getvalue().splitlines() == lines and not Progress.open
    monkeypatch.setattr(Progress, "quiet", True)
    with counting():
        work(99)
    assert pipe.getvalue().splitlines() == lines


def test_a_line_of_progress_is_no_longer_than_the_terminal(terminal):
    screen = terminal(COLUMNS="40")
    progress = Progress(9)
    progress.show(1, "figures " * 9)
    progress.show(9, "loss 1")
    assert [len(line.rstrip("\n")) for line in screen.getvalue().split("\r")[1:]] == [39, 39]


def test_a_panel_reads_only_whole_rows_and_survives_their_absence(tmp_path, terminal):
    screen, panel = terminal(), Panel("x", tmp_path, Pace(10))
    assert "step 1 of 10" in (panel.render(1, screen) or "")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 4.5}\n{"step": 2, "train/lo')
    (tmp_path / "rollouts.jsonl").write_text('{"step": 1, "prompt"')
    assert "4.5" in (panel.render(2, screen) or "")
    with (tmp_path / "metrics.jsonl").open("a") as log:
        log.write('ss": 3.25}\n')
    shown = panel.render(3, screen) or ""
    assert re.search(r"train/loss +3.25 +4.5", shown)


def test_quiet_is_an_option_of_the_verbs_that_train(monkeypatch):
    summary = {"run": "x", "status": "done", "metrics": {}, "baseline": {}, "intervals": {}, "time": {"wall_s": 1}}
    seen = []
    monkeypatch.setattr("peftlab.recipes.launch.launch", lambda *_: seen.append(Progress.quiet) or summary)
    monkeypatch.setattr("peftlab.recipes.declared.check_names", lambda _: None)  # the pairs are not there
    monkeypatch.setattr(Progress, "quiet", False)
    for words in ("sft --quiet", "ppo", "reward --quiet --json"):
        assert peftlab(words).code == 0
    assert seen == [True, False, True]
