"""DPO: its losses against autograd of the formula, padding, its invariants, and real runs that learn and resume."""

from __future__ import annotations

import functools
import itertools
import json
import math
import signal
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from peftlab.config import load_config, shipped_configs
from peftlab.errors import Interrupted, LabError, UserError
from peftlab.models.adapter_files import load_stack
from peftlab.models.adapters import Lora
from peftlab.models.backbone import Backbone
from peftlab.models.roles import Roles
from peftlab.ops.losses import dpo_loss, ipo_loss
from peftlab.recipes import dpo
from peftlab.recipes.launch import launch
from peftlab.runs.atomic import read_rows
from peftlab.runs.checkpoint import verify_manifest
from peftlab.runs.metrics import metric
from peftlab.runs.rundir import RunDir
from peftlab.training.dpo import PairPolicy, PairRow, collate_pairs, compare_rows, first_pairs, pair_row

pytestmark = pytest.mark.usefixtures("one_thread")

LEARNS = ["max_steps=60", "batch_size=8", "lr=5e-3", "lora.r=8", "lora.alpha=16"]
REALS = st.floats(-30, 30, width=32)


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("dpo")
    shop = tiny.workshop(root) | {"runs": str(root / "runs")}
    launch("classify", None, tiny.overrides(shop, "classify"), root / "runs", "judge")
    launch("sft", None, tiny.overrides(shop, "sft"), root / "runs", "under")
    return shop | {"judge": str(root / "runs" / "judge"), "under": str(root / "runs" / "under")}


def go(shop: dict[str, str], runs: Path | str, name: str, *pairs: str, resume: bool = False) -> Path:
    launch("dpo", None, tiny.overrides(shop, "dpo", f"judge={shop['judge']}", *pairs), Path(runs), name, resume)
    return Path(runs) / name


@pytest.fixture(scope="module")
def learned(shop) -> Path:
    """A run on an SFT adapter that learns to prefer words of praise."""
    return go(shop, shop["runs"], "learned", "model={under}".format(**shop), *LEARNS)


def summary_of(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


# The losses


@given(st.lists(st.tuples(REALS, REALS), min_size=1, max_size=4), st.floats(0.01, 2), st.floats(0, 0.49))
def test_the_gradient_is_that_of_finite_differences(pairs, beta, smoothing):
    values = torch.tensor(pairs, dtype=torch.float64).T.clone().requires_grad_()
    for loss in (lambda v: dpo_loss(v[0], v[1], beta, smoothing), lambda v: ipo_loss(v[0], v[1], beta)):
        assert torch.autograd.gradcheck(loss, (values,), eps=1e-5, atol=1e-6)


@given(REALS, REALS, st.floats(0.01, 2), st.floats(0, 1))
def test_label_smoothing_is_symmetrical(chosen, rejected, beta, smoothing):
    """A pair the wrong way round with the share eps of wrong pairs is the pair with the share 1 - eps."""
    a, b = torch.tensor([chosen]).double(), torch.tensor([rejected]).double()
    there, back = dpo_loss(a, b, beta, smoothing), dpo_loss(b, a, beta, 1 - smoothing)
    assert float(there) == pytest.approx(float(back), rel=1e-9, abs=1e-12)


@given(st.floats(0.05, 1), st.floats(0.01, 0.45))
def test_smoothed_pairs_want_a_margin_that_is_right_in_that_share(beta, smoothing):
    """At its minimum sigmoid(beta * margin) is 1 - eps (Mitchell 2023): the gradient vanishes there, and only there."""
    best = math.log((1 - smoothing) / smoothing) / beta
    slopes = []
    for margin in (best - 1, best, best + 1):
        at = torch.tensor([margin], dtype=torch.float64, requires_grad=True)
        dpo_loss(at, torch.zeros(1), beta, smoothing).backward()
        slopes.append(float(at.grad))
    assert slopes[0] < 0 < slopes[2] and slopes[1] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_equal_models_have_the_loss_ln_2(smoothing):
    same = torch.randn(7)
    assert float(dpo_loss(same, same, 0.3, smoothing)) == pytest.approx(math.log(2), abs=1e-6)


# Policy and reference


def pairs_for(count: int = 6) -> list[PairRow]:
    """Pairs of different lengths, in every part."""
    draw = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 9, (count, 3), generator=draw).tolist()
    ids = [[torch.randint(3, 64, (n,), generator=draw).tolist() for n in row] for row in lengths]
    return [pair_row(prompt, chosen, rejected, 40) for prompt, chosen, rejected in ids]


