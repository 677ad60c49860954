"""`peftlab pretrain architecture=t5` as real runs of seconds."""

from __future__ import annotations

import dataclasses
import itertools
import json
import signal
from pathlib import Path

import pytest
import tiny
import torch
from safetensors import safe_open
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from peftlab.errors import Interrupted, UserError
from peftlab.evaluation.targets import target_nlls
from peftlab.models.catalog import resolve
from peftlab.models.fresh import new_model, relative_groups
from peftlab.recipes.launch import dry_run, launch
from peftlab.recipes.pretrain import PretrainConfig
from peftlab.recipes.pretrain_card import Facts, card
from peftlab.runs.atomic import read_rows
from peftlab.runs.rundir import RunDir
from peftlab.training.trainer import Rows

# 40 rows, one block and one gap of each text: five batches an epoch, so that eight steps go past `epochs`.
T5 = ["architecture=t5", "vocab_size=400", "max_length=96", "batch_size=8", "max_steps=8", "lr=1e-2", "save_every=3"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("t5")
    texts = tiny.documents(30)
    return {
        "texts": tiny.write_rows(folder / "texts.jsonl", [{"text": text} for text in texts[:20]]),
        "texts_test": tiny.write_rows(folder / "test.jsonl", [{"text": text} for text in texts[20:]]),
    }


@pytest.fixture(scope="module")
def whole(shop, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    go(shop, root)
    return root / "t5"


def go(shop: dict[str, str], root: Path, *pairs: str, resume: bool = False) -> dict:
    return launch("pretrain", None, tiny.overrides(shop, "pretrain", *T5, *pairs), root, "t5", resume)


def test_it_leaves_a_t5_that_loads_and_is_as_good_as_it_says(whole, shop):
    summary = json.loads((whole / "summary.json").read_text())
    assert (summary["status"], summary["artifacts"]) == ("done", {"model": "model"})
    for name in ("eval/perplexity", "eval/gap_perplexity"):
        assert 1 < summary["metrics"][name] < summary["baseline"][name]
        low, high = summary["intervals"][name]
        assert low <= summary["metrics"][name] <= high
        assert f"{summary['metrics'][name]:.2f}" in (whole / "model" / "README.md").read_text()
    assert resolve(str(whole)).kind == "seq2seq"
    model = AutoModelForSeq2SeqLM.from_pretrained(whole / "model", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(whole / "model")
    assert (model.config.dropout_rate, model.config.use_cache, model.generation_config.use_cache) == (0.0, True, True)
    text = "the film was good , 雪 !"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert tokenizer("<extra_id_3>")["input_ids"] == [6, 1]
    rows = [json.loads(line)["text"] for line in Path(shop["texts_test"]).read_text().splitlines()]
    batch = tokenizer(rows, padding=True, return_tensors="pt")
    assert model.generate(**batch, max_new_tokens=4, do_sample=False).shape[0] == len(rows)
    for file in (whole / "model").glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            assert {shard.get_tensor(name).dtype for name in shard.keys()} == {torch.float16}  # noqa: SIM118


def test_an_epoch_is_a_pass(shop, tmp_path, monkeypatch):
    """It shows every item once, and what it shows of one is never shown again, past `epochs` neither."""
    taken: list[tuple[int, tuple[int, ...]]] = []
    get = Rows.__getitem__

    def noting(self, index: int):
        row = get(self, index)
        taken.append((index % 40, tuple(row["input_ids"])))
        return row

    monkeypatch.setattr(Rows, "__getitem__", noting)
    go(shop, tmp_path, "max_steps=12")
    assert next(read_rows(tmp_path / "t5" / "metrics.jsonl"))["data/rows"] == 40
    taken = taken[: 12 * 8]  # the loader may read ahead
    for start in (0, 40):
        assert sorted(item for item, _ in taken[start : start + 40]) == list(range(40))
    assert len({item for item, _ in taken[80:]}) == 16
    blocks = [row for row in taken if row[0] < 20]
    assert len(set(blocks)) == len(blocks)
    inputs = [{ids for item, ids in taken[start : start + 40] if item >= 20} for start in (0, 40)]
    assert not inputs[0] & inputs[1], "a gap's sentence is masked in every other pass"


@pytest.mark.parametrize("step", [2, 5, 6, 8])
def test_a_stopped_run_resumes_to_the_same_bits(shop, whole, tmp_path, monkeypatch, step):
    asked = itertools.count(1)
    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "stop_requested", property(lambda _: signal.SIGTERM if next(asked) == step else None))
        with pytest.raises(Interrupted):
            go(shop, tmp_path)
    torch.manual_seed(step)
    go(shop, tmp_path, resume=True)
    run = tmp_path / "t5"
    assert (run / "model" / "model.safetensors").read_bytes() == (whole / "model" / "model.safetensors").read_bytes()
    logs = [
        [{name: value for name, value in row.items() if not name.startswith("time")} for row in read_rows(path)]
        for path in (run / "metrics.jsonl", whole / "metrics.jsonl")
    ]
    assert logs[0] == logs[1]


def test_texts_of_one_sentence_train_without_gaps(shop, tmp_path):
    rows = [{"text": f"the film w{number} was good"} for number in range(12)]
    data = tiny.write_rows(tmp_path / "short.jsonl", rows)
    same = tiny.write_rows(tmp_path / "short-test.jsonl", rows)
    summary = go(shop, tmp_path, f"train_data={data}", f"eval_data={same}", "max_steps=1")
    assert summary["metrics"].keys() == {"eval/perplexity"}


def test_a_dry_run_counts_its_parameters(shop, whole):
    told = dry_run("pretrain", None, tiny.overrides(shop, "pretrain", *T5, "vocab_size=360"))["parameters"]
    model = new_model("t5", vocab_size=360, max_length=96, width=16, layers=1, heads=2, dropout=0.1)
    assert told == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        ("vocab_size=358", "vocab_size.*359"),
        ("heads=3", "heads"),
        ("architecture=gpt2 copy_epochs=1", "copy_epochs.*T5"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(shop, tmp_path, pair, words):
    with pytest.raises(UserError, match=words):
        go(shop, tmp_path, *pair.split())


def test_every_parameter_learns_at_a_rate_of_its_own_size():
    model = new_model("t5", vocab_size=400, max_length=96, width=64, layers=2, heads=4, dropout=0.0)
    groups = relative_groups(model, 1e-2, 0.1)
    grouped = [p for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped)) and set(grouped) == set(model.parameters())
    before = {p: p.detach().clone() for p in grouped}
    optimizer = torch.optim.AdamW(groups)
    ids = torch.arange(110, 150).view(4, 10)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    for parameter, first in before.items():
        moved = (parameter.detach() - first).abs()
        # Adam's first step is the whole rate, for all that have a gradient, and decay is a thousandth.
        step = float(moved[parameter.grad != 0].median() / first.square().mean().sqrt())
        assert 1e-2 / 1.5 < step < 1.5e-2


def test_padding_and_order_do_not_change_what_is_measured(whole):
    model = AutoModelForSeq2SeqLM.from_pretrained(whole / "model", dtype=torch.float32)
    rows = [{"input_ids": [110 + i] * (i + 2), "labels": [120 + i] * (7 - i)} for i in range(5)]
    sums, counts = target_nlls(model, rows, 0)
    assert counts.tolist() == [7, 6, 5, 4, 3]
    for row, total in zip(rows, sums, strict=True):
        batch = {name: torch.tensor([ids]) for name, ids in row.items()}
        assert total == pytest.approx(model(**batch).loss.item() * len(row["labels"]), rel=1e-4)


def test_the_card_says_what_it_was_trained_on_and_where(whole, shop, monkeypatch):
    own = (whole / "model" / "README.md").read_text()
    assert f"on the texts of {shop['texts']} and on nothing else" in own
    assert "IMDb" not in own and "review" not in own
    facts = Facts({"eval/perplexity": 9.0}, {"eval/perplexity": (8.0, 10.0)}, 1, 1.0, 1, 1, torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")
    mixed = f"imdb:train+{shop['texts']}"
    for data, reviews in (("imdb:train", True), ("imdb:train+imdb:judge", True), (mixed, False)):
        told = card(PretrainConfig(train_data=data, device="cpu"), facts, [])
        assert ("IMDb reviews" in told, "card" in told) == (reviews, False) and data in told
    assert "card 1" in card(PretrainConfig(), dataclasses.replace(facts, device=torch.device("cuda:1")), [])
