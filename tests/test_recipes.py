"""Every recipe as a real run of seconds, on random models that load by path."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from peftlab.errors import UserError
from peftlab.models.adapter_files import load_stack
from peftlab.models.adapters import adapter_parameters
from peftlab.models.classifier import TextClassifier
from peftlab.models.roles import Roles
from peftlab.recipes import RECIPES, classify, ppo, sft
from peftlab.recipes.launch import dry_run, launch
from peftlab.recipes.tools import generate_texts
from peftlab.runs.atomic import read_rows
from peftlab.runs.checkpoint import verify_manifest
from peftlab.runs.metrics import metric

REWARD = '''
def praise(prompts, completions, records):
    """The share of letters e, and how short the answer is."""
    return {"e": [c.count("e") / 8 for c in completions], "short": [-len(c) / 40 for c in completions]}
'''
ANSWERS = ["good", "bad", "very dull", "great fun", "awful plot", "not a film", "was it", "the scene"]
PAIRS = [{"prompt": f"case w{i} :", "completion": f" {answer}"} for i, answer in enumerate(ANSWERS)]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> dict[str, str]:
    """The workshop, with two classifiers that `classify` trained for two steps each."""
    root = tmp_path_factory.mktemp("recipes")
    shop = tiny.workshop(root) | {"runs": str(root / "runs"), "root": str(root)}
    for name, seed in (("reward", 1), ("judge", 2)):
        run_of(shop, "classify", name, f"seed={seed}")
        shop[name] = str(root / "runs" / name)
    shop["pairs"] = tiny.write_rows(root / "pairs.jsonl", PAIRS)
    shop["pairs_test"] = tiny.write_rows(root / "pairs-test.jsonl", PAIRS)
    (root / "my_rewards.py").write_text(REWARD)
    return shop


def run_of(shop: dict[str, str], verb: str, name: str, *pairs: str, resume: bool = False) -> Path:
    """A finished run's folder, checked for what every run leaves behind."""
    runs = Path(shop["runs"])
    summary = launch(verb, None, tiny.overrides(shop, verb, *pairs), runs, name, resume)
    folder = runs / name
    assert summary == json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["recipe"], summary["run"], summary["reason"]) == ("done", verb, name, None)
    assert summary["baseline"].keys() <= summary["metrics"].keys()
    for row in read_rows(folder / "metrics.jsonl"):
        for key in row.keys() - {"step", "time"}:
            metric(key)
    assert all((folder / place).exists() for place in summary["artifacts"].values())
    assert "<svg" in (folder / "report.html").read_text()
    return folder


