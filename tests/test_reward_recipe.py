"""`peftlab reward`: it learns, on pairs it may learn from, resumes to the same bytes, and its figures are right."""

from __future__ import annotations

import itertools
import json
import random
import signal
from pathlib import Path

import fake_runs
import numpy as np
import pytest
import tiny
import torch
from commands import peftlab
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from peftlab.data.explanations import answer_of, prompt_of
from peftlab.data.records import PreferencePair
from peftlab.errors import Interrupted, UserError
from peftlab.evaluation.pairs import (
    ScoredPairs,
    agreement,
    histogram,
    longer_wins,
    most_wrong,
    pair_intervals,
    pair_metrics,
    spearman,
    wins,
)
from peftlab.models.reward_model import RewardModel
from peftlab.recipes.launch import dry_run, launch
from peftlab.recipes.reward_data import flipped, kept_apart, pair_roles
from peftlab.report import render
from peftlab.report.reward import reward_of
from peftlab.runs.atomic import read_rows
from peftlab.runs.rundir import RunDir

pytestmark = pytest.mark.usefixtures("one_thread")


def toy(count: int, seed: int, **more: object) -> list[dict]:
    """Preferences with prompts of their own: praise wins."""
    rows = tiny.preferences(count, seed)
    return [row | {"id": f"{seed}-{i}", "prompt": f"{seed} {i} {row['prompt']}", **more} for i, row in enumerate(rows)]


def explained(count: int, seed: int) -> list[dict]:
    """Pairs of explanations: the chosen one states the label and cites the review."""
    draw, rows = random.Random(seed), []
    for number in range(count):
        review = " ".join(draw.choices(tiny.WORDS, k=8))
        chosen = answer_of(number % 2, f'The film was "{" ".join(review.split()[2:6])}" and fun.')
        rejected = answer_of(draw.choice([0, 1]), "it it it it it")
        pair = {"prompt": prompt_of(review), "chosen": chosen, "rejected": rejected}
        rows.append({"id": f"e{number}", "label": number % 2, "margin": draw.random(), **pair})
    return rows


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("reward")
    files = {"train": toy(400, 1), "test": toy(200, 2), "other": toy(60, 3), "explained": explained(80, 1),
             "explained_test": explained(40, 2)}
    data = {name: tiny.write_rows(root / f"{name}.jsonl", rows) for name, rows in files.items()}
    return {"gpt2": str(tiny.causal_folder(root / "gpt2")), "root": str(root), **data}


def go(shop: dict[str, str], runs: Path, name: str, *pairs: str, resume: bool = False) -> dict:
    keys = ["device=cpu", "model={gpt2}", "train_data={train}", "eval_data={test}", "max_length=64", "batch_size=16",
            "lora.r=4", "lora.alpha=8", "lr=1e-2", *pairs]
    return launch("reward", None, [key.format(**shop) for key in keys], runs, name, resume)


@pytest.fixture(scope="module")
def trained(shop) -> Path:
    more = ["max_steps=120", "batch_size=32", "lora.r=16", "lora.alpha=32", "ood_data={other}", "calibrate=0.3"]
    go(shop, Path(shop["root"]), "trained", *more)
    return Path(shop["root"]) / "trained"


def test_it_learns_that_praise_wins_and_its_folder_tells_the_same(shop, trained):
    summary = json.loads((trained / "summary.json").read_text())
    found, before = summary["metrics"], summary["baseline"]
    assert found["eval/pair_accuracy"] > 0.95 and found["eval/ood_pair_accuracy"] > 0.95 and found["eval/ece"] < 0.05
    assert 0.35 < before["eval/pair_accuracy"] < 0.65
    assert found["compare/pair_accuracy_longer"] < 0.6
    low, high = summary["intervals"]["eval/pair_accuracy"]
    assert low <= found["eval/pair_accuracy"] <= high
    model = RewardModel.load(str(trained), device="cpu")
    pairs = [PreferencePair(r["id"], r["prompt"], r["chosen"], r["rejected"]) for r in toy(200, 2)]
    again = pair_metrics(ScoredPairs.of(model, pairs))
    assert again == {name: found[name] for name in again}
    scores = model.scores([r["prompt"] for r in toy(400, 1)] * 2,
                          [r[side] for side in ("chosen", "rejected") for r in toy(400, 1)])
    assert float(scores.mean()) == pytest.approx(0, abs=0.1) and float(scores.var()) == pytest.approx(1, abs=0.1)