def policy_on(kind: str, loss: str = "sigmoid", fresh: bool = False, dropout: float = 0.0) -> PairPolicy:
    model, tokenizer = tiny.causal(kind)
    if dropout:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = dropout
    roles = Roles(Backbone(kind, model, tokenizer, ""), Lora(r=4, alpha=8))
    if not fresh:
        for name, parameter in roles.policy_parameters().items():
            torch.nn.init.normal_(parameter, std=0.2 if "lora_B" in name else 0.5)
    return PairPolicy(roles, loss, 0.3, 0.0)


def alone(policy: PairPolicy, prompt: list[int], answer: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """log p and log q of each answer token, by a plain forward of transformers over one row without any padding."""
    ids = torch.tensor([prompt + answer])

    def told() -> torch.Tensor:
        logp = F.log_softmax(policy.model(input_ids=ids).logits[0].double(), -1)
        return logp[len(prompt) - 1 : -1].gather(1, torch.tensor(answer)[:, None])[:, 0]

    with policy.model.disable_adapter(), torch.no_grad():
        reference = told()
    return told(), reference


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_loss_and_gradient_are_those_of_a_plain_formula_on_rows_alone(kind, loss):
    rows, policy = pairs_for(), policy_on(kind, loss)
    parameters = list(policy.roles.policy_parameters().values())
    ours = policy(**collate_pairs(rows, 0))["loss"]
    found = torch.autograd.grad(ours, parameters)
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        ratios = []
        for side in ("chosen", "rejected"):
            logp, logq = alone(policy, row["prompt"], row[side])
            ratios.append((logp - logq).mean() if loss == "ipo" else (logp - logq).sum())
        gap = ratios[0] - ratios[1]
        total = total + ((gap - 1 / 0.6) ** 2 if loss == "ipo" else torch.log1p(torch.exp(-0.3 * gap)))
    expected = total / len(rows)
    for parameter in parameters:  # leaving disable_adapter() may have changed it
        parameter.requires_grad_(True)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5)
    for one, other in zip(found, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def row_of(prompt: int, chosen: int, rejected: int, seed: int = 0) -> PairRow:
    """A pair of random words, of these lengths."""
    draw = torch.Generator().manual_seed(seed)
    parts = (torch.randint(3, 64, (n,), generator=draw).tolist() for n in (prompt, chosen, rejected))
    return dict(zip(("prompt", "chosen", "rejected"), parts, strict=True))


# What a batch may hold: a prompt of one token beside a long one, answers of one token, rows that are almost all pads.
ODD = [row_of(1, 1, 1), row_of(1, 20, 1), row_of(30, 1, 2), row_of(3, 2, 34), row_of(34, 30, 30)]


steered = functools.cache(policy_on)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@given(st.lists(st.tuples(*[st.integers(1, 12)] * 3), min_size=1, max_size=4), st.integers(0, 63), st.integers(0, 9))
@settings(max_examples=15)
def test_padding_and_neighbours_change_no_loss_and_no_gradient(kind, lengths, pad, more):
    """A batch has the mean loss and gradient of its pairs alone, whatever its pads are and however many."""
    rows, policy = [row_of(*of, seed) for seed, of in enumerate(lengths)], steered(kind)
    parameters = list(policy.roles.policy_parameters().values())

    def told(batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        loss = policy(**batch)["loss"]
        return [loss.detach(), *torch.autograd.grad(loss, parameters)]

    batch = collate_pairs(rows, pad)
    wider = {name: F.pad(tensor, (0, more), value=pad * (name == "ids")) for name, tensor in batch.items()}
    alone = zip(*(told(collate_pairs([row], 0)) for row in rows), strict=True)
    for one, each in zip(told(wider), alone, strict=True):
        torch.testing.assert_close(one, torch.stack(each).mean(0), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_attention_has_no_mask_of_its_own(kind, monkeypatch):
    """No row of attention sees nothing, and every kernel is the one of a plain causal model."""
    policy, seen, attend = policy_on(kind), [], F.scaled_dot_product_attention

    def spy(*args, attn_mask=None, is_causal=False, **options):
        seen.append((attn_mask, is_causal))
        return attend(*args, attn_mask=attn_mask, is_causal=is_causal, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    policy(**collate_pairs(ODD, 0))
    assert seen == [(None, True)] * 4  # two layers, policy and reference


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_gradients_in_bfloat16_are_near_those_in_float32(kind, loss):
    policy = policy_on(kind, loss, fresh=True)
    for name, parameter in policy.roles.policy_parameters().items():
        torch.nn.init.normal_(parameter, std=0.02 if "lora_B" in name else 0.2)
    parameters, found = list(policy.roles.policy_parameters().values()), []
    for rounded in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=rounded):
            value = policy(**collate_pairs(ODD, 0))["loss"]
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters)]))
    assert found[1].isfinite().all()
    assert (found[1] - found[0]).norm() < 0.1 * found[0].norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("length", [57, 64, 65, 128, 192])