def files(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def watch(monkeypatch, module, name: str) -> list:
    """What `module.name` returns during a run."""
    seen, function = [], getattr(module, name)

    def watched(*args, **kwargs):
        seen.append(function(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(module, name, watched)
    return seen


def test_pretrain_leaves_a_model_that_loads_and_writes(shop):
    folder = run_of(shop, "pretrain", "pretrain")
    backbone, stack = load_stack(str(folder), device="cpu")
    assert stack.kind == "causal"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["artifacts"] == {"model": "model"}
    assert 1 < summary["metrics"]["eval/perplexity"] < summary["baseline"]["eval/perplexity"] < 500
    assert f"{summary['metrics']['eval/perplexity']:.2f}" in (folder / "model" / "README.md").read_text()
    text = "the film was good , 雪 !"
    assert backbone.tokenizer.decode(backbone.tokenizer(text)["input_ids"]) == text
    assert len(generate_texts(str(folder), "the", 2, 4, 1.0, 1.0, 0, "cpu")) == 2


def test_sft_moves_its_adapter_and_not_one_bit_of_the_base(shop, monkeypatch):
    before = files(shop["gpt2"])
    models = watch(monkeypatch, sft, "attach")
    folder = run_of(shop, "sft", "sft")
    assert files(shop["gpt2"]) == before
    (model,) = models
    base = load_file(Path(shop["gpt2"]) / "model.safetensors")
    own = adapter_parameters(model, "policy")
    frozen = {n.replace(".base_layer", ""): p for n, p in model.named_parameters() if n not in own}
    assert len(frozen) == len(base)
    assert all(torch.equal(p, base[n.removeprefix("base_model.model.")]) for n, p in frozen.items())
    assert all(p.abs().max() > 0 for n, p in own.items() if "lora_B" in n)
    assert verify_manifest(folder / "adapter") == []
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["metrics"]["eval/perplexity"] < summary["baseline"]["eval/perplexity"]
    low, high = summary["intervals"]["eval/perplexity"]
    assert low < summary["metrics"]["eval/perplexity"] < high


def test_sft_learns_eight_answers_by_heart(shop):
    """Mean loss near nothing on the pairs, and the greedy answers are the completions to the letter, ended by EOS."""
    data = [pair.format(**shop) for pair in ("train_data={pairs}", "eval_data={pairs_test}")]
    folder = run_of(shop, "sft", "by-heart", *data, "max_steps=120",
                    "batch_size=8", "lr=3e-3", "lora.r=16", "lora.alpha=32")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["baseline"]["eval/perplexity"] > 20
    assert summary["metrics"]["eval/perplexity"] < 1.05
    for pair in PAIRS:
        (row,) = generate_texts(str(folder), pair["prompt"], 1, 20, 0.0, 1.0, 0, "cpu")
        assert row["text"] == pair["completion"]


def test_the_adapter_of_sft_is_plain_peft(shop):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = run_of(shop, "sft", "plain-sft")
    base = AutoModelForCausalLM.from_pretrained(shop["gpt2"]).eval()
    ids = torch.randint(4, 320, (3, 20))
    bare = base(ids).logits
    plain = PeftModel.from_pretrained(base, folder / "adapter").eval()
    with torch.no_grad():
        expected = plain(ids).logits
        ours = load_stack(str(folder), device="cpu", merge=False)[0].model
        assert torch.allclose(ours(ids).logits, expected, atol=1e-5)  # ours fuses GELU: the last bits differ
        merged = load_stack(str(folder), device="cpu")[0].model(ids).logits
    torch.testing.assert_close(merged, expected, atol=1e-4, rtol=1e-5)
    assert (expected - bare).abs().max() > 0.1


def test_the_adapter_of_classify_is_plain_peft_head_included(shop):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(7)  # another fresh head than the run began with
    base = AutoModelForSequenceClassification.from_pretrained(shop["encoder"], num_labels=2).eval()
    plain = PeftModel.from_pretrained(base, Path(shop["judge"]) / "adapter").eval()
    ids = torch.randint(4, 320, (3, 20))
    with torch.no_grad():
        expected = plain(input_ids=ids).logits
        ours = load_stack(shop["judge"], device="cpu", merge=False)[0].model
        assert torch.equal(ours(input_ids=ids).logits, expected)
        merged = load_stack(shop["judge"], device="cpu")[0].model(input_ids=ids).logits
    torch.testing.assert_close(merged, expected, atol=1e-4, rtol=1e-5)


def test_classify_learns_words_of_praise(shop, monkeypatch):
    before = files(shop["encoder"])
    data = tiny.write_rows(Path(shop["root"]) / "many.jsonl", tiny.reviews(400, seed=5))
    measured = watch(monkeypatch, classify, "classify_texts")
    folder = run_of(shop, "classify", "praise", f"train_data={data}", "max_steps=150", "batch_size=16", "lr=5e-3",
                    "lora.r=8", "lora.alpha=16")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["metrics"]["eval/accuracy"] > 0.8 > summary["baseline"]["eval/accuracy"] + 0.1
    labels = torch.tensor([row["label"] for row in read_rows(Path(shop["labelled_test"]))])
    share = float((measured[-1].argmax(1) == labels).double().mean())
    assert summary["metrics"]["eval/accuracy"] == pytest.approx(share)
    assert files(shop["encoder"]) == before


def test_classify_on_a_causal_model_reads_the_last_token_whatever_the_padding(shop):
    folder = run_of(shop, "classify", "causal", "model={gpt2}".format(**shop), "save_dtype=bfloat16")
    classifier = TextClassifier.load(str(folder), device="cpu")
    texts = ["good", "the film was good and the plot was not dull", "bad"]
    together = classifier.logits(texts)
    alone = torch.cat([classifier.logits([text]) for text in texts])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    assert all(t.dtype == torch.bfloat16 for t in load_file(folder / "adapter" / "adapter_model.safetensors").values())


@pytest.fixture(scope="module")
def steered(shop) -> tuple[Path, list[str], Any]:
    """A PPO run on an SFT run's adapter, its base's hash at the start, and its roles.

    A classifier and a user's function are the reward, another classifier is the judge.
    """
    run_of(shop, "sft", "under")
    hashes = []

    def built(*args, **kwargs):
        roles = Roles(*args, **kwargs)
        hashes.append(roles.frozen_hash())
        built.roles = roles
        return roles

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(shop["root"])
        patch.setattr(ppo, "Roles", built)
        folder = run_of(
            shop, "ppo", "ppo", f"model={shop['runs']}/under", f"judge={shop['judge']}",
            f"reward={shop['reward']} + my_rewards:praise", "critic=adapter",
        )
    return folder, hashes, built.roles


def test_ppo_moves_policy_and_critic_and_not_one_bit_of_the_base(steered):
    folder, hashes, roles = steered
    assert hashes == [roles.frozen_hash()]
    for learned in (roles.policy_parameters(), roles.critic_parameters()):
        assert all(p.abs().max() > 0 for n, p in learned.items() if "lora_B" in n or "value_head" in n)
    assert verify_manifest(folder / "adapter") == []


def test_ppo_reports_its_invariants_and_both_sides(steered):
    folder, _, _ = steered
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["metrics"]["invariant/first_kl"] == 0.0
    assert 0 <= summary["metrics"]["invariant/first_ratio_error"] <= 1e-4
    assert summary["baseline"]["eval/kl"] == 0.0 < summary["metrics"]["eval/kl"]
    assert 0 < summary["metrics"]["eval/judge"] < 1
    assert summary["time"]["step_s"] > 0


def test_ppo_samples_show_each_prompt_before_and_after(steered):
    folder, _, _ = steered
    rows = list(read_rows(folder / "samples.jsonl"))
    sides = {side: [row for row in rows if row["side"] == side] for side in ("before", "after")}
    assert len(sides["before"]) == len(sides["after"]) == 6 and len(rows) == 12
    for before, after in zip(sides["before"], sides["after"], strict=True):
        assert (before["prompt_id"], before["prompt"]) == (after["prompt_id"], after["prompt"])
    assert len({row["prompt_id"] for row in rows}) == 6
    summary = json.loads((folder / "summary.json").read_text())
    for figures, side in ((summary["baseline"], "before"), (summary["metrics"], "after")):
        for name in ("judge", "kl"):
            mean = sum(row[name] for row in sides[side]) / 6
            assert figures[f"eval/{name}"] == pytest.approx(mean, rel=1e-5, abs=1e-7)


def test_ppo_rollouts_are_tables_of_tokens_that_add_up(steered):
    folder, _, roles = steered
    rows = list(read_rows(folder / "rollouts.jsonl"))
    assert Counter(row["step"] for row in rows) == {1: 4, 2: 4}
    columns = {"token", "logprob", "ref_logprob", "kl", "value", "reward", "advantage"}
    for row in rows:
        tokens = row["tokens"]
        assert 1 <= len(tokens) <= 8 and all(token.keys() == columns for token in tokens)
        assert all(token["kl"] == pytest.approx(token["logprob"] - token["ref_logprob"], abs=3e-6) for token in tokens)
        penalty = 0.1 * sum(token["kl"] for token in tokens)
        assert sum(token["reward"] for token in tokens) == pytest.approx(row["score"] - penalty, abs=1e-4)
        parts = row["score_parts"]
        assert parts.keys() == {"reward_model", "e", "short"}  # the classifier's folder is called as the sum is
        assert row["score"] == pytest.approx(parts["reward_model"] + parts["e"] + parts["short"], abs=1e-5)
        assert parts["e"] == pytest.approx(row["completion"].count("e") / 8)
        if row["step"] == 1:  # the policy still is its reference, up to the noise of the cached decode
            assert all(abs(token["kl"]) < 1e-4 for token in tokens)


def test_the_adapter_of_ppo_carries_the_one_under_it(shop, steered):
    folder, _, roles = steered
    backbone, stack = load_stack(str(folder), device="cpu")
    assert stack.base == shop["gpt2"] and len(stack.under) == 1
    ids = torch.randint(4, 320, (2, 12))
    expected = roles.policy(ids, torch.ones_like(ids, dtype=torch.bool), 11)
    with torch.no_grad():
        torch.testing.assert_close(backbone.model(ids).logits[:, :-1], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("verb", "pair", "message"), [
    ("sft", "max_length=97", "context"),
    ("sft", "model={judge}", "classifier"),
    ("sft", "model={encoder}", "encoder"),
    ("pretrain", "train_data={pairs}", "rows of `text`"),
    ("classify", "max_length=65", "context"),
    ("ppo", "max_new_tokens=89", "context"),
    ("ppo", "model={judge}", "classifier"),
    ("ppo", "judge={reward}", "judge"),
    ("ppo", "reward=", "nothing to optimise"),
    ("ppo", "judge=nowhere/judge", "nowhere/judge"),
    ("ppo", "eval_data=nowhere.jsonl", "nowhere.jsonl"),
    ("ppo", "reward=nowhere:f", "nowhere"),
])
def test_what_cannot_work_is_one_message_before_training(shop, tmp_path, verb, pair, message):
    judges = ["reward={reward}", "judge={judge}"] if verb == "ppo" else []
    pairs = [p.format(**shop) for p in [*judges, pair]]
    with pytest.raises(UserError, match=message):
        launch(verb, None, tiny.overrides(shop, verb, *pairs), tmp_path, "run")
    assert not (tmp_path / "run").exists(), "it never began"


@pytest.mark.parametrize("verb", RECIPES)
def test_a_dry_run_tells_the_sizes_and_leaves_nothing(shop, tmp_path, monkeypatch, verb):
    monkeypatch.chdir(tmp_path)
    plan = dry_run(verb, None, tiny.overrides(shop, verb))
    assert plan["config"]["recipe"] == verb
    if verb in ("sft", "classify"):
        run_of(shop, verb, f"dry-{verb}")
        logged = next(iter(read_rows(Path(shop["runs"]) / f"dry-{verb}" / "metrics.jsonl")))
        assert (plan["rows"], plan["steps"]) == (logged["data/rows"], 2)
        assert plan["trained parameters"] > 0
    assert list(tmp_path.iterdir()) == []
