"""Whole classifiers and reward models, as transformers saves them, in the places of the lab's adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from commands import peftlab
from safetensors.torch import load_file, save_file
from task_jobs import go, keys
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from peftlab.errors import UserError
from peftlab.models.backbone import load_backbone
from peftlab.models.classifier import TextClassifier
from peftlab.models.reward_model import RewardModel, critic_start
from peftlab.models.stacks import kind_of
from peftlab.models.whole import WholeReward, load_reward
from peftlab.recipes.launch import dry_run, launch
from peftlab.runs.atomic import read_rows

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = ["the film was great fun", "dull", "a plot that an awful actor made dull, and a great film none the less"]
ENCODER = {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 64}
DECODER = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 96}
ROBERTA = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
           "max_position_embeddings": 65, "initializer_range": 0.1}  # the first place is padding's
LLAMA = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


MODELS = {
    "encoder": (DistilBertForSequenceClassification, DistilBertConfig, ENCODER),
    "roberta": (RobertaForSequenceClassification, RobertaConfig, ROBERTA),
    "decoder": (GPT2ForSequenceClassification, GPT2Config, DECODER),
    "llama": (LlamaForSequenceClassification, LlamaConfig, LLAMA),
}


def whole(folder: Path, kind: str, labels: list[str], **facts: Any) -> str:
    """A random model with a head of `labels`, in a folder; `facts` of its config."""
    words = tiny.spelling_tokenizer(encoder=kind in ("encoder", "roberta"))
    if kind == "llama":  # as many of its class: EOS behind every text, and no word for padding
        words.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
        words.pad_token = None
    told: dict[str, Any] = {
        "vocab_size": len(words), "pad_token_id": words.pad_token_id, "id2label": dict(enumerate(labels)), **facts,
    }
    torch.manual_seed(len(labels))
    model_of, config_of, sizes = MODELS[kind]
    model = model_of(config_of(**told, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # answers that differ by more than rounding
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


def plain(folder: str, texts: list[str]) -> torch.Tensor:
    """Logits by transformers alone, a text at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    words = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return torch.cat([model(**words(text, return_tensors="pt")).logits for text in texts])


