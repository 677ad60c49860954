"""SFT beyond plain LoRA on text: LoRA's variants, conversations, and classifiers taught by a classifier."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from transformers.pytorch_utils import Conv1D

from peftlab.chat.session import Session
from peftlab.chat.voices import Voice
from peftlab.data.explanations import answer_of
from peftlab.data.records import Conversation, Message
from peftlab.data.tokenize import IGNORED
from peftlab.errors import UserError
from peftlab.models.adapter_files import load_stack
from peftlab.models.classifier import TextClassifier, encode
from peftlab.recipes import classify, sft
from peftlab.recipes.launch import launch
from peftlab.runs.atomic import read_rows
from peftlab.runs.checkpoint import write_manifest
from peftlab.sampling.sampler import Decoding, Sampler

ANSWERS = {"w1": "good", "w2": "very dull", "w3": "a great film", "w4": "awful"}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("variants")
    return tiny.workshop(root) | {"runs": str(root / "runs"), "root": str(root)}


def run_of(shop: dict[str, str], verb: str, name: str, *pairs: str) -> Path:
    runs = Path(shop["runs"])
    assert launch(verb, None, tiny.overrides(shop, verb, *pairs), runs, name)["status"] == "done"
    return runs / name


@pytest.mark.parametrize("variant", ["rslora", "dora"])
def test_lora_variants_are_plain_peft(shop, variant):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = run_of(shop, "sft", variant, f"lora.{variant}=true")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(shop["gpt2"]), folder / "adapter").eval()
    assert getattr(plain.peft_config["default"], f"use_{variant}")
    ids = torch.randint(4, 320, (3, 20))
    with torch.no_grad():
        expected = plain(ids).logits
        merged = load_stack(str(folder), device="cpu")[0].model(ids).logits
        with plain.disable_adapter():
            assert (plain(ids).logits - expected).abs().max() > 0.05
    torch.testing.assert_close(merged, expected, atol=2e-4, rtol=1e-4)


def test_the_magnitudes_of_dora_learn(shop):
    folder = run_of(shop, "sft", "magnitudes", "lora.dora=true", "max_steps=6")
    model = load_stack(str(folder), device="cpu", merge=False)[0].model
    layer = next(m for m in model.modules() if hasattr(m, "lora_magnitude_vector") and m.lora_magnitude_vector)
    weight = layer.base_layer.weight + layer.get_delta_weight("policy")
    axis = 0 if isinstance(layer.base_layer, Conv1D) else 1
    fresh = layer.base_layer.weight.norm(dim=axis).flatten()
    learned = layer.lora_magnitude_vector["policy"].weight.flatten()
    assert weight.shape == layer.base_layer.weight.shape
    assert (learned - fresh).abs().max() > 1e-3


def test_conversations_with_a_model_of_no_template(shop):
    """GPT-2 learns turns in the lab's plain template, and chat on the adapter asks it in the same one."""
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in ANSWERS.items()
    ]
    data, same = (tiny.write_rows(Path(shop["root"]) / name, rows) for name in ("talk.jsonl", "talk-test.jsonl"))
    folder = run_of(shop, "sft", "talk", f"train_data={data}", f"eval_data={same}", "max_steps=120", "lr=3e-3",
                    "lora.r=16", "lora.alpha=32")
    backbone, stack = load_stack(str(folder), device="cpu")
    assert stack.extra["chat_template"] == "plain"
    session = Session(Voice.of(Sampler(backbone.model, backbone.tokenizer)), Decoding(12, temperature=0.0))
    for question, answer in ANSWERS.items():
        session.clear()
        assert "".join(session.reply(question)) == answer
    # What is trained on top of it still talks that way.
    above = run_of(shop, "sft", "above", f"model={folder}")
    assert load_stack(str(above), device="cpu")[1].extra["chat_template"] == "plain"


def test_an_answer_ends_as_the_template_ends_a_turn(shop):
    """The learned tokens and the prompt are, together, the conversation as the template spells it, and an EOS."""
    tokenizer = tiny.spelling_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }} [end]\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    turns = (Message("user", "was it good"), Message("assistant", "not very"))
    (row,) = sft.rows_of([Conversation("0", turns)], tokenizer, sft.SftConfig())
    said = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORED]
    assert tokenizer.decode(said) == "not very [end]<eos>"
    assert tokenizer.decode(row["input_ids"]) == "[user] was it good [end]\n[assistant] not very [end]<eos>"
    tokenizer.chat_template = tokenizer.chat_template.replace("[end]", "<eos>")
    (row,) = sft.rows_of([Conversation("0", turns)], tokenizer, sft.SftConfig())
    assert tokenizer.decode(row["input_ids"]).endswith("not very <eos>") and row["input_ids"].count(1) == 2


def test_classifiers_beside_this_one_know_the_same_labels(shop):
    folder = run_of(shop, "classify", "other-way", 'labels=["positive", "negative"]')
    for key in ("teacher", "compare"):
        with pytest.raises(UserError, match=f"{key} .*labels"):
            run_of(shop, "classify", f"beside-{key}", f"{key}={folder}")
    same = run_of(shop, "classify", "same", "compare=" + str(run_of(shop, "classify", "base")))
    summary = json.loads((same / "summary.json").read_text())
    assert summary["metrics"]["compare/accuracy"] == summary["metrics"]["eval/accuracy"]