def test_gradients_on_a_gpu_in_bfloat16_are_finite(length):
    """cuDNN's attention gave NaN at 64 and 192 tokens, where some prompts were padded in front."""
    policy = PairPolicy(Roles(load_stack("tiny-gpt2", device="cuda")[0], Lora(r=4, alpha=8)), "sigmoid", 0.1, 0.0)
    batch = collate_pairs([row_of(1, 40, 8), row_of(9, length - 9, 1), row_of(length - 5, 5, 2)], 1)
    with torch.autocast("cuda", torch.bfloat16):
        loss = policy(**{name: tensor.cuda() for name, tensor in batch.items()})["loss"]
    for gradient in torch.autograd.grad(loss, list(policy.roles.policy_parameters().values())):
        assert gradient.isfinite().all()


def test_an_answers_own_tokens_count_and_no_others():
    """log p of an answer is the sum over its tokens, EOS among them: it grows by that of the EOS where one is added."""
    policy = policy_on("gpt2")
    row = pairs_for()[0]
    longer = {**row, "chosen": [*row["chosen"], 1]}
    before, after = (compare_rows(policy, [r], 0).changes[0, 0] for r in (row, longer))
    logp, logq = alone(policy, row["prompt"], longer["chosen"])
    assert (after - before).item() == pytest.approx((logp[-1] - logq[-1]).item(), abs=1e-5)


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_a_fresh_policy_starts_at_its_reference(loss):
    policy = policy_on("gpt2", loss, fresh=True)
    first = first_pairs(policy, pairs_for(), 0)
    assert first.kl == 0.0 and first.loss_error < 1e-6
    first.check()
    assert torch.equal(compare_rows(policy, pairs_for(), 0).changes, torch.zeros(2, 6))


def test_dropout_never_acts():
    """Not even where the base has some and a Trainer asks for train mode."""
    policy = policy_on("gpt2", fresh=True, dropout=0.5).train()
    first_pairs(policy, pairs_for(), 0).check()
    assert torch.equal(policy.compare(**collate_pairs(pairs_for(), 0)).changes, torch.zeros(2, 6))
    assert not any(module.training for module in policy.modules())


def test_an_adapter_that_is_not_fresh_is_refused():
    with pytest.raises(LabError, match="first_kl"):
        first_pairs(policy_on("gpt2"), pairs_for(), 0).check()


@given(st.lists(st.integers(3, 60), min_size=1, max_size=30), st.lists(st.integers(3, 60), min_size=1, max_size=30),
       st.lists(st.integers(3, 60), min_size=1, max_size=30), st.integers(8, 40))
def test_a_pair_that_is_cut_fits_and_keeps_its_prompts_end(prompt, chosen, rejected, length):
    row = pair_row(prompt, chosen, rejected, length)
    assert row["prompt"] and len(row["prompt"]) + max(len(row["chosen"]), len(row["rejected"])) <= length
    assert row["prompt"] == prompt[-len(row["prompt"]) :]
    assert row["chosen"] == chosen[: length - 1] and row["rejected"] == rejected[: length - 1]