@pytest.mark.parametrize("kind", MODELS)
def test_a_classifier_says_what_transformers_says(tmp_path, kind):
    folder = whole(tmp_path / "m", kind, ["bug", "Praise", "other"])
    found = TextClassifier.load(folder, device="cpu")
    assert kind_of(folder) == "classifier" and found.labels == ["bug", "praise", "other"]
    expected = plain(folder, TEXTS)
    assert expected.std(0).min() > 1e-2
    assert torch.allclose(found.logits(TEXTS), expected, atol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_a_reward_model_scores_prompt_and_answer(tmp_path, kind):
    folder = whole(tmp_path / "m", kind, ["LABEL_0"])
    model = load_reward(folder, "cpu")
    assert kind_of(folder) == "reward" and isinstance(model, WholeReward)
    prompts, answers = ["the film", "", "a plot"], [" was great fun", "dull", " that an awful actor made dull"]
    expected = plain(folder, [a + b for a, b in zip(prompts, answers, strict=True)])[:, 0]
    assert torch.allclose(model.scores(prompts, answers), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("written", "labels"),
    [
        (["LABEL_0", "LABEL_1"], ["negative", "positive"]),
        (["POSITIVE", "NEGATIVE"], ["positive", "negative"]),
        (["neg", "pos"], ["negative", "positive"]),
        (["LABEL_0", "LABEL_1", "LABEL_2"], ["label_0", "label_1", "label_2"]),
        (["neg", "neutral", "pos"], ["neg", "neutral", "pos"]),
        (["ham", "spam"], ["ham", "spam"]),
        (["A", "a"], ["A", "a"]),
        ([0, 1], ["negative", "positive"]),
    ],
)
def test_classes_go_by_the_labs_names_where_they_are_the_two_sentiments(tmp_path, written, labels):
    assert TextClassifier.load(whole(tmp_path / "m", "encoder", written), device="cpu").labels == labels


@pytest.mark.parametrize("kind", ["encoder", "roberta"])
def test_of_what_is_longer_than_the_model_both_ends_are_read(tmp_path, kind):
    found = TextClassifier.load(whole(tmp_path / "m", kind, ["a", "b"]), device="cpu")
    assert found.max_length == 64
    long = "great " * 40 + "dull " * 40
    assert torch.isfinite(found.logits([long])).all()
    assert not torch.equal(found.logits([long]), found.logits(["great " * 80]))


CUSTOM = ("task=custom", "train_data={prompts}", "eval_data={prompts}")


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("whole")
    return tiny.workshop(folder) | {
        "classifier": whole(folder / "classifier", "encoder", ["NEGATIVE", "POSITIVE"]),
        "scores": whole(folder / "scores", "decoder", ["LABEL_0"]),
        "folder": str(folder),
    }


def test_a_policy_is_rewarded_and_judged_by_whole_models(shop, tmp_path):
    asked = keys(shop, "rloo", *CUSTOM, "reward={scores} + p({classifier})", "want=positive")
    summary, run = go("rloo", asked, tmp_path)
    assert {"eval/part/scores", "eval/part/p-classifier"} <= summary["metrics"].keys()
    texts = [row["prompt"] + row["completion"] for row in read_rows(run / "samples.jsonl") if row["side"] == "before"]
    raw = float(plain(shop["scores"], texts).mean())
    assert abs(summary["baseline"]["eval/part/scores"]) < 3 < abs(raw - 40), "normalised where it learns"
    noted = json.loads((run / "environment.json").read_text())
    assert all(len(noted["models"][f"reward {shop[name]}"]["sha256"]) == 64 for name in ("scores", "classifier"))
    asked = keys(shop, "rloo", *CUSTOM, "reward={scores}", "want=positive", "judge={classifier}")
    judged, _ = go("rloo", asked, tmp_path / "judged")
    assert 0 < judged["metrics"]["eval/judge"] < 1


@pytest.mark.parametrize(("multiplies", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_judge_scores_in_what_the_processor_multiplies_in(shop, tmp_path, monkeypatch, multiplies, dtype):
    """Imitated, bfloat16 took a judge eight times as long."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: multiplies)
    load, judges = TextClassifier.load.__func__, []
    monkeypatch.setattr(TextClassifier, "load", classmethod(lambda *a, **k: judges.append(load(*a, **k)) or judges[-1]))
    go("rloo", keys(shop, "rloo", *CUSTOM, "reward=rubric:length", "want=positive", "judge={classifier}"), tmp_path)
    assert [next(judge.model.parameters()).dtype for judge in judges] == [dtype]


def test_no_critic_starts_as_a_whole_model(shop, tmp_path):
    with pytest.raises(UserError, match=r"critic: .*scores is a whole model.*critic=adapter"):
        launch("ppo", None, keys(shop, "ppo", *CUSTOM, "reward={scores}", "critic=reward"), tmp_path, "run")
    with pytest.raises(UserError, match="whole model"):
        critic_start(shop["scores"], None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"judge: .*scores is of kind reward, not a classifier"):
        dry_run("rloo", None, keys(shop, "rloo", *CUSTOM, "reward=rubric:length", "want=positive", "judge={scores}"))


def test_labels_that_do_not_exclude_each_other_are_refused(tmp_path):
    folder = whole(tmp_path / "m", "encoder", ["rude", "long"], problem_type="multi_label_classification")
    with pytest.raises(UserError, match="do not exclude each other"):
        TextClassifier.load(folder, device="cpu")


def test_a_head_of_other_classes_is_made_anew(shop, tmp_path):
    """A whole classifier is a base, too: what is under the head is what it learned."""
    folder = whole(tmp_path / "m", "encoder", ["a", "b", "c"])
    base = load_backbone(folder, "classifier", device="cpu", num_labels=2)
    own = load_backbone(folder, "classifier", device="cpu", num_labels=None)
    assert base.model.config.num_labels == 2 and base.fingerprint == own.fingerprint
    given = [f"model={folder}" if pair.startswith("model=") else pair for pair in tiny.overrides(shop, "classify")]
    assert launch("classify", None, given, tmp_path, "run")["status"] == "done"


def test_an_exported_reward_model_scores_as_the_adapter_did(shop, tmp_path):
    launch("reward", None, tiny.overrides(shop, "reward"), tmp_path, "rm")
    exported = tmp_path / "exported"
    assert peftlab("export {run} --as merged --output {out}", run=str(tmp_path / "rm"), out=str(exported)).code == 0
    rows = tiny.preferences(12)
    texts = [row["prompt"] for row in rows] * 2, [row["chosen"] for row in rows] + [row["rejected"] for row in rows]
    adapter, found = load_reward(str(tmp_path / "rm"), "cpu"), load_reward(str(exported), "cpu")
    assert isinstance(adapter, RewardModel) and isinstance(found, WholeReward)
    assert torch.allclose(found.scores(*texts), adapter.scores(*texts), atol=1e-4)


@pytest.mark.parametrize("lacks", ["a tokenizer", "its own tokenizer", "numbers"])
def test_what_would_answer_nonsense_is_refused(tmp_path, lacks):
    """transformers makes an empty tokenizer where there is none."""
    folder = Path(whole(tmp_path / "m", "encoder", ["a", "b"], **({"vocab_size": 99} if "own" in lacks else {})))
    if lacks == "a tokenizer":
        for file in folder.glob("tokenizer*"):
            file.unlink()
    if lacks == "numbers":
        weights = load_file(folder / "model.safetensors")
        weights["classifier.weight"][0, 0] = torch.nan
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    words = {"a tokenizer": "holds no tokenizer", "its own tokenizer": "320 tokens, and the model 99"}
    with pytest.raises(UserError, match=words.get(lacks, r"classifier\.weight holds numbers that are not finite")):
        TextClassifier.load(str(folder), device="cpu")


def test_a_head_that_is_not_there_is_refused(tmp_path):
    folder = Path(whole(tmp_path / "m", "encoder", ["a", "b"]))
    weights = load_file(folder / "model.safetensors")
    save_file({n: w for n, w in weights.items() if not n.startswith("classifier.")}, folder / "model.safetensors",
              metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack classifier\.bias"):
        TextClassifier.load(str(folder), device="cpu")


def test_the_verbs_take_them(shop, tmp_path):
    answered = peftlab("predict {classifier} --text great --device cpu", **shop)
    assert json.loads(answered.out)["label_name"] in ("negative", "positive")
    pairs = tiny.write_rows(tmp_path / "pairs.jsonl", tiny.preferences(12))
    told = json.loads(peftlab("eval {scores} --data {pairs} --device cpu --json", pairs=pairs, **shop).out)
    scores = load_reward(shop["scores"], "cpu")
    rows = tiny.preferences(12)
    chosen, rejected = (
        scores.scores([row["prompt"] for row in rows], [row[side] for row in rows]) for side in ("chosen", "rejected")
    )
    assert told["metrics"]["eval/pair_accuracy"] == pytest.approx(float(np.mean((chosen > rejected).numpy())))
    refused = peftlab("generate {scores} --prompt x", **shop)
    assert refused.code == 2 and "is of kind reward" in refused.err
