"""`peftlab inspect`: recorded rollouts in the terminal, whatever they hold and however narrow it is."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys

import fake_runs
import pytest
from commands import peftlab
from fake_runs import record, rollout_row
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from peftlab.errors import LabError
from peftlab.recipes.inspect_view import show_rollouts
from peftlab.report import render
from peftlab.report.alarms import Alarm
from peftlab.report.recorded import COLUMNS, MEASURES, read_recorded, rows_at
from peftlab.runs.rundir import RunDir

HOSTILE = "\x1b]0;hacked\x07\x1b[31m[bold]x[/nothing]\u202e\x9b2J\r\ud800"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with runs/ppo, in which commands run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    fake_runs.ppo_run(tmp_path / "runs")
    return tmp_path


def test_the_terminal_shows_every_number_of_the_file(here):
    done = peftlab("inspect ppo --step 10 --prompt 2 --by kl")
    assert done.code == 0 and done.err == ""
    (recorded,) = [
        found
        for line in (here / "runs/ppo/rollouts.jsonl").read_text().splitlines()
        if (found := json.loads(line))["step"] == 10 and found["prompt_id"] == "imdb/9002"
    ]
    assert "ppo: step 10 (recorded: 1, 10, 20, 40), prompt 2 (0 to 3), id imdb/9002" in done.out
    assert "This movie is" in done.out
    table = [line.split() for line in done.out.splitlines() if re.match(r" ?\d+ ", line)]
    assert len(table) == len(recorded["tokens"])
    columns = ("logprob", "ref_logprob", "kl", "value", "reward", "advantage")
    for line, token in zip(table, recorded["tokens"], strict=True):
        assert line[1] == token["token"].replace(" ", "·").replace("\n", r"\n")
        assert [float(cell) for cell in line[2:]] == pytest.approx([token[name] for name in columns], abs=5.1e-4)
    assert max(map(len, done.out.splitlines())) <= 80 and "\x1b" not in done.out
    quiet = "Independent judge, Reward parts, Length, Entropy, Distinct word pairs, KL to the reference"
    assert f"no alarm: {quiet}" in " ".join(done.out.split())


def test_a_run_too_short_for_a_check_says_why(here):
    fake_runs.ppo_run(here / "runs", "short", steps=2)
    told = " ".join(peftlab("inspect short").out.split())
    assert "short: step 2 (recorded: 1, 2)" in told
    assert re.search(r"not checked, measured in only 2 steps of the 3 that it takes: (\w+, )*KL\b", told)


def test_the_defaults_are_the_last_step_and_its_first_prompt(here):
    assert peftlab("inspect ppo").out == peftlab("inspect ppo --step 40 --prompt 0 --by advantage").out
    assert peftlab("inspect ppo --prompt imdb/9000").out == peftlab("inspect ppo --prompt 0 --step 40").out
    rows = json.loads(peftlab("inspect ppo --json").out)
    assert [(row["step"], row["prompt_id"]) for row in rows] == [(40, "imdb/9000")]


def test_what_is_recorded_is_listed(here):
    lines = peftlab("inspect ppo --list").out.splitlines()
    assert len(lines) == 17 and all(len(line) <= 80 for line in lines)
    assert lines[1].split()[:4] == ["1", "0", "imdb/9000", "1"] and "I went into this" in lines[1]
    listed = json.loads(peftlab("inspect ppo --list --step 20 --json").out)
    assert [(row["step"], row["prompt"], row["answers"]) for row in listed] == [(20, number, 1) for number in range(4)]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("ppo --step 7", "--step 7: run ppo has no rollouts of it; recorded: 1, 10, 20, 40"),
        ("ppo --step 7 --list", "--step 7: nothing is recorded of it; recorded: 1, 10, 20, 40"),
        ("ppo --prompt 4", "--prompt 4: not recorded at step 40 of run ppo; give 0 to 3, or an id: 0 is imdb/9000, 1 "),
        ("ppo --prompt imdb/1", "--prompt imdb/1: not recorded at step 40"),
        ("ppo --by value", "--by value: give one of advantage, kl, reward"),
        ("ppa", "no run 'ppa' below runs; runs: ppo"),
    ],
)
def test_what_is_not_there_is_told(here, line, told):
    done = peftlab(f"inspect {line}")
    assert done.code == 2 and done.out == "" and told in done.err


def test_a_run_without_rollouts_says_what_it_has_instead(here):
    fake_runs.demo_run(here / "runs")
    for recipe in ("dpo", "sft", "rloo"):
        record(here / "runs", [], recipe, recipe)
    told = {name: peftlab(f"inspect {name}") for name in ("dpo", "sft", "rloo", "demo")}
    assert {done.code for done in told.values()} == {2}
    assert "dpo run: it learns from pairs" in told["dpo"].err and "`peftlab report dpo`" in told["dpo"].err
    assert "ppo and rloo record them" in told["sft"].err
    assert "no rollouts yet" in told["rloo"].err
    assert "demo/ppo" in told["demo"].err and peftlab("inspect demo/ppo").code == 0


def test_a_run_that_failed_says_why_it_has_no_rollouts(here):
    with pytest.raises(LabError), RunDir.create(here / "runs", "wrong", "ppo", 'recipe = "ppo"\n').session():
        raise LabError("the disk is full")
    told = peftlab("inspect wrong")
    assert (told.code, told.out) == (2, "") and "run wrong has no rollouts; failed: the disk is full" in told.err


def test_all_answers_of_rloo_to_a_prompt_are_shown(here):
    answers = [rollout_row(1, "a", score=score) for score in (1.0, -1.0, 0.5, 0.0)]
    record(here / "runs", answers, "rloo", "rloo")
    done = peftlab("inspect rloo")
    assert done.out.count(" so good it was") == 4 and "reward +1.00; parts:  fun +1.50" in done.out
    assert "better than the other answers to the prompt" in " ".join(done.out.split())
    assert "value" not in done.out and "reward  adv" not in done.out, "columns that the tokens lack"
    refused = peftlab("inspect rloo --by reward")
    assert refused.code == 2 and "the rollouts have advantage, kl" in refused.err


def test_a_prompt_that_came_again_names_its_other_steps(here):
    """As options to copy: an id may be a number itself."""
    rows = [rollout_row(step, name) for step, name in [(1, "7"), (5, "0"), (5, "7"), (9, "b"), (9, "c")]]
    record(here / "runs", rows, name="again")
    told = peftlab("inspect again --prompt 7").out
    assert "step 5 (" in told, "the last step that has it"
    assert "The same prompt at other steps: --step 1 --prompt 0\n" in told
    assert "The same prompt at other steps: --step 5 --prompt 1\n" in peftlab("inspect again --step 1").out
    assert "step 5 (recorded: 1, 5, 9), prompt 1 (0 to 1), id 7\n" in peftlab("inspect again --step 5 --prompt 1").out
    assert "step 1 (recorded: 1, 5, 9), prompt 0 (0), id 7\n" in peftlab("inspect again --step 1 --prompt 0").out
    assert "run again; give 0, or an id: 0 is 7;" in peftlab("inspect again --step 1 --prompt 1").err
    assert "other steps" not in peftlab("inspect again").out


def screen(answers, by, scales, width, alarms=(), place="run", **options):
    """What `show_rollouts` prints on a console so wide."""
    out = io.StringIO()
    console = Console(file=out, width=width, _environ={"TERM": "xterm"} if options else {}, **options)
    show_rollouts(place, answers, by, scales, "--step 2 --prompt 0", alarms, console)
    return out.getvalue()


def test_colours_need_a_terminal_and_text_cannot_steer_it(tmp_path):
    path = record(tmp_path, [rollout_row(1, HOSTILE, prompt=HOSTILE, score_parts={HOSTILE: 1.0})])
    rows, scales = rows_at(path, {0}), read_recorded(path).scales
    rows[0]["tokens"][1]["token"] = HOSTILE
    alarms = [Alarm("Length", True, f"Since step 1 {HOSTILE}.", 1)]
    colour = screen(rows, "kl", scales, 120, alarms, HOSTILE, force_terminal=True, color_system="standard")
    plain = screen(rows, "kl", scales, 120, alarms, HOSTILE)
    assert set(re.findall(r"\x1b\[([\d;]*)m", colour)) <= {"0", "1", "2", "36", "35", "7;36", "7;35", "1;31"}
    assert "by KL: + the policy likes the token more" in " ".join(plain.split())
    full = scales["kl"]
    assert f"; the signs in column kl say which, strong from {full / 2:.2g} on" in " ".join(plain.split())
    assert "reversed" in colour and "reversed" not in plain and "signs" not in colour
    for out in (re.sub(r"\x1b\[[\d;]*m", "", colour), plain):
        assert not set("\x1b\x07\x9b\u202e\r\ud800") & set(out)
        seen = out.replace("\n", "")
        assert "Since step 1 ⟨U+001B⟩]0;hacked⟨U+0007⟩⟨U+001B⟩[31m[bold]x[/nothing]⟨U+202E⟩⟨U+009B⟩2J" in seen
        assert "prompt: ⟨U+001B⟩]0;hacked⟨U+0007⟩" in seen
        assert re.search(r"2 ⟨U\+001B⟩\]0;hacke", out), "in the table, too"


@given(st.text(max_size=30), st.integers(16, 100), st.sampled_from(MEASURES))
def test_no_width_and_no_text_breaks_a_number(token, width, by):
    """Whatever is left out, a number that is shown is whole, and the column that was asked for is there."""
    row = rollout_row(1, "a", 0.5)
    row["tokens"] = [
        {"token": token, **{name: -at - index / 7 for index, name in enumerate(COLUMNS)}} for at in range(3)
    ]
    lines = screen([row], by, dict.fromkeys(MEASURES, 1.0), width).splitlines()
    assert all(cell_len(line.rstrip()) <= width for line in lines)
    at = next(place for place, line in enumerate(lines) if re.match("# tok", line))
    shown = lines[at].split()[2:]
    assert by in shown
    for number, line in enumerate(lines[at + 1 : at + 4]):
        wanted = [f"{-number - COLUMNS.index('ref_logprob' if name == 'ref' else name) / 7:.3f}" for name in shown]
        assert [cell.replace("-0.000", "0.000") for cell in line.split()[-len(shown) :]] == [
            cell.replace("-0.000", "0.000") for cell in wanted
        ]
    left_out = set(COLUMNS) - {"ref_logprob" if name == "ref" else name for name in shown}
    assert ("no room for" in " ".join(lines)) is bool(left_out)


def test_no_colours_where_none_are_wanted(here):
    env = {"TERM": "xterm", "FORCE_COLOR": "1", "COLUMNS": "80"}
    code = (
        "import sys; from peftlab import cli; sys.argv = ['peftlab', 'inspect', 'ppo']; cli.main(); "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    for more, coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
        done = subprocess.run([sys.executable, "-c", code], env=os.environ | env | more, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert ("\x1b[36m" in done.stdout) is coloured
        assert ("\x1b[7" in done.stdout) is coloured, "reversed text says nothing without its colour"


def test_rows_that_are_not_what_they_should_be(here):
    wrong = [{"step": "x", "tokens": 3}, {"tokens": [1, {"token": None, "kl": "a"}]}]
    wrong += [{"step": 2, "score": [], "prompt": 3}]
    path = record(
        here / "runs", [*wrong, rollout_row(2, "a", tokens=[{"token": "x", "kl": float("nan")}])], name="wrong"
    )
    render(path)
    for line in ("inspect wrong --list", "inspect wrong --list --json"):
        assert peftlab(line).code == 0
    refused = peftlab("inspect wrong")
    assert refused.code == 2 and "no number to colour by" in refused.err
