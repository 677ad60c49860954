"""`peftlab eval` of real tiny runs: the run's own figures again, win rates, frontiers, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import tiny
from commands import peftlab

from peftlab.recipes.launch import launch
from peftlab.runs.atomic import read_rows
from peftlab.runs.metrics import metric

pytestmark = pytest.mark.usefixtures("one_thread")
RUNS = {
    "ppo": ["reward={root}/runs/liking + 0.5*rubric:length", "steps=3", "save_every=2"],
    "rloo": ["reward={root}/runs/liking", "seed=3"],
    "dpo": [],
}


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> dict[str, str]:
    """The workshop with a judge, a reward, and a run of each recipe that trains a policy, judged by that judge."""
    root = tmp_path_factory.mktemp("policy-eval")
    shop = tiny.workshop(root) | {"root": str(root)}
    for seed, name in enumerate(("judge", "liking")):
        launch("classify", None, tiny.overrides(shop, "classify", f"seed={seed}"), root / "runs", name)
    for verb, pairs in RUNS.items():
        given = [pair.format(**shop) for pair in ("judge={root}/runs/judge", *pairs)]
        launch(verb, None, tiny.overrides(shop, verb, *given), root / "runs", verb)
    other = tiny.write_rows(root / "other.jsonl", [{"prompt": row["text"]} for row in tiny.reviews(5, seed=9)])
    return shop | {"other": other}


@pytest.fixture(autouse=True)
def at_home(shop, monkeypatch) -> None:
    """Runs are looked up below the working directory."""
    monkeypatch.chdir(shop["root"])


def told(line: str, **names: str) -> dict[str, Any]:
    outcome = peftlab(f"eval {line} --device cpu --json", **names)
    assert outcome.code == 0, outcome
    return json.loads(outcome.out)


def bytes_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("verb", RUNS)
def test_one_sample_a_prompt_gives_the_runs_own_figures_and_the_run_stays_as_it_is(verb):
    folder = Path("runs", verb)
    before = bytes_in(folder)
    found = told(verb)
    assert bytes_in(folder) == before
    summary = json.loads(before["summary.json"])
    for table in ("metrics", "baseline", "intervals"):
        again = {name: value for name, value in found[table].items() if name in summary[table]}
        assert again["eval/kl"] == summary[table]["eval/kl"]
        for name, value in again.items():  # a reward of another process has its own rounding
            assert value == pytest.approx(summary[table][name], rel=1e-5, abs=1e-6)
        assert again.keys() >= ({"eval/kl", "eval/judge"} | ({"eval/reward"} if verb != "dpo" else set()))
    assert all(metric(name) for table in ("metrics", "baseline", "intervals") for name in found[table])
    assert found["metrics"].keys() == found["baseline"].keys()
    assert found["metrics"].keys() >= {"eval/self_bleu_4", "eval/reference_perplexity", "eval/perplexity_ratio"}
    ratio = found["metrics"]["eval/reference_perplexity"] / found["baseline"]["eval/reference_perplexity"]
    assert found["metrics"]["eval/perplexity_ratio"] == pytest.approx(ratio)
    assert found["prompts"] == 6 and found["baseline"]["eval/kl"] == 0


@pytest.mark.parametrize("verb", RUNS)
def test_the_last_checkpoint_is_the_end_and_an_earlier_one_is_not(verb):
    end, steps = told(f"runs/{verb}"), sorted(int(p.name[5:]) for p in Path("runs", verb, "checkpoints").iterdir())
    for step in steps:
        same = told(f"{verb} --checkpoint {step}")["metrics"] == end["metrics"]
        assert same == (step == steps[-1])
    assert len(steps) == (2 if verb == "ppo" else 1)


def test_more_samples_and_other_prompts(shop):
    found = told("ppo --samples 3 --data {other} --limit 4", **shop)
    assert (found["prompts"], found["samples"]) == (4, 3)
    assert 0 < found["metrics"]["eval/kl"] != told("ppo")["metrics"]["eval/kl"]
    assert found["sha256"] != told("ppo")["sha256"]


def test_a_policy_against_itself_is_a_draw_and_the_other_way_round_the_rate_is_mirrored():
    assert told("ppo --against ppo --samples 2")["metrics"]["compare/win_rate"] == 0.5
    there, back = (told(f"{one} --against {other} --samples 3 --tie-margin 0")
                   for one, other in (("ppo", "dpo"), ("dpo", "ppo")))
    # The seeds of both runs are one, so that each policy gives the same answers on either side.
    assert there["metrics"]["compare/win_rate"] == pytest.approx(1 - back["metrics"]["compare/win_rate"])
    assert there["metrics"]["eval/judge"] == pytest.approx(back["baseline"]["eval/judge"])
    assert (there["by"], there["against"]) == ("eval/judge", "runs/dpo")
    assert there["metrics"]["compare/ties"] < 1 and all(metric(name) for name in there["metrics"])


def test_against_a_model_by_a_reward_of_ones_own(shop):
    """A base of another seed shares neither weights nor answers; its answers are measured by the same line."""
    shop = shop | {"gpt2b": str(tiny.causal_folder(Path(shop["root"]) / "gpt2b", seed=5))}
    for model in ("{gpt2}", "{gpt2b}"):
        found = told(f"ppo --against {model} --by 'rubric:length + 2*rubric:ended' --samples 2", **shop)
        assert found["by"] == "rubric:length + 2*rubric:ended" and 0 <= found["baseline"]["eval/reward"] <= 3
    done = peftlab("eval ppo --against {gpt2} --device cpu", **shop)
    assert re.findall(r"texts written by (.+), \d+ a second", done.err) == ["the policy", shop["gpt2"]]
    table = done.out
    assert "compare/win_rate_length_matched" in table and "baseline" in table


def test_the_frontier_has_every_checkpoint_and_a_bound_above_best_of_n(shop, tmp_path):
    chart = tmp_path / "out.svg"
    found = told(f"--frontier ppo rloo dpo --samples 2 --reference-samples 16 --chart {chart}")
    assert [(p["run"], p["step"]) for p in found["points"]] == [
        ("runs/ppo", 2), ("runs/ppo", 3), ("runs/rloo", 2), ("runs/dpo", 2)
    ]
    assert found["points"][1]["kl"] == pytest.approx(told("ppo --samples 2")["metrics"]["eval/kl"])
    by = {"eval/judge", "the reward"}
    assert found["curves"].keys() == {f"{curve} by {name}" for curve in ("tilted", "best of n") for name in by}
    starts = [places[0] for places in found["curves"].values()]
    assert all(place["kl"] == 0 and place["value"] == pytest.approx(starts[0]["value"]) for place in starts)
    best, by_reward = (found["curves"][f"best of n by {name}"] for name in ("eval/judge", "the reward"))
    assert [place["at"] for place in best] == [1, 2, 4]
    assert all(own["value"] >= other["value"] - 1e-9 for own, other in zip(best, by_reward, strict=True))
    assert json.loads(chart.with_suffix(".json").read_text())["points"] == found["points"]
    marks = [e for e in ET.parse(chart).getroot().iter() if e.get("class") == "mark"]
    assert len(marks) == len(found["points"]) + 3
    table = peftlab(f"eval --frontier ppo --reference-samples 4 --chart {chart} --device cpu").out
    assert "ppo, step 3" in table and "best of n by eval/judge, 1" in table and str(chart) in table


def test_a_run_under_way_is_measured_by_a_checkpoint_and_a_frontier_may_have_it(tmp_path):
    folder = Path("runs", "under-way")
    shutil.copytree(Path("runs", "ppo"), folder)
    shutil.rmtree(folder / "adapter")
    (folder / "summary.json").unlink()
    outcome = peftlab("eval under-way --device cpu")
    assert outcome.code == 2 and "has not ended" in outcome.err and "--checkpoint STEP, of 2, 3" in outcome.err
    assert told("under-way --checkpoint 3")["metrics"] == told("ppo")["metrics"]
    shutil.rmtree(folder / "checkpoints")
    outcome = peftlab(f"eval --frontier ppo under-way --device cpu --chart {tmp_path / 'a.svg'}")
    assert outcome.code == 2 and "neither a checkpoint nor an adapter" in outcome.err


def test_without_checkpoints_the_end_is_measured_but_its_rewards_scale_is_gone():
    folder = Path("runs", "bare")
    shutil.copytree(Path("runs", "ppo"), folder)
    shutil.rmtree(folder / "checkpoints")
    found, whole = told("bare"), told("ppo")
    assert {n for n in whole["metrics"] if n not in found["metrics"]} == {
        "eval/reward", "eval/part/liking", "eval/part/length"
    }
    assert found["metrics"].items() <= whole["metrics"].items()


def test_what_changed_since_the_run_is_told():
    judge = Path("runs", "judge", "adapter")
    kept = bytes_in(judge)
    try:
        shutil.rmtree(judge)
        shutil.copytree(Path("runs", "liking", "adapter"), judge)
        outcome = peftlab("eval ppo --device cpu")
        assert outcome.code == 2 and "judge" in outcome.err and "restore it" in outcome.err
    finally:
        for name, content in kept.items():
            (judge / name).write_bytes(content)


@pytest.mark.parametrize(("line", "words"), [
    ("ppo --checkpoint 7", ["--checkpoint 7", "there are 2, 3"]),
    ("ppo --samples 0", ["--samples 0"]),
    ("ppo --limit 0", ["--limit 0"]),
    ("ppo --by eval/judge", ["--by", "--against"]),
    ("ppo --against dpo --by eval/accuracy", ["--by eval/accuracy", "eval/judge"]),
    ("ppo --against dpo --by rubric:tone", ["rubric:tone"]),
    ("ppo --against {encoder}", ["encoder"]),
    ("ppo --against {root}/runs/judge", ["classifier", "causal"]),
    ("ppo --against dpo --tie-margin -1", ["--tie-margin"]),
    ("ppo --columns prompt=x", ["--columns"]),
    ("ppo --frontier --checkpoint 2", ["--frontier", "--checkpoint"]),
    ("ppo dpo", ["2 names", "--frontier"]),
    ("{gpt2} --data {texts} --samples 2", ["--samples", "gpt2", "runs of ppo, rloo or dpo"]),
    ("runs/judge --against ppo", ["--against", "runs/judge"]),
    ("--frontier ppo {gpt2}", ["--frontier", "gpt2"]),
])
def test_a_wrong_command_is_one_message(shop, line, words):
    outcome = peftlab(f"eval {line} --device cpu", **shop)
    assert outcome.code == 2 and outcome.err.startswith("peftlab: "), outcome
    assert all(word in outcome.err for word in words), outcome.err


def test_runs_that_are_not_alike_are_not_drawn_together(shop):
    folder = Path("runs", "longer")
    shutil.copytree(Path("runs", "rloo"), folder)
    config = folder / "config.toml"
    config.write_text(config.read_text().replace("max_new_tokens = 8", "max_new_tokens = 9"))
    outcome = peftlab("eval --frontier ppo longer --device cpu")
    assert outcome.code == 2 and all(word in outcome.err for word in ("longer", "max_new_tokens", "9", "8"))
    assert not Path("frontier.svg").exists() and read_rows(folder / "metrics.jsonl")