@pytest.mark.parametrize("fact", [("temperature", v) for v in (0, -1, "hot", None, float("nan"))] + [("max_length", 2)])
def test_facts_of_a_classifier_that_cannot_be_are_refused(shop, fact):
    folder = Path(shop["runs"]) / "facts"
    if not folder.is_dir():
        run_of(shop, "classify", "facts")
    stack = folder / "adapter" / "stack.json"
    before = stack.read_text()
    stack.write_text(json.dumps(json.loads(before) | dict([fact])))
    write_manifest(stack.parent)
    try:
        with pytest.raises(UserError, match=fact[0]):
            TextClassifier.load(str(folder), device="cpu")
    finally:
        stack.write_text(before)


def test_a_long_text_keeps_its_opening_and_its_ending():
    tokenizer = tiny.spelling_tokenizer(encoder=True)
    texts = [" ".join(["good"] * 4), " ".join(["the"] * 30 + ["bad"] * 30)]
    short, long = encode(tokenizer, texts, 16)
    whole = tokenizer(texts)["input_ids"]
    assert short == whole[0]
    assert long == whole[1][:8] + whole[1][-8:]


def test_a_student_learns_what_its_teacher_thinks(shop, monkeypatch):
    """Taught by a classifier that takes every label for the other, the student does so too."""
    root = Path(shop["root"])
    flipped = [row | {"label": 1 - row["label"]} for row in tiny.reviews(400, seed=5)]
    wrong = tiny.write_rows(root / "flipped.jsonl", flipped)
    right = tiny.write_rows(root / "right.jsonl", tiny.reviews(400, seed=6))
    keys = ["max_steps=150", "batch_size=16", "lr=5e-3", "lora.r=8", "lora.alpha=16"]
    teacher = run_of(shop, "classify", "teacher", f"train_data={wrong}", *keys)
    student = run_of(shop, "classify", "student", f"train_data={right}", f"teacher={teacher}", "views=2", *keys)
    texts = [row["text"] for row in read_rows(Path(shop["labelled_test"]))]
    guesses = [TextClassifier.load(str(f), device="cpu").logits(texts).argmax(1) for f in (teacher, student)]
    assert (guesses[0] == guesses[1]).double().mean() > 0.85
    labels = torch.tensor([row["label"] for row in read_rows(Path(shop["labelled_test"]))])
    assert (guesses[1] == labels).double().mean() < 0.3


def test_the_temperature_is_saved_and_used(shop):
    data = tiny.write_rows(Path(shop["root"]) / "many.jsonl", tiny.reviews(400, seed=7))
    folder = run_of(shop, "classify", "calibrated", f"train_data={data}", "calibrate=0.25", "max_steps=30")
    saved = load_stack(str(folder), device="cpu")[1].extra["temperature"]
    classifier = TextClassifier.load(str(folder), device="cpu")
    assert classifier.temperature == saved != 1.0
    hot = TextClassifier(**{**vars(classifier), "temperature": 1.0}).logits(["good", "bad"])
    torch.testing.assert_close(classifier.logits(["good", "bad"]) * saved, hot)


def test_views_are_the_text_and_passages_of_it():
    config = classify.ClassifyConfig(views=4, max_length=512)
    records = [type("R", (), {"id": "0", "text": "one two three  four five six seven eight", "label": 1})()]
    tokenizer = tiny.spelling_tokenizer(encoder=True)
    rows = classify.rows_of(records, tokenizer, config)
    shown = [tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in rows]
    assert shown[0] == records[0].text and len(shown) == 4
    assert all(view in records[0].text and len(view.split()) >= 6 for view in shown)


def test_explanations_are_scored_before_and_after(shop):
    """Learned by heart, the answers get every part of the rubric; the base model's get nearly none.

    A prompt that fills the context is not asked.
    """
    said = [("the plot was very dull", 0, "very dull"), ("it was great fun to watch", 1, "great fun")]
    rows = [
        {"prompt": f"Review: {review}\nAnswer:", "label": label,
         "completion": answer_of(label, f'The reviewer says "{quoted}" and means it.')}
        for review, label, quoted in said
    ]
    data = tiny.write_rows(Path(shop["root"]) / "why.jsonl", rows)
    long = {**rows[0], "prompt": f"Review: {'very dull ' * 400}\nAnswer:"}
    same = tiny.write_rows(Path(shop["root"]) / "why-test.jsonl", [long, *rows])
    pairs = [f"train_data={data}", f"eval_data={same}", "answers=2", "max_steps=150", "lr=3e-3", "lora.r=16"]
    folder = run_of(shop, "sft", "why", *pairs, "max_length=96", "lora.alpha=32")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["baseline"]["rubric/all"] == 0
    assert summary["metrics"]["rubric/all"] == summary["metrics"]["eval/eos_fraction"] == 1
    sides = [(row["side"], row["prompt_id"]) for row in read_rows(folder / "samples.jsonl")]
    assert sides == [("before", "1"), ("before", "2"), ("after", "1"), ("after", "2")]
    (left,) = [event for event in read_rows(folder / "events.jsonl") if event["kind"] == "prompts_left_out"]
    assert left["rows"] == 1
    with pytest.raises(UserError, match="answers"):
        run_of(shop, "sft", "bare", "answers=2")
