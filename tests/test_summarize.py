"""`peftlab summarize`, and what serves and measures a summarizer afterwards."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from commands import peftlab
from safetensors.torch import load_file

from peftlab.config import load_config
from peftlab.data.records import SummaryPair
from peftlab.data.tokenize import IGNORED
from peftlab.errors import Interrupted, UserError
from peftlab.evaluation.summaries import MOST, SummaryFormat, leads, score_summaries, summarize
from peftlab.models.adapter_files import load_stack
from peftlab.models.catalog import resolve
from peftlab.recipes.evaluate import evaluate
from peftlab.recipes.launch import dry_run, launch
from peftlab.recipes.summarize import SummarizeConfig
from peftlab.runs.atomic import read_rows
from peftlab.runs.rundir import RunDir

METHODS = ("prefix-full", "prefix", "lora", "full")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("summarize")
    return {
        "t5": str(tiny.seq2seq_folder(root / "t5")),
        "summaries": tiny.write_rows(root / "summaries.jsonl", tiny.summaries(24)),
        "summaries_test": tiny.write_rows(root / "summaries-test.jsonl", tiny.summaries(6, seed=1)),
        "runs": str(root / "runs"),
    }


def go(shop: dict[str, str], name: str, *pairs: str, runs: Path | None = None, resume: bool = False) -> Path:
    runs = runs or Path(shop["runs"])
    launch("summarize", None, tiny.overrides(shop, "summarize", *pairs), runs, name, resume)
    return runs / name


@pytest.fixture(scope="module")
def runs(shop) -> dict[str, Path]:
    """A run of twelve steps by each method."""
    return {method: go(shop, method, f"method={method}", "max_steps=12") for method in METHODS}


def summary_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


@pytest.mark.parametrize("method", METHODS)
def test_each_method_learns_and_leaves_what_it_wrote(shop, runs, method):
    run = runs[method]
    summary = summary_of(run)
    assert (summary["status"], summary["recipe"]) == ("done", "summarize")
    figures = {"eval/rouge1", "eval/rouge2", "eval/rougeL", "eval/perplexity"}
    assert set(summary["baseline"]) == set(summary["intervals"]) == figures
    assert set(summary["metrics"]) == figures | {"compare/rouge1", "compare/rouge2", "compare/rougeL"}
    assert summary["baseline"] == summary_of(runs["lora"])["baseline"], "the bare model is the same for all"
    assert summary["metrics"]["eval/perplexity"] < summary["baseline"]["eval/perplexity"]
    assert summary["metrics"]["compare/rougeL"] > 90, "these summaries are first sentences"
    rows = list(read_rows(run / "samples.jsonl"))
    assert [row["side"] for row in rows] == ["before", "after"] * 6
    assert {row["prompt_id"] for row in rows} == {f"d{i}" for i in range(6)}
    page = (run / "report.html").read_text()
    assert "reference" in page and rows[0]["reference"] in page


def test_what_is_trained_is_what_the_method_says(shop, runs):
    """The base's files stay; adapters hold their own tensors only; `full` is a model folder that loads by name."""
    assert {resolve(str(runs[m])).kind for m in METHODS[:3]} == {"adapter"}
    assert resolve(str(runs["full"])).kind == "seq2seq"
    base = load_file(Path(shop["t5"]) / "model.safetensors")
    trained = load_file(runs["full"] / "model" / "model.safetensors")
    assert base.keys() == trained.keys() and not any(torch.equal(base[name], trained[name]) for name in base)
    assert set(load_file(runs["prefix-full"] / "adapter" / "prefix.safetensors")) == {"encoder", "decoder", "cross"}
    assert set(load_file(runs["prefix"] / "adapter" / "adapter_model.safetensors")) == {"prompt_embeddings"}
    lora = load_file(runs["lora"] / "adapter" / "adapter_model.safetensors")
    assert all(".lora_" in name for name in lora) and any("EncDecAttention" in name for name in lora)


