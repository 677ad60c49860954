"""The run directory: what is written survives, says how the run ended, and guards itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from peftlab.errors import Interrupted, LabError, UserError
from peftlab.runs import atomic
from peftlab.runs.checkpoint import write_manifest
from peftlab.runs.lock import LOCK, is_locked
from peftlab.runs.rundir import RunDir, check_name, ended_runs, find_run, list_runs, read_summary, vacant

CONFIG = 'recipe = "ppo"\nlr = 0.001\n\n[lora]\nr = 16\n'


def make(root, name="job", **options):
    return RunDir.create(root, name, "ppo", CONFIG, **options)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def refuse_constant(text):
    raise AssertionError(f"{text} is not JSON")


def test_a_finished_run_holds_what_the_contract_names(tmp_path):
    run = make(tmp_path, environment={"device": "cpu"})
    with run.session():
        run.record_data("imdb:train", "ab" * 32, 9000)
        run.log({"reward/mean": 1, "reward/part/sentiment": 0.5}, step=1)
        run.write_samples([{"prompt_id": "imdb/1", "side": "before"}])
        run.append_rollouts([{"step": 1, "tokens": []}])
        (run.path / "adapter").mkdir()
        run.finish(
            {"eval/judge": 0.8},
            {"eval/judge": 0.5},
            {"eval/judge": (0.7, 0.9)},
            {"adapter": run.path / "adapter"},
            0.5,
        )
    summary = read_summary(run.path)
    assert summary.pop("time")["wall_s"] >= 0
    assert summary == {
        "schema_version": 1,
        "recipe": "ppo",
        "run": "job",
        "status": "done",
        "reason": None,
        "metrics": {"eval/judge": 0.8},
        "baseline": {"eval/judge": 0.5},
        "intervals": {"eval/judge": [0.7, 0.9]},
        "artifacts": {"adapter": "adapter"},
    }
    environment = json.loads((run.path / "environment.json").read_text())
    assert environment["device"] == "cpu" and environment["data"]["imdb:train"]["rows"] == 9000
    assert {"python", "platform", "cpus", "packages", "argv", "commit"} <= environment.keys()
    assert (run.path / "config.toml").read_text() == CONFIG
    assert [row["kind"] for row in rows(run.path / "events.jsonl")] == ["start", "finish"]
    assert not list(run.path.glob(".*tmp*"))


def test_numbers_that_are_not_finite_become_null(tmp_path):
    run = make(tmp_path)
    with run.session():
        run.log({"policy/loss": float("nan"), "reward/mean": float("-inf")}, step=1)
        run.append_rollouts([{"step": 1, "tokens": [{"value": float("nan")}]}])
        run.finish({"eval/kl": float("inf")}, {"eval/kl": float("nan")}, {"eval/kl": (float("nan"), 1.0)})
    for file in run.path.glob("*.json*"):
        for line in file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]:
            json.loads(line, parse_constant=refuse_constant)
    assert read_summary(run.path)["metrics"] == {"eval/kl": None}


def test_unregistered_metrics_are_a_programmers_error(tmp_path):
    run = make(tmp_path)
    with pytest.raises(KeyError, match="registry"), run.session():
        run.log({"rewards/mean": 1.0}, step=1)
    with pytest.raises(KeyError):
        run.finish({}, {"eval/judgement": 0.5})


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (UserError("no such file"), "failed", "no such file"),
        (LabError("loss is nan"), "failed", "loss is nan"),
        (ZeroDivisionError("division by zero"), "failed", "ZeroDivisionError: division by zero"),
        (Interrupted(signal.SIGTERM), "stopped", "stopped by SIGTERM; --resume continues"),
        (KeyboardInterrupt(), "stopped", "KeyboardInterrupt"),
    ],
)
def test_however_a_run_ends_its_summary_says_so(tmp_path, error, status, reason):
    run = make(tmp_path)
    with pytest.raises(type(error)), run.session():
        run.log({"reward/mean": 1.0, "kl/coef": 0.1}, step=1)
        run.log({"reward/mean": 2.0}, step=2)
        raise error
    summary = read_summary(run.path)
    assert (summary["status"], summary["reason"]) == (status, reason)
    assert summary["metrics"] == {"reward/mean": 2.0, "kl/coef": 0.1}
    assert not is_locked(run.path)


def test_of_a_new_run_that_is_refused_before_its_first_figure_nothing_is_left(tmp_path):
    """But of one that failed, was stopped, was there before, or told the user to look into its folder."""
    refused, left = UserError("no such file"), []
    for name, error in {"refused": refused, "failed": LabError("no"), "stopped": Interrupted(signal.SIGINT)}.items():
        with pytest.raises(type(error)), make(tmp_path, name).session() as run:
            run.event("roles")
            raise error
        left.append(run.path.exists())
    with pytest.raises(UserError), make(tmp_path, "skipped").session() as run:
        run.record_skipped("train", [("mine.jsonl:1", "text: empty")])
        raise refused
    begun = make(tmp_path, "begun")
    begun.log({"reward/mean": 1.0}, 1)
    with pytest.raises(UserError), make(tmp_path, "begun", resume=True).session():
        raise refused
    assert left == [False, True, True]
    assert {path.name for path in tmp_path.iterdir()} == {"failed", "stopped", "skipped", "begun"}
    assert all(read_summary(path)["status"] in ("failed", "stopped") for path in tmp_path.iterdir())


def test_a_run_that_takes_a_name_over_has_no_rows_of_the_one_before(tmp_path):
    with pytest.raises(Interrupted), make(tmp_path).session() as first:
        first.record_skipped("train", [("mine.jsonl:1", "text: empty")])
        first.event("roles")
        raise Interrupted(signal.SIGINT)
    with make(tmp_path).session() as run:
        assert not (run.path / "skipped.jsonl").exists()
        assert [row["kind"] for row in atomic.read_rows(run.path / "events.jsonl")] == ["start"]
        run.finish({}, {})


def test_a_refusal_deletes_no_folder_that_was_there_before_it(tmp_path):
    """An earlier run that failed, which the command replaces; an empty folder; one behind a link."""
    failed, empty, behind = (tmp_path / name for name in ("failed", "empty", "behind"))
    with pytest.raises(LabError), make(tmp_path, "failed").session():
        raise LabError("no")
    (failed / "report.html").touch()
    before = {path.name for path in failed.iterdir()}
    empty.mkdir()
    behind.mkdir()
    (tmp_path / "link").symlink_to(behind)
    for name in ("failed", "empty", "link"):
        with pytest.raises(UserError), make(tmp_path, name).session():
            raise UserError("no GPU")
    assert {path.name for path in failed.iterdir()} == before and "config.toml" in before
    assert empty.is_dir() and (tmp_path / "link").is_symlink() and behind.is_dir()
    assert all(read_summary(tmp_path / name)["reason"] == "no GPU" for name in ("failed", "empty", "link"))
    assert all(vacant(tmp_path / name) for name in ("failed", "empty", "link"))


@pytest.mark.parametrize("most", range(5))
def test_a_refusal_that_is_killed_while_it_deletes_leaves_the_name_free(tmp_path, monkeypatch, most):
    unlink, gone = Path.unlink, []

    def killed(path, **given):
        gone.append(path)
        if len(gone) > most:
            raise KeyboardInterrupt
        unlink(path, **given)

    run = make(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), run.session():
        patch.setattr(Path, "unlink", killed)
        raise UserError("no such file")
    assert (run.path / LOCK).is_file() and vacant(run.path), gone
    with pytest.raises(UserError), make(tmp_path).session():
        raise UserError("no such file")
    assert run.path.exists() == (most < 4), "what had only the lock left is as new"


def test_a_recipe_that_forgets_its_figures_fails(tmp_path):
    run = make(tmp_path)
    with pytest.raises(LabError, match="finish"), run.session():
        pass
    assert read_summary(run.path)["status"] == "failed"


def test_an_error_after_the_figures_leaves_them(tmp_path):
    run = make(tmp_path)
    with pytest.raises(ZeroDivisionError), run.session():
        run.finish({"eval/judge": 0.8}, {})
        raise ZeroDivisionError
    assert read_summary(run.path)["status"] == "done"


def test_a_fresh_run_never_enters_another_ones_folder(tmp_path):
    make(tmp_path)
    with pytest.raises(UserError, match="--resume"):
        make(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("meow")
    with pytest.raises(UserError, match="not empty"):
        make(tmp_path, "photos")
    with pytest.raises(UserError, match="not empty"):
        make(tmp_path, "photos", resume=True)
    assert (tmp_path / "photos" / "cat.jpg").read_text() == "meow"


def test_resume_wants_the_same_job(tmp_path):
    make(tmp_path)
    with pytest.raises(UserError, match=r"lora\.r \(16 there, 8 now\)") as caught:
        RunDir.create(tmp_path, "job", "ppo", CONFIG.replace("16", "8") + "alpha = 4\n", resume=True)
    assert "lora.alpha ('absent' there, 4 now)" in str(caught.value) and "lr" not in str(caught.value)
    with pytest.raises(UserError, match="is a ppo run"):
        RunDir.create(tmp_path, "job", "sft", CONFIG, resume=True)
    with pytest.raises(UserError, match="no run 'jab'"):
        make(tmp_path, "jab", resume=True)
    assert make(tmp_path, resume=True).resumed
    assert not make(tmp_path, "demo/ppo", resume=True).resumed, "a stage not reached yet starts fresh"


def test_resume_of_a_finished_run_keeps_its_figures(tmp_path):
    run = make(tmp_path)
    with run.session():
        run.finish({"eval/judge": 0.8}, {})
    again = make(tmp_path, resume=True)
    with again.session():
        assert again.finished and again.summary["metrics"] == {"eval/judge": 0.8}
    assert read_summary(run.path)["metrics"] == {"eval/judge": 0.8}


def test_resume_cuts_what_came_after_the_checkpoint(tmp_path):
    run = make(tmp_path)
    with pytest.raises(Interrupted), run.session():
        for step in range(1, 6):
            run.log({"reward/mean": step}, step)
            run.append_rollouts([{"step": step}])
            if step == 3:
                with run.checkpoints.stage(3):
                    pass
                run.log({"reward/std": step}, step)
        raise Interrupted(signal.SIGINT)
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "time": 9')  # torn by a kill
    again = make(tmp_path, resume=True)
    with again.session():
        assert not again.finished and not (run.path / "summary.json").exists()
        again.cut_back(again.checkpoints.newest_verified()[0])
        again.log({"reward/mean": 40.0}, 4)
        again.finish({}, {})
    logged = rows(run.path / "metrics.jsonl")
    assert [(row["step"], row.get("reward/mean")) for row in logged] == [(1, 1), (2, 2), (3, 3), (4, 40)]
    assert [row["time"] for row in logged] == sorted(row["time"] for row in logged)
    assert [row["step"] for row in rows(run.path / "rollouts.jsonl")] == [1, 2, 3]


def test_a_checkpoint_that_tells_no_lengths_is_cut_back_to_by_step(tmp_path):
    """As those of older versions: the figures of its own step stay."""
    run = make(tmp_path)
    (run.path / "metrics.jsonl").write_text("".join(f'{{"step": {n}, "time": {n}.0}}\n' for n in range(1, 5)))
    with run.checkpoints.stage(2):
        pass
    folder = run.checkpoints.path(2)
    (folder / "logs.json").unlink()
    write_manifest(folder)
    again = make(tmp_path, resume=True)
    with again.session():
        again.cut_back(again.checkpoints.newest_verified()[0])
        assert [row["step"] for row in rows(run.path / "metrics.jsonl")] == [1, 2]
        again.finish({}, {})


def test_wall_time_counts_the_work_that_a_resume_keeps(tmp_path):
    run = make(tmp_path)
    (run.path / "metrics.jsonl").write_text('{"step": 1, "time": 1000.0}\n')
    with run.checkpoints.stage(1):
        pass
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "time": 5000.0}\n')
    again = make(tmp_path, resume=True)
    with again.session():
        again.cut_back(again.checkpoints.newest_verified()[0])
        assert 1000 <= again.finish({}, {})["time"]["wall_s"] < 5000


def test_resume_refuses_other_data(tmp_path):
    make(tmp_path).record_data("imdb:train", "aa", 10)
    again = make(tmp_path, resume=True)
    again.record_data("imdb:train", "aa", 10)
    with pytest.raises(UserError, match="imdb:train"):
        again.record_data("imdb:train", "bb", 10)


def test_resume_refuses_another_model_of_the_same_name(tmp_path):
    make(tmp_path).record_model("judge imdb-judge", "aa")
    again = make(tmp_path, resume=True)
    again.record_model("judge imdb-judge", "aa")
    again.record_model("reward mine", "cc")
    with pytest.raises(UserError, match="judge imdb-judge is not what run 'job' began with .*aa then, bb now"):
        again.record_model("judge imdb-judge", "bb")


def test_what_can_be_resumed_has_ended_and_left_work(tmp_path):
    ended = {"none": LabError("no such data"), "figures": LabError("nan"), "stopped": Interrupted(signal.SIGINT)}
    for name, error in ended.items():
        run = make(tmp_path, name)
        with pytest.raises(type(error)), run.session():
            if name != "none":
                run.log({"reward/mean": 1.0}, 1)
            raise error
    killed = make(tmp_path, "killed")
    with killed.checkpoints.stage(3) as folder:
        (folder / "state").write_text("x")
    make(tmp_path, "killed-at-once")
    RunDir.create(tmp_path, "other", "sft", CONFIG).log({"train/loss": 1.0}, 1)
    done = make(tmp_path, "done")
    with done.session():
        done.finish({}, {})
    with make(tmp_path, "busy").session() as busy:
        busy.log({"reward/mean": 1.0}, 1)
        found = [(folder.name, status) for folder, status in ended_runs(tmp_path, "ppo")]
        busy.finish({}, {})
    assert found == [("figures", "failed"), ("stopped", "stopped"), ("killed", "killed"), ("done", "done")]
    assert ended_runs(tmp_path / "nowhere", "ppo") == []


def test_two_processes_cannot_share_a_run(tmp_path):
    run = make(tmp_path)
    with run.session():
        assert is_locked(run.path)
        with pytest.raises(UserError, match=f"process {os.getpid()}"):
            make(tmp_path, resume=True)
        assert list_runs(tmp_path)[0]["status"] == "running"
        run.finish({}, {})
    assert not is_locked(run.path)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a b", "../up", "/etc", "a/b/c", "é", "x" * 65, "a\n", "demo/.."]
)
def test_names_that_could_lead_elsewhere_are_refused(tmp_path, name):
    with pytest.raises(UserError):
        make(tmp_path / "runs", name)
    assert not (tmp_path / "runs").exists()
    with pytest.raises(UserError):
        check_name(name)


def test_listing_shows_stages_and_how_each_run_ended(tmp_path):
    demo = make(tmp_path, "demo")
    stage = make(tmp_path, "demo/sft")
    with stage.session():
        stage.finish({}, {})
    killed = make(tmp_path, "killed")
    killed.log({"reward/mean": 1.0}, 1)
    with demo.session():
        demo.finish({}, {}, stages={"sft": stage.summary})
    assert [(run["run"], run["status"]) for run in list_runs(tmp_path)] == [
        ("demo", "done"),
        ("demo/sft", "done"),
        ("killed", "killed"),
    ]
    assert read_summary(demo.path)["stages"]["sft"]["run"] == "demo/sft"
    assert find_run(tmp_path, "demo/sft") == stage.path == find_run(tmp_path / "elsewhere", str(stage.path))
    with pytest.raises(UserError, match="runs: demo, demo/sft, killed"):
        find_run(tmp_path, "dmeo")
    with pytest.raises(UserError, match=r"did you mean demo/sft\?$"):
        find_run(tmp_path, "demo/stf")
    assert list_runs(tmp_path / "nowhere") == []


def test_a_demo_that_ends_early_still_tells_of_its_stages(tmp_path):
    demo = make(tmp_path, "demo")
    with pytest.raises(LabError), demo.session():
        stage = make(tmp_path, "demo/sft")
        with stage.session():
            stage.finish({"eval/perplexity": 60.0}, {})
        raise LabError("ppo diverged")
    assert read_summary(demo.path)["stages"]["sft"]["metrics"] == {"eval/perplexity": 60.0}


def test_a_summary_of_something_else_is_named(tmp_path):
    (tmp_path / "summary.json").write_text('{"schema_version": 7}')
    with pytest.raises(UserError, match="schema_version 1"):
        read_summary(tmp_path)
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(UserError, match="cannot read"):
        read_summary(tmp_path)


def test_appending_to_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    file = tmp_path / "metrics.jsonl"
    atomic.append_line(file, {"step": 1})
    before, real, calls = file.read_bytes(), os.write, []

    def full(handle, data):
        if calls:
            raise OSError(28, "No space left on device")
        calls.append(handle)
        return real(handle, data[:5])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(LabError, match="No space left"):
        atomic.append_line(file, {"step": 2})
    assert file.read_bytes() == before


def test_replacing_a_file_is_all_or_nothing(tmp_path, monkeypatch):
    file = tmp_path / "summary.json"
    atomic.write_json(file, {"a": 1})
    monkeypatch.setattr(
        os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(LabError, match="No space left"):
        atomic.write_json(file, {"a": 2})
    assert json.loads(file.read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_text_that_utf8_cannot_carry_is_still_written(tmp_path):
    atomic.write_rows(tmp_path / "rows.jsonl", [{"text": "\ud800 \x1b]52;c;x\x07 \u202e é"}])
    assert (tmp_path / "rows.jsonl").read_bytes().isascii()
    assert list(atomic.read_rows(tmp_path / "rows.jsonl")) == [{"text": "\ud800 \x1b]52;c;x\x07 \u202e é"}]
    atomic.write_text(tmp_path / "page.html", "\ud800")


def test_a_signal_asks_and_the_handlers_come_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    outer, inner = make(tmp_path, "demo"), make(tmp_path, "demo/ppo")
    with outer.session():
        with inner.session():
            assert inner.stop_requested is None
            os.kill(os.getpid(), signal.SIGTERM)
            assert inner.stop_requested == signal.SIGTERM == outer.stop_requested
            inner.finish({}, {})
        outer.finish({}, {})
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_off_the_main_thread_everything_but_signals_works(tmp_path):
    summaries = []

    def work():
        run = make(tmp_path)
        with run.session():
            summaries.append(run.finish({}, {}))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert summaries[0]["status"] == "done"


STUBBORN = """
import sys, time
from pathlib import Path
from peftlab.errors import Interrupted
from peftlab.runs.rundir import RunDir
run = RunDir.create(Path(sys.argv[1]), "job", "ppo", "a = 1")
with run.session(), run.stepping():
    for step in map(int, sys.argv[3:]):
        with run.checkpoints.stage(step):
            pass
    print("ready", flush=True)
    while run.stop_requested is None or sys.argv[2] == "deaf":
        time.sleep(0.01)
    raise Interrupted(run.stop_requested)