def test_labels_all_flipped_teach_the_contrary(shop, tmp_path):
    found = go(shop, tmp_path, "contrary", "max_steps=60", "batch_size=32", "flip_labels=1.0")["metrics"]
    assert found["eval/pair_accuracy"] < 0.2


def test_a_seeded_share_is_flipped_and_whole_prompts_are_kept():
    pairs = [PreferencePair(str(i), f"p{i // 2}", "a", "b", margin=0.5) for i in range(1000)]
    turned = flipped(pairs, 0.25, 0)
    assert [p.id for p in turned] == [p.id for p in pairs]
    assert sum(p.chosen == "b" for p in turned) == 250 and all({p.chosen, p.rejected} == {"a", "b"} for p in turned)
    assert flipped(pairs, 0.25, 0) == turned != flipped(pairs, 0.25, 1)
    train, kept = kept_apart(turned, 0.25, 0)
    assert {p.prompt for p in train}.isdisjoint(p.prompt for p in kept) and len(kept) == 250
    assert 40 < sum(p.chosen == "b" for p in kept) < 85, "what is kept and what is flipped are drawn apart"
    assert kept_apart(pairs[:60], 0.25, 0) == (pairs[:60], [])


def test_no_prompt_is_trained_on_that_is_evaluated_on(shop, tmp_path, capsys):
    pairs = [PreferencePair(str(i), f"p{i}", "a", "b") for i in range(6)]
    held_out, other = [PreferencePair("x", " p1 ", "c", "d")], [PreferencePair("y", "p4", "c", "d")]
    roles = pair_roles(pairs, held_out, other, 0.0, 0.0, 0)
    assert ([p.id for p in roles.train], roles.dropped) == (["0", "2", "3", "5"], 2)
    with pytest.raises(UserError, match="every prompt"):
        pair_roles(pairs[1:2], held_out, other, 0.0, 0.0, 0)
    mixed = tiny.write_rows(tmp_path / "mixed.jsonl", toy(40, 1) + toy(5, 2))
    go(shop, tmp_path, "mixed", f"train_data={mixed}", "max_steps=1")
    assert "5 of 45 training pairs dropped" in capsys.readouterr().err
    (event,) = [e for e in read_rows(tmp_path / "mixed/events.jsonl") if e["kind"] == "pairs_dropped"]
    assert event["pairs"] == 5
    assert next(read_rows(tmp_path / "mixed/metrics.jsonl"))["data/rows"] == 40


STOPS = {"single": ([], (2, 7)), "ensemble": (["members=3", "combine=min"], (3, 13, 24))}
LONG = ["max_steps=10", "batch_size=8", "train_limit=60", "lora.dropout=0.1", "save_every=4", "eval_limit=20"]


@pytest.fixture(scope="module")
def whole(shop) -> Path:
    for name, (more, _) in STOPS.items():
        go(shop, Path(shop["root"]) / "whole", name, *LONG, *more)
    return Path(shop["root"]) / "whole"


def contents(run: Path) -> dict[str, bytes]:
    files = [*run.glob("adapter/**/*"), run / "reward.json"]
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in files if path.is_file()}


@pytest.mark.parametrize(("name", "step"), [(name, step) for name, (_, steps) in STOPS.items() for step in steps])
def test_a_stopped_run_resumes_to_the_same_bytes(shop, whole, tmp_path, monkeypatch, name, step):
    asked = itertools.count(1)
    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "stop_requested", property(lambda _: signal.SIGTERM if next(asked) == step else None))
        with pytest.raises(Interrupted):
            go(shop, tmp_path, name, *LONG, *STOPS[name][0])
    run = tmp_path / name
    assert not (run / "adapter").exists()
    torch.manual_seed(step)
    go(shop, tmp_path, name, *LONG, *STOPS[name][0], resume=True)
    assert contents(run) == contents(whole / name)
    logs = [[{k: v for k, v in row.items() if k != "time"} for row in read_rows(place / name / "metrics.jsonl")]
            for place in (tmp_path, whole)]
    assert logs[0] == logs[1]


def test_an_ensemble_keeps_its_members_apart_and_says_what_one_is_worth(whole):
    run = whole / "ensemble"
    names = {path.relative_to(run / "adapter").parts[0] for path in (run / "adapter").rglob("*.safetensors")}
    assert names == {"member-0", "member-1", "member-2"}
    heads = [(run / f"adapter/member-{m}/head.safetensors").read_bytes() for m in range(3)]
    assert len(set(heads)) == 3
    assert 0 <= json.loads((run / "summary.json").read_text())["metrics"]["compare/pair_accuracy_member"] <= 1
    assert max(row["step"] for row in read_rows(run / "metrics.jsonl")) == 30
    assert RewardModel.load(str(run), device="cpu").scale.combine == "min"