# Runs


def test_a_run_learns_which_answers_are_preferred(learned):
    summary = summary_of(learned)
    metrics, baseline = summary["metrics"], summary["baseline"]
    assert (baseline["eval/pair_accuracy"], baseline["eval/reward_margin"], baseline["eval/kl"]) == (0.5, 0.0, 0.0)
    assert metrics["eval/pair_accuracy"] > 0.85
    assert metrics["eval/reward_margin"] > 0.3
    assert metrics["eval/chosen_change"] > metrics["eval/rejected_change"]
    assert metrics["eval/kl"] > 0
    assert (metrics["invariant/first_kl"], metrics["invariant/first_loss_error"] < 1e-6) == (0.0, True)
    low, high = summary["intervals"]["eval/pair_accuracy"]
    assert low <= metrics["eval/pair_accuracy"] <= high


def test_a_run_logs_from_ln_2_on(learned):
    rows = [row for row in read_rows(learned / "metrics.jsonl") if "train/loss" in row]
    assert rows[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert (rows[0]["train/reward_margin"], rows[0]["train/pair_accuracy"]) == (0.0, 0.5)
    assert rows[-1]["train/loss"] < 0.6 and rows[-1]["train/reward_margin"] > 0.2
    for row in read_rows(learned / "metrics.jsonl"):
        for name in row.keys() - {"step", "time"}:
            metric(name)


def test_a_run_leaves_what_the_others_leave(shop, learned):
    """Samples of both sides with their judge and KL, and an adapter that loads with the one under it."""
    rows = list(read_rows(learned / "samples.jsonl"))
    assert [row["side"] for row in rows] == ["before"] * 6 + ["after"] * 6
    metrics = summary_of(learned)["metrics"]
    for name in ("judge", "kl"):
        assert metrics[f"eval/{name}"] == pytest.approx(sum(row[name] for row in rows[6:]) / 6, rel=1e-5)
    assert {"eval/perplexity_ratio", "eval/distinct_2", "eval/length"} <= metrics.keys()
    assert verify_manifest(learned / "adapter") == []
    _, stack = load_stack(str(learned), device="cpu")
    assert (stack.base, len(stack.under), stack.extra["recipe"]) == (shop["gpt2"], 1, "dpo")
    assert "<svg" in (learned / "report.html").read_text()


def test_the_saved_policy_is_the_one_that_was_measured(shop, learned):
    """Its log-probabilities less those of the SFT model below are the changes that the run told of."""
    after, before = (load_stack(name, device="cpu")[0] for name in (str(learned), shop["under"]))
    config = load_config(dpo.CONFIG, None, tiny.overrides(shop, "dpo"))
    rows = dpo.rows_of(dpo.load_rows(config, "eval", "preferences").records, after.tokenizer, config)
    changes = []
    for row in rows:
        ids, start = torch.tensor([row["prompt"] + row["chosen"]]), len(row["prompt"])
        answer = torch.tensor(row["chosen"])[:, None]
        with torch.no_grad():
            logits = [backbone.model(ids).logits[0, start - 1 : -1] for backbone in (after, before)]
        logp, logq = (F.log_softmax(each, -1).gather(1, answer) for each in logits)
        changes.append(float((logp - logq).sum()))
    mean = sum(changes) / len(changes)
    assert summary_of(learned)["metrics"]["eval/chosen_change"] == pytest.approx(mean, rel=1e-3, abs=1e-3)


def test_ipo_learns_too_and_holds_its_margin(shop):
    run = go(shop, shop["runs"], "ipo", "loss=ipo", "beta=0.5", *LEARNS)
    metrics = summary_of(run)["metrics"]
    assert metrics["eval/pair_accuracy"] > 0.85
    assert 0 < metrics["eval/reward_margin"] < 1  # the loss wants 1 / (2 beta) a token: beta times that is .5
    first = next(row for row in read_rows(run / "metrics.jsonl") if "train/loss" in row)
    assert first["train/loss"] == pytest.approx(1.0, abs=1e-6)


LONG = ["max_steps=14", "save_every=5", "train_limit=22"]


@pytest.fixture(scope="module")
def whole(shop) -> Path:
    return go(shop, Path(shop["runs"]) / "whole", "dpo", *LONG)


@pytest.mark.parametrize("step", [3, 11, 14])
def test_a_stopped_run_resumes_to_the_same_bytes(shop, whole, tmp_path, monkeypatch, step):
    asked = itertools.count(1)
    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "stop_requested", property(lambda _: signal.SIGTERM if next(asked) == step else None))
        with pytest.raises(Interrupted):
            go(shop, tmp_path, "dpo", *LONG)
    assert summary_of(tmp_path / "dpo")["status"] == "stopped"
    torch.manual_seed(step)  # whatever the process drew before the resume does not matter
    run = go(shop, tmp_path, "dpo", *LONG, resume=True)
    weights, expected = ((r / "adapter" / "adapter_model.safetensors").read_bytes() for r in (run, whole))
    assert weights == expected
    assert logged(run) == logged(whole)
    for key in ("metrics", "baseline", "intervals", "artifacts"):
        assert summary_of(run)[key] == summary_of(whole)[key]