@pytest.mark.parametrize("method", METHODS)
def test_predict_writes_what_the_run_measured(shop, runs, method, tmp_path):
    """The saved summarizer, loaded by its run's folder, says of each held-out document what `samples.jsonl` says."""
    said = {row["prompt_id"]: row["completion"] for row in read_rows(runs[method] / "samples.jsonl")
            if row["side"] == "after"}
    out = tmp_path / "out.jsonl"
    done = peftlab("predict {run} --input {rows} --output {out} --device cpu",
                   run=str(runs[method]), rows=shop["summaries_test"], out=str(out))
    assert done.code == 0, done.err
    assert {row["id"]: row["text"] for row in read_rows(out)} == said
    assert list(said) == [row["id"] for row in read_rows(out)]
    assert load_stack(str(runs[method]), device="cpu")[1].extra["beams"] == 2


@pytest.mark.parametrize("method", METHODS)
def test_eval_measures_what_the_run_measured(shop, runs, method):
    found = evaluate(str(runs[method]), shop["summaries_test"], None, "cpu")
    assert found["rows"] == 6
    expected = summary_of(runs[method])["metrics"]
    assert found["metrics"] == pytest.approx({n: expected[n] for n in found["metrics"]})
    assert set(found["metrics"]) == {"eval/rouge1", "eval/rouge2", "eval/rougeL"}


def test_predict_and_eval_serve_a_bare_encoder_decoder(shop):
    done = peftlab("predict {t5} --text 'the film was good.' --device cpu", t5=shop["t5"])
    assert done.code == 0 and set(json.loads(done.out)) == {"id", "text"}
    assert "eval/rougeL" in evaluate(shop["t5"], shop["summaries_test"], 2, "cpu")["metrics"]


def test_the_bare_model_reads_the_task_prefix(shop, runs):
    """`before` is the bare model on documents behind the task's prefix."""
    backbone, _ = load_stack(shop["t5"], device="cpu")
    pairs = [SummaryPair(row["id"], row["document"], row["summary"]) for row in tiny.summaries(6, seed=1)]
    texts = summarize(backbone.model, backbone.tokenizer, [p.document for p in pairs],
                      SummaryFormat("summarize: ", 64, 12, 2))
    before = summary_of(runs["lora"])["baseline"]
    assert score_summaries(texts, pairs).metrics == pytest.approx(
        {name: before[name] for name in before if "rouge" in name}
    )


@pytest.mark.parametrize("method, step", [("prefix-full", 3), ("prefix-full", 7), ("prefix", 3), ("full", 3)])
def test_a_stopped_run_resumes_to_the_same_bits(shop, tmp_path, monkeypatch, method, step):
    job = (f"method={method}", "max_steps=8", "save_every=2", "train_limit=14")
    whole = go(shop, "whole", *job, runs=tmp_path)
    asked = iter(range(1, 100))
    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "stop_requested", property(lambda _: signal.SIGTERM if next(asked) == step else None))
        with pytest.raises(Interrupted):
            go(shop, "parts", *job, runs=tmp_path)
    parts = go(shop, "parts", *job, runs=tmp_path, resume=True)
    weights = [next(run.glob("*/*.safetensors")) for run in (whole, parts)]
    assert weights[0].name == weights[1].name and weights[0].read_bytes() == weights[1].read_bytes()
    for key in ("metrics", "baseline", "intervals", "artifacts"):
        assert summary_of(whole)[key] == summary_of(parts)[key]
    assert (whole / "samples.jsonl").read_bytes() == (parts / "samples.jsonl").read_bytes()


def test_rows():
    """Inputs are cut to make room for EOS, which every input ends with; a summary that is cut does not end."""
    tokenizer = tiny.spelling_tokenizer()
    form = SummaryFormat("say: ", max_length=12, max_summary=5)
    long, short = form.rows([SummaryPair("0", "film " * 20, "good " * 9), SummaryPair("1", "a", "bad")], tokenizer)
    end = tokenizer.eos_token_id
    assert len(long["input_ids"]) == 12 and len(long["labels"]) == 5
    assert long["input_ids"][-1] == short["input_ids"][-1] == short["labels"][-1] == end
    assert long["labels"][-1] != end and IGNORED not in long["labels"]
    assert tokenizer.decode(short["input_ids"], skip_special_tokens=True) == "say: a"