def test_pointwise_learns_the_rubric(shop, tmp_path):
    more = ["objective=pointwise", "train_data={explained}", "eval_data={explained_test}", "max_length=96",
            "max_steps=40"]
    found = go(shop, tmp_path, "points", *more)["metrics"]
    assert found["eval/pair_accuracy"] > 0.9
    assert {"agreement/label", "agreement/evidence", "eval/pair_accuracy_margin_low"} <= found.keys()
    view = reward_of(tmp_path / "points")
    assert "evidence" in [row[0] for row in view.agreement]


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        (["margin=1"], "has no `margin`"),
        (["objective=pointwise", "flip_labels=0.1"], "about pairs"),
        (["max_length=200"], "exceeds the context"),
        (["combine=median"], "combine"),
        (["train_data={test}"], "is train_data too"),
        (["train_data={root}/copy.jsonl"], "every prompt of it"),
    ],
)
def test_bad_keys_are_refused_by_run_and_dry_run(shop, tmp_path, pairs, words):
    tiny.write_rows(Path(shop["root"]) / "copy.jsonl", toy(200, 2))
    keys = ["device=cpu", "model={gpt2}", "train_data={train}", "eval_data={test}", "max_length=64", *pairs]
    with pytest.raises(UserError, match=words):
        dry_run("reward", None, [key.format(**shop) for key in keys])
    with pytest.raises(UserError, match=words):
        go(shop, tmp_path, "bad", *pairs)


def test_a_margin_is_heeded(shop, tmp_path):
    data = tiny.write_rows(tmp_path / "margins.jsonl", toy(60, 1, margin=2.0))
    logs = []
    for margin in ("0", "1"):
        go(shop, tmp_path, f"m{margin}", f"train_data={data}", f"margin={margin}", "max_steps=1")
        rows = read_rows(tmp_path / f"m{margin}/metrics.jsonl")
        logs.append(next(row["train/loss"] for row in rows if "train/loss" in row))
    assert logs[1] > logs[0] + 0.5


def test_predict_scores_answers_and_eval_scores_pairs(shop, trained, tmp_path):
    rows = [{"id": r["id"], "prompt": r["prompt"], "completion": r[side]} for r in toy(5, 2) for side in ("chosen",
            "rejected")]
    source = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    done = peftlab("predict {run} --input {source} --output {out} --device cpu", run=str(trained), source=source,
                   out=str(tmp_path / "out.jsonl"))
    assert done.code == 0, done.err
    answers = list(read_rows(tmp_path / "out.jsonl"))
    assert [a["id"] for a in answers] == [r["id"] for r in rows] and all(a.keys() == {"id", "score"} for a in answers)
    assert all(a["score"] > b["score"] for a, b in zip(answers[::2], answers[1::2], strict=True))
    blank = {"silent": {"prompt": "a", "completion": ""}, "unasked": {"prompt": " ", "completion": "a"}}
    for name, row in blank.items():
        tiny.write_rows(tmp_path / name, [row])
    silent, unasked = (peftlab("predict {run} --input {rows} --device cpu", run=str(trained), rows=str(tmp_path / name))
                       for name in blank)
    assert silent.code == 0 and "score" in silent.out, "an answer may be empty"
    assert unasked.code == 2 and "unasked:1: `prompt` is empty" in unasked.err
    told = peftlab("eval {run} --data {data} --json --device cpu", run=str(trained), data=shop["test"])
    summary = json.loads((trained / "summary.json").read_text())
    found = json.loads(told.out)
    assert found["metrics"].items() <= summary["metrics"].items()
    assert found["intervals"]["eval/pair_accuracy"] == summary["intervals"]["eval/pair_accuracy"]
    for line, words in {
        "predict {run} --text hello": "give --input",
        "predict {run} --input {data}": "string `prompt` and `completion`",
        "eval {run}": "give --data",
        "generate {run} --prompt a": "scores answers",
    }.items():
        refused = peftlab(f"{line} --device cpu", run=str(trained), data=shop["test"])
        assert refused.code == 2 and words in refused.err, line


