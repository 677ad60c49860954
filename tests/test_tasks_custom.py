"""Task custom: prompts and a reward of one's own, or pairs of one's own, in real runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import tiny
from task_jobs import go, keys, means

from peftlab.config import load_config
from peftlab.errors import LabError, UserError
from peftlab.models.adapter_files import load_stack
from peftlab.recipes import load
from peftlab.recipes.launch import dry_run, launch
from peftlab.runs.atomic import read_rows

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parent.parent
REWARDS = '''
def letters(prompts, completions, records):
    """How often e stands in an answer, and how short it is."""
    return {"e": [c.count("e") / 4 for c in completions], "short": [-len(c) / 40 for c in completions]}


def of_rows(prompts, completions, records):
    """1 where a prompt is the whole of its row's."""
    return [float(prompt == record.prompt) for prompt, record in zip(prompts, records)]


def one_for_all(prompts, completions, records):
    return [sum(map(len, completions))]
'''
LONG = " ".join(["the plot was dull and the film was bad"] * 12)


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> dict[str, str]:
    """The workshop, a judge, rewards of one's own, and prompts of one's own."""
    root = tmp_path_factory.mktemp("custom")
    shop = tiny.workshop(root) | {"root": str(root)}
    launch("classify", None, tiny.overrides(shop, "classify"), root / "runs", "judge")
    (root / "my_tasks.py").write_text(REWARDS)
    asked = [{"id": f"q{i}", "prompt": row["text"]} for i, row in enumerate(tiny.reviews(12, seed=3))]
    shop["asked"] = tiny.write_rows(root / "asked.jsonl", asked)
    shop["long"] = tiny.write_rows(root / "long.jsonl", [*asked, *({"id": i, "prompt": LONG} for i in "lm")])
    shop["endless"] = tiny.write_rows(root / "endless.jsonl", [{"prompt": LONG}])
    return shop | {"judge": str(root / "runs" / "judge")}


@pytest.fixture(autouse=True)
def at_home(shop, monkeypatch) -> None:
    """Rewards are looked up in the working directory."""
    monkeypatch.chdir(shop["root"])


def custom(shop: dict[str, str], verb: str, *pairs: str, prompts: str = "asked") -> list[str]:
    """The same with prompts and a reward of one's own."""
    data = ["prompts"] if verb == "dpo" else ["train_data", "eval_data"]
    reward = [] if verb == "dpo" else ["reward=my_tasks:letters"]
    return keys(shop, verb, "task=custom", *(f"{key}={{{prompts}}}" for key in data), *reward, *pairs)


@pytest.mark.parametrize(
    ("verb", "lacking", "words"),
    [
        ("ppo", "train_data", "train_data: task custom has no prompts"),
        ("rloo", "eval_data", "eval_data: task custom has no prompts of its own.*other than those trained on"),
        ("rloo", "reward", "reward: task custom has none of its own"),
        ("dpo", "prompts", "prompts: task custom has no prompts of its own"),
    ],
)
def test_a_custom_task_asks_for_what_it_lacks(shop, verb, lacking, words):
    pairs = [pair for pair in custom(shop, verb) if not pair.startswith(f"{lacking}=")]
    with pytest.raises(UserError, match=words):
        load_config(load(verb).CONFIG, None, pairs)


@pytest.mark.parametrize(
    ("verb", "pairs", "words"),
    [
        ("ppo", ["judge={judge}"], "want: give positive or negative, which the judge looks for"),
        ("ppo", ["want=positive"], "want: neither the reward nor a judge"),
        ("dpo", ["want=positive"], "want: only a judge"),
        ("rloo", ["reward={judge}"], "reward: .*classifier.*give want=positive"),
        ("rloo", ["reward={judge}", "judge={judge}", "want=positive"], "judge: .*is the reward too"),
        ("ppo", ["max_new_tokens=96"], "max_new_tokens: .*context"),
        ("rloo", ["kl_target=2", "kl_coef=0"], "kl_coef: 0 stays 0"),
    ],
)
def test_what_cannot_work_is_one_message_before_the_training(shop, tmp_path, verb, pairs, words):
    with pytest.raises(UserError, match=words):
        launch(verb, None, custom(shop, verb, *pairs), tmp_path, "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_one_number_for_all_answers_ends_before_the_training(shop, tmp_path):
    with pytest.raises(LabError, match=r"2 completions, but values of shape \(1,\)"):
        launch("ppo", None, custom(shop, "ppo", "reward=my_tasks:one_for_all"), tmp_path, "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("verb", ["ppo", "rloo"])
def test_a_policy_learns_from_ones_own_prompts_and_reward(shop, tmp_path, verb):
    summary, run = go(verb, custom(shop, verb, "steps=3", "reward=my_tasks:letters + 2*my_tasks:of_rows"), tmp_path)
    for figures, side in ((summary["baseline"], "before"), (summary["metrics"], "after")):
        assert "eval/judge" not in figures and "judge" not in means(run, side)
        parts = {name: figures[f"eval/part/{name}"] for name in ("e", "short", "of_rows")}
        assert parts["of_rows"] == 1.0, "prompts are whole"
        assert figures["eval/reward"] == pytest.approx(parts["e"] + parts["short"] + 2, abs=1e-5)
        answers = [row["completion"] for row in read_rows(run / "samples.jsonl") if row["side"] == side]
        assert parts["e"] == pytest.approx(sum(answer.count("e") for answer in answers) / 4 / len(answers))
    assert summary["baseline"]["eval/kl"] == 0.0 < summary["metrics"]["eval/kl"]
    low, high = summary["intervals"]["eval/part/e"]
    assert low <= summary["metrics"]["eval/part/e"] <= high


def test_a_reward_of_one_part_is_told_once(shop, tmp_path):
    summary, _ = go("rloo", custom(shop, "rloo", "reward=my_tasks:of_rows"), tmp_path)
    assert summary["metrics"]["eval/reward"] == 1.0
    assert not any(name.startswith("eval/part/") for name in summary["metrics"])


def test_a_custom_task_may_have_a_judge(shop, tmp_path):
    summary, run = go("ppo", custom(shop, "ppo", "want=negative", "judge={judge}"), tmp_path)
    assert 0 < summary["metrics"]["eval/judge"] < 1
    assert means(run, "after")["judge"] == pytest.approx(summary["metrics"]["eval/judge"])
    assert load_stack(str(run), device="cpu")[1].extra["want"] == "negative"


def test_dpo_is_evaluated_by_what_its_prompts_allow(shop, tmp_path):
    summary, run = go("dpo", keys(shop, "dpo", "task=custom", "prompts={asked}"), tmp_path)
    assert means(run, "after").keys() == {"kl"} and "eval/reward" not in summary["metrics"]


def test_prompts_that_leave_no_room_are_left_out_and_told(shop, tmp_path, capsys):
    """Two of fourteen do not fit into a context of 96 tokens less 8 for the answer."""
    _, run = go("rloo", custom(shop, "rloo", "eval_prompts=14", prompts="long"), tmp_path)
    told = [row for row in read_rows(run / "events.jsonl") if row["kind"] == "prompts_left_out"]
    assert [(row["rows"], row["longest"]) for row in told] == [(2, 88), (2, 88)]
    assert capsys.readouterr().err.count("2 of 14 prompts are left out: longer than 88 tokens") == 2
    asked = Counter(row["prompt_id"] for row in read_rows(run / "samples.jsonl"))
    assert asked == {f"q{i}": 2 for i in range(12)}
    plan = dry_run("rloo", None, custom(shop, "rloo", prompts="long"))
    assert plan["prompts"] == 12 and plan["bytes of one pass's logits"] == 12 * 8 * 320 * 4


def test_held_out_prompts_that_are_trained_on_are_told(shop, tmp_path, capsys):
    """The shop has one file of 14 prompts for both."""
    _, run = go("rloo", custom(shop, "rloo", "eval_prompts=5"), tmp_path)
    (told,) = [row for row in read_rows(run / "events.jsonl") if row["kind"] == "held_out_rows_trained_on"]
    assert told["rows"] == 5 and told["data"] in capsys.readouterr().err


def test_prompts_of_which_none_fits_are_refused(shop, tmp_path):
    with pytest.raises(UserError, match="every prompt is longer than 88 tokens"):
        launch("ppo", None, custom(shop, "ppo", prompts="endless"), tmp_path, "run")


EXAMPLE = re.compile(r"<!-- runs: task custom -->\n+```sh\n(.*?)```", re.DOTALL)
PAGES = {page: EXAMPLE.findall((ROOT / page).read_text(encoding="utf-8")) for page in ("README.md", "docs/ppo.md")}


@pytest.mark.skipif(sys.platform == "win32", reason="a shell's example")
@pytest.mark.parametrize("example", sorted({example for found in PAGES.values() for example in found}))
def test_the_example_of_a_custom_task_runs_as_it_is_printed(tmp_path, example):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-euc", example], cwd=tmp_path, env=os.environ | {"PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "runs" / "personal" / "summary.json").read_text())
    assert summary["metrics"]["eval/reward"] > summary["baseline"]["eval/reward"] + 0.2
    assert len(list(read_rows(tmp_path / "runs" / "personal" / "samples.jsonl"))) == 2 * 12


def test_there_is_an_example():
    assert PAGES["docs/ppo.md"]