"""


@pytest.mark.parametrize(
    ("signum", "saved", "told"),
    [
        (signal.SIGINT, [], b"left at once; --resume goes on from the start, since there is no checkpoint yet\n"),
        (signal.SIGTERM, [7, 12], b"left at once; --resume goes on after step 12\n"),
    ],
)
def test_the_first_signal_stops_the_run_and_the_second_leaves_at_once(tmp_path, signum, saved, told):
    child = subprocess.Popen(
        [sys.executable, "-c", STUBBORN, tmp_path, "deaf", *map(str, saved)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert child.stdout.readline() == b"ready\n"
    child.send_signal(signum)
    assert b"stopping after this step" in child.stderr.readline() + child.stderr.readline()
    child.send_signal(signum)
    assert child.communicate(timeout=60) == (b"", told)
    assert child.returncode == 128 + signum
    assert list_runs(tmp_path)[0]["status"] == "killed"

    resumed = make_child(tmp_path / "polite")
    resumed.send_signal(signum)
    _, errors = resumed.communicate(timeout=60)
    assert f"stopped by {signum.name}".encode() in errors
    assert read_summary(tmp_path / "polite" / "job")["status"] == "stopped"


def test_the_second_signal_leaves_also_where_the_disk_tells_nothing(tmp_path):
    """And of a stage it is the demo that says how to go on."""
    code = """
import os, signal
from peftlab.runs.signals import StopSignals
def broken():
    raise OSError("no disk")
with StopSignals(broken), StopSignals(lambda: "goes on from the stage"):
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stderr.splitlines()[-1] == "left at once; --resume goes on from the last checkpoint"


def make_child(root):
    child = subprocess.Popen(
        [sys.executable, "-c", STUBBORN, root, "polite"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdout.readline() == b"ready\n"
    return child


def test_runs_and_report_import_no_torch():
    code = (
        "import sys, pkgutil, importlib, peftlab.runs, peftlab.report\n"
        "for package in (peftlab.runs, peftlab.report):\n"
        "    for module in pkgutil.iter_modules(package.__path__, package.__name__ + '.'):\n"
        "        importlib.import_module(module.name)\n"
        "print([name for name in ('torch', 'transformers', 'datasets', 'numpy') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