def scored(count: int = 300, seed: int = 0) -> ScoredPairs:
    draw = np.random.default_rng(seed)
    margins = draw.random(count).tolist()
    records = [PreferencePair(str(i), f"p{i % 100}", "good film", "bad", margin=m) for i, m in enumerate(margins)]
    tokens = draw.integers(1, 9, (count, 2))
    raw = draw.normal(size=(count, 2)) + [0.8, 0] + 0.1 * tokens
    return ScoredPairs(records, raw, tokens, temperature=0.7)


def test_figures_agree_with_scipy_and_sklearn():
    pairs = scored()
    found = pair_metrics(pairs)
    judged = spearmanr(pairs.raw.ravel(), pairs.tokens.ravel()).statistic
    assert found["eval/length_correlation"] == pytest.approx(judged)
    # Each pair in both orders: the accuracy is then the AUC of telling the two orders apart by the sign.
    both = np.concatenate([pairs.logits, -pairs.logits])
    signs, truth = np.sign(both), np.repeat([1, 0], len(pairs.logits))
    assert found["eval/pair_accuracy"] == pytest.approx(roc_auc_score(truth, signs))
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(torch.tensor(pairs.logits), torch.ones(300).double())
    assert found["eval/loss"] == pytest.approx(float(entropy))
    for what in ("margin", "length"):
        thirds = [found[f"eval/pair_accuracy_{what}_{third}"] for third in ("low", "middle", "high")]
        assert min(thirds) <= found["eval/pair_accuracy"] <= max(thirds)
    low, high = pair_intervals(pairs)["eval/pair_accuracy"]
    assert low < found["eval/pair_accuracy"] < high


def test_figures_of_ties_extremes_and_constants():
    assert wins(np.array([2.0, 0.0, -1.0])).tolist() == [1.0, 0.5, 0.0]
    records = [PreferencePair(str(i), "p", "a", "b") for i in range(2)]
    tied = ScoredPairs(records, np.ones((2, 2)), np.array([[3, 3], [4, 2]]))
    found = pair_metrics(tied)
    assert (found["eval/pair_accuracy"], found["eval/length_correlation"], longer_wins(tied)) == (0.5, 0.0, 0.75)
    assert not any("margin" in name for name in found) and agreement(tied) == [] and most_wrong(tied, 10) == []
    far = ScoredPairs(records, np.array([[1e6, 0.0], [0.0, 1e6]]), np.ones((2, 2)), temperature=0.05)
    assert np.isfinite(far.probabilities).all() and np.isfinite(list(pair_metrics(far).values())).all()
    assert spearman(np.arange(5.0), np.arange(5.0) ** 3) == pytest.approx(1)


def test_a_histogram_counts_everyone_and_the_most_wrong_come_first():
    pairs = scored()
    table = histogram(pairs, reach=1.0)
    assert sum(table["chosen"]) == sum(table["rejected"]) == 300
    wrong = most_wrong(pairs, 10)
    assert len(wrong) == 10 and [row["probability"] for row in wrong] == sorted(row["probability"] for row in wrong)
    assert all(row["scores"][0] < row["scores"][1] for row in wrong)


def test_the_report_has_the_rewards_page(trained, tmp_path):
    page = render(trained).read_text()
    assert all(words in page for words in ("The reward", "Before training", "After training", "How far its confidence"))
    run = fake_runs.sft_run(tmp_path, "mine").path
    tables = json.loads((trained / "reward.json").read_text())
    wrong = {"id": "7", "prompt": "<b>x", "chosen": "<script>1</script>", "rejected": "y", "scores": [-1, 2.5],
             "probability": 0.03}
    part = {"part": "<i>label", "pairs": 12, "model": 0.75, "preferences": 1.0}
    (run / "reward.json").write_text(json.dumps(tables | {"wrong": [wrong], "agreement": [part]}))
    page = render(run).read_text()
    assert "<script>" not in page and "&lt;script&gt;1" in page and "&lt;i&gt;label" in page
    assert "3.0%" in page and "75.0%" in page and "+2.50" in page


@pytest.mark.parametrize("change", [
    {"histogram": 1}, {"histogram": {"before": {"edges": [0, 1], "chosen": [1, 2], "rejected": [1]}}},
    {"reliability": [{}]}, {"agreement": [{"part": "a"}]}, {"wrong": [{"id": 1}]},
])
def test_a_file_that_is_none_leaves_the_page_out(trained, tmp_path, change):
    assert reward_of(tmp_path) is None
    (tmp_path / "reward.json").write_text("[")
    assert reward_of(tmp_path) is None
    tables = json.loads((trained / "reward.json").read_text())
    (tmp_path / "reward.json").write_text(json.dumps(tables | change))
    assert reward_of(tmp_path) is None