def logged(run: Path) -> list[dict[str, float]]:
    """The rows of metrics.jsonl without what depends on the clock."""
    return [{n: v for n, v in row.items() if not n.startswith("time")} for row in read_rows(run / "metrics.jsonl")]


def test_a_broken_invariant_stops_the_run_and_stands_in_the_log(shop, tmp_path, monkeypatch):
    def stale(*args, **kwargs):
        roles = Roles(*args, **kwargs)
        for parameter in roles.policy_parameters().values():
            torch.nn.init.normal_(parameter, std=0.1)
        return roles

    monkeypatch.setattr(dpo, "Roles", stale)
    with pytest.raises(LabError, match="first_kl"):
        go(shop, tmp_path, "dpo")
    summary = summary_of(tmp_path / "dpo")
    assert summary["status"] == "failed" and summary["metrics"]["invariant/first_kl"] > 0
    assert not (tmp_path / "dpo" / "adapter").exists()


@pytest.mark.parametrize(("pair", "message"), [
    ("label_smoothing=0.5", "label_smoothing"),
    ("lora.dropout=0.1", r"lora\.dropout"),
    ("max_length=97", "context"),
    ("max_new_tokens=89", "context"),
    ("model={judge}", "classifier"),
    ("judge=nowhere/judge", "nowhere/judge"),
    ("train_data={texts}", "prompt: missing"),
    ("prompts=nowhere.jsonl", "nowhere.jsonl"),
    ("beta=0", "beta"),
])
def test_what_cannot_work_is_one_message_before_training(shop, tmp_path, pair, message):
    with pytest.raises(UserError, match=message):
        go(shop, tmp_path, "run", pair.format(**shop))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_ipo_tells_which_beta_a_smoothing_would_be(shop):
    with pytest.raises(UserError, match=r"beta=0\.125"):
        load_config(dpo.CONFIG, None, ["loss=ipo", "beta=0.1", "label_smoothing=0.1"])


def test_answers_end_with_an_eos_unless_they_were_cut(shop):
    base, config = load_stack(shop["gpt2"], device="cpu")[0], load_config(dpo.CONFIG, None, tiny.overrides(shop, "dpo"))
    records = dpo.load_rows(config, "train", "preferences").records
    ended, cut = (dpo.rows_of(records, base.tokenizer, config.with_(answers_end=end)) for end in (True, False))
    for row, short, record in zip(ended, cut, records, strict=True):
        assert row["chosen"] == [*short["chosen"], 1] and row["rejected"] == [*short["rejected"], 1]
        assert base.tokenizer.decode(short["chosen"]) == record.chosen


def test_the_shipped_config_names_the_command_that_builds_its_pairs():
    from test_docs import check

    text = shipped_configs()["dpo-tiny"].read_text()
    lines = [line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#")]
    command = " ".join(lines).replace("\\", "").split("peftlab ", 1)[1].split(" With an SFT run", 1)[0]
    check(command)
    config = load_config(dpo.CONFIG, "dpo-tiny")
    assert config.train_data.startswith(command.split("--output ")[1].strip() + "/")