def test_an_adapters_own_format_is_read_and_checked():
    form = SummaryFormat("sum up: ", 99, 7, 3)
    assert SummaryFormat.of({"recipe": "summarize", **form.facts()}) == form
    assert SummaryFormat.of({}) == SummaryFormat()
    wrongs = ({"beams": 0}, {"beams": "4"}, {"max_summary": True}, {"task_prefix": None})
    for wrong in (*wrongs, *({name: most + 1} for name, most in MOST.items())):
        with pytest.raises(UserError, match=next(iter(wrong))):
            SummaryFormat.of(wrong)


def test_what_a_run_may_ask_for_its_summarizer_may_do():
    assert SummaryFormat.of(MOST).beams == SummarizeConfig(**MOST).beams == MOST["beams"]
    for name, most in MOST.items():
        with pytest.raises(ValueError, match=name):
            SummarizeConfig(**{name: most + 1})


@pytest.mark.parametrize("facts, said", [
    (["beams"], None), (7, None), ("beams", None), (None, None), ({"beams": 99_999_999}, "beams: 99999999 is no way"),
])
def test_a_strangers_model_may_say_anything_in_our_key(shop, tmp_path, facts, said):
    """What is no mapping is none of ours; a mapping is read, and refused where it asks for too much."""
    folder = Path(shutil.copytree(shop["t5"], tmp_path / "t5"))
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**about, "peftlab": facts}))
    for command in ("predict {t5} --text 'a film.' --device cpu", "eval {t5} --data {rows} --limit 1 --device cpu"):
        done = peftlab(command, t5=str(folder), rows=shop["summaries_test"])
        assert done.code == (2 if said else 0), done.err
        assert (said or "") in done.err and "Traceback" not in done.err


def test_generate_says_what_a_summarizer_does_instead(shop):
    done = peftlab("generate {t5} --prompt 'a film' --device cpu", t5=shop["t5"])
    assert done.code == 2 and "is a seq2seq, which cannot continue text; try `peftlab predict" in done.err


def test_summaries_do_not_depend_on_their_neighbours(shop):
    backbone, _ = load_stack(shop["t5"], device="cpu")
    documents = [row["document"] for row in tiny.summaries(7, seed=3)]
    form = SummaryFormat(max_length=64, max_summary=10, beams=3)
    together = summarize(backbone.model, backbone.tokenizer, documents, form)
    alone = [summarize(backbone.model, backbone.tokenizer, [text], form)[0] for text in documents]
    assert together == alone


def test_lead_is_the_first_sentence():
    assert leads(["It was good. It ended!", "no end", 'He said "stop." Then left.']) == [
        "It was good.", "no end", 'He said "stop."'
    ]


def test_plan_and_config(shop):
    plans = {m: dry_run("summarize", None, tiny.overrides(shop, "summarize", f"method={m}", "prefix_hidden=0"))
             for m in METHODS}
    trained = {method: plan["trained parameters"] for method, plan in plans.items()}
    one = 2 * 2 * 4 * 5 * 12  # layers, key and value, heads, positions, width of a head
    assert trained["prefix-full"] == 3 * one and trained["prefix"] == one
    assert trained["full"] == sum(v.numel() for v in load_file(Path(shop["t5"]) / "model.safetensors").values())
    assert plans["lora"]["rows"] == 24 and plans["lora"]["steps"] == 2
    for name in ("summarize-tiny", "summarize-xsum"):
        assert load_config(SummarizeConfig, name).method == "prefix-full"


def test_a_model_of_another_kind_is_refused(shop, tmp_path):
    gpt2 = tiny.causal_folder(tmp_path / "gpt2")
    with pytest.raises(UserError, match="needs an encoder-decoder"):
        go(shop, "gpt2", f"model={gpt2}")
    with pytest.raises(UserError, match="sft needs a causal language model"):
        launch("sft", None, [f"model={shop['t5']}", "device=cpu"], Path(shop["runs"]), "sft-t5")
