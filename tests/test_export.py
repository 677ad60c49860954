"""Exports equal the lab's own stacks where plain PEFT and transformers load them, and say so where there is none."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_runs
import pytest
import tiny
import torch
from commands import peftlab
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)

from peftlab.errors import LabError, UserError
from peftlab.models import export as writing
from peftlab.models.adapter_files import load_stack, save_adapter
from peftlab.models.adapters import LoraVariants, attach
from peftlab.models.backbone import load_backbone
from peftlab.models.classifier import TextClassifier
from peftlab.models.heads import ScalarHead
from peftlab.models.reward_model import RewardModel, RewardNet
from peftlab.models.reward_scale import Scale
from peftlab.models.stacks import Stack, read_stack, stack_over
from peftlab.recipes import export as recipe
from peftlab.recipes import export_card
from peftlab.recipes.export import export
from peftlab.runs.checkpoint import whole_folder

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = ["the film was great fun", "a dull plot and an awful actor"]
IDS = torch.randint(2, 300, (2, 20), generator=torch.Generator().manual_seed(5))
EQUAL = {"atol": 1e-4, "rtol": 0.0}


def shaken(parameters: Any) -> None:
    """An adapter that was trained: no factor is zero."""
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1 * torch.randn(parameter.shape))


def adapted(name: str, folder: Path, lora: LoraVariants) -> str:
    """A trained adapter on the model or adapter `name`."""
    backbone, under = load_stack(name, device="cpu")
    kind = under.kind
    model = attach(backbone.model, lora, "policy", kind, under.base)
    shaken(p for n, p in model.named_parameters() if ".lora_" in n)
    stack = stack_over(name, under, backbone.tokenizer)
    save_adapter(model, "policy", folder, Stack(kind, stack.base, stack.fingerprint, stack.under, stack.extra))
    return str(folder)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Bases and adapters by name; `policy` stands on `sft`, with another rank, scale and layers."""
    root = tmp_path_factory.mktemp("export")
    torch.manual_seed(1)
    bases = {
        "base": str(tiny.causal_folder(root / "base")),
        "encoder": str(tiny.encoder_folder(root / "encoder")),
        "t5": str(tiny.seq2seq_folder(root / "t5")),
    }
    found = dict(bases)
    of = {
        "sft": ("base", LoraVariants(r=4, alpha=7)),
        "policy": ("sft", LoraVariants(r=3, alpha=8, targets=["c_attn", "c_fc"])),
        "rslora": ("sft", LoraVariants(r=6, alpha=5, rslora=True, targets=["c_proj"])),
        "dora": ("sft", LoraVariants(r=2, alpha=4, dora=True)),
        "summarizer": ("t5", LoraVariants(r=2, alpha=3)),
    }
    for name, (under, lora) in of.items():
        found[name] = adapted(found[under], root / name, lora)
    for base in ("base", "encoder"):
        labels = ["bad", "fair", "good"]
        backbone = load_backbone(found[base], "classifier", device="cpu", num_labels=3)
        model = attach(backbone.model, LoraVariants(r=2, alpha=4), "policy", "classifier", found[base])
        shaken(p for n, p in model.named_parameters() if ".lora_" in n or "modules_to_save" in n)
        extra = {"labels": labels, "max_length": 32, "temperature": 1.7}
        folder = root / f"classifier-{base}"
        save_adapter(model, "policy", folder, Stack("classifier", found[base], backbone.fingerprint, (), extra))
        found[f"classifier-{base}"] = str(folder)
    for name, scale in (
        ("reward", Scale(gain=0.6, bias=-1.3)),
        ("ensemble", Scale(((1.0, 0.0), (1.0, 0.0)))),
    ):
        backbone, under = load_stack(found["sft"], device="cpu")
        net = RewardNet.fresh(backbone, LoraVariants(r=2, alpha=6), members=len(scale.members))
        shaken(p for n, p in net.named_parameters() if ".lora_" in n or n.startswith("heads"))
        model = RewardModel(name, net, backbone.tokenizer, 32, scale)
        model.save(root / name, stack_over(found["sft"], under, backbone.tokenizer))
        found[name] = str(root / name)
    return found


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "exported"


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = IDS, **more: Any) -> torch.Tensor:
    return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits


@pytest.mark.parametrize(("name", "ranks"), [("sft", {4}), ("policy", {7, 4}), ("rslora", {10, 4})])
def test_a_stack_of_lora_is_one_plain_adapter(shop, out, name, ranks):
    """Ranks add up where both adapters act on a layer, and stay where one does."""
    expected = logits(load_stack(shop[name], device="cpu")[0].model)
    done = export(Path("runs"), shop[name], "adapter", out)
    assert done["adapters"] == (1 if name == "sft" else 2) and done["base"] == shop["base"]
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(shop["base"]), str(out))
    torch.testing.assert_close(logits(plain), expected, **EQUAL)
    assert (logits(plain) - logits(AutoModelForCausalLM.from_pretrained(shop["base"]))).abs().max() > 1
    about = json.loads((out / "adapter_config.json").read_text())
    assert {about["r"], *about["rank_pattern"].values()} == ranks
    assert not about["use_rslora"] and about["alpha_pattern"] == about["rank_pattern"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_whoever_the_umask_lets_may_read_all_of_it(shop, tmp_path, umask, mode):
    """Also the weights, which safetensors writes for their owner alone."""
    before = os.umask(umask)
    try:
        for form in ("adapter", "merged"):
            export(Path("runs"), shop["sft"], form, tmp_path / form)
        adapted(shop["base"], tmp_path / "trained", LoraVariants(r=2))
    finally:
        os.umask(before)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len({file.parent for file in files if file.suffix == ".safetensors"}) == 3
    assert {file.name: file.stat().st_mode & 0o777 for file in files} == {file.name: mode for file in files}


def test_a_file_system_without_rights_of_its_own_keeps_what_was_written(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", refuse)
    with whole_folder(tmp_path / "made") as staging:
        (staging / "weights").touch(mode=0o600)
    assert (tmp_path / "made" / "weights").exists()


@pytest.mark.parametrize("name", ["base", "policy", "rslora", "dora"])
def test_a_merged_model_is_plain_transformers(shop, out, name):
    expected = logits(load_stack(shop[name], device="cpu")[0].model)
    export(Path("runs"), shop[name], "merged", out)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(out)), expected, **EQUAL)
    assert AutoTokenizer.from_pretrained(out)(TEXTS)["input_ids"]
    assert GenerationConfig.from_pretrained(out).eos_token_id == 1
    assert [file.name for file in out.iterdir() if file.suffix in (".bin", ".safetensors")] == ["model.safetensors"]


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_a_summarizer_is_exported_with_its_format(shop, out, form):
    expected = logits(load_stack(shop["summarizer"], device="cpu")[0].model, decoder_input_ids=IDS)
    export(Path("runs"), shop["summarizer"], form, out)
    source = out if form == "merged" else shop["t5"]
    plain = AutoModelForSeq2SeqLM.from_pretrained(source)
    plain = plain if form == "merged" else PeftModel.from_pretrained(plain, str(out))
    torch.testing.assert_close(logits(plain, decoder_input_ids=IDS), expected, **EQUAL)


@pytest.mark.parametrize("form", ["adapter", "merged"])
@pytest.mark.parametrize("base", ["base", "encoder"])
def test_a_classifier_is_exported_with_head_and_temperature(shop, out, base, form):
    name = shop[f"classifier-{base}"]
    expected = TextClassifier.load(name, device="cpu").logits(TEXTS)
    export(Path("runs"), name, form, out)
    words = AutoTokenizer.from_pretrained(out)
    if form == "merged":
        plain = AutoModelForSequenceClassification.from_pretrained(out)
        assert plain.config.id2label == {0: "bad", 1: "fair", 2: "good"}
    else:
        plain = AutoModelForSequenceClassification.from_pretrained(
            shop[base], num_labels=3, pad_token_id=words.pad_token_id
        )
        plain = PeftModel.from_pretrained(plain, str(out))
    with torch.no_grad():
        given = plain.eval()(**words(TEXTS, padding=True, return_tensors="pt")).logits
    torch.testing.assert_close(given, expected, **EQUAL)


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_a_reward_model_is_a_classifier_of_one_label(shop, out, form):
    """Its logit is the score, of padded rows too: the bias that a plain head has not lies in the final norm."""
    reward = RewardModel.load(shop["reward"], "cpu")
    expected = reward.scores(TEXTS, [" good", " bad and awful and dull"])
    rows = reward.token_ids(TEXTS, [" good", " bad and awful and dull"])
    export(Path("runs"), shop["reward"], form, out)
    words = AutoTokenizer.from_pretrained(out)
    source = out if form == "merged" else shop["base"]
    plain = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1, pad_token_id=words.pad_token_id)
    plain = plain if form == "merged" else PeftModel.from_pretrained(plain, str(out))
    with torch.no_grad():
        given = plain.eval()(**words.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")).logits[:, 0]
    torch.testing.assert_close(given, expected, **EQUAL)


@pytest.mark.parametrize(
    ("name", "form", "told"),
    [
        ("dora", "adapter", "DoRA.*give --as merged"),
        ("base", "adapter", "whole model.*give --as merged"),
        ("ensemble", "adapter", "ensemble"),
        ("ensemble", "merged", "ensemble"),
        ("reward", "gguf-ready", "is a reward"),
        ("sft", "onnx", "give one of adapter, merged, hub-folder, gguf-ready"),
    ],
)
def test_what_has_no_such_form_is_told_and_leaves_nothing(shop, out, name, form, told):
    with pytest.raises(UserError, match=told):
        export(Path("runs"), shop[name], form, out)
    assert list(out.parent.iterdir()) == []


def test_a_reward_model_that_a_plain_classifier_would_read_elsewhere_is_refused(shop, out, monkeypatch):
    """Its tokenizer pads with EOS, at which the reward is read."""
    load = writing.load_backbone

    def padded_with_eos(*given: Any, **options: Any) -> Any:
        base = load(*given, **options)
        base.tokenizer.pad_token = base.tokenizer.eos_token
        return base

    monkeypatch.setattr(writing, "load_backbone", padded_with_eos)
    with pytest.raises(UserError, match="also pads"):
        export(Path("runs"), shop["reward"], "adapter", out)
    monkeypatch.undo()
    monkeypatch.setattr(writing, "trunk", lambda model: torch.nn.Module())  # as a Llama's, whose norms have no bias
    with pytest.raises(UserError, match="its head has a bias"):
        export(Path("runs"), shop["reward"], "adapter", out)
    assert list(out.parent.iterdir()) == []


def test_prefixes_tell_what_reads_them(shop, tmp_path):
    for kind, told in (("PEFTLAB_PREFIX", "predict"), ("PREFIX_TUNING", "as it is")):
        folder = tmp_path / kind
        folder.mkdir()
        about = {"peft_type": kind, "base_model_name_or_path": shop["t5"], "task_type": "SEQ_2_SEQ_LM"}
        (folder / "adapter_config.json").write_text(json.dumps(about))
        for form in ("adapter", "merged"):
            with pytest.raises(UserError, match=told):
                export(Path("runs"), str(folder), form, tmp_path / "exported")


def test_an_export_that_is_not_equal_is_not_kept(shop, out, monkeypatch):
    joined = writing._joined
    monkeypatch.setattr(writing, "_joined", lambda *given: tuple(1.01 * factor for factor in joined(*given)))
    with pytest.raises(LabError, match="differs by"):
        export(Path("runs"), shop["policy"], "adapter", out)
    assert list(out.parent.iterdir()) == []


def test_a_folder_that_is_there_is_left_alone(shop, out):
    out.mkdir()
    outcome = peftlab("export {sft} --as adapter --output {out}", sft=shop["sft"], out=str(out))
    assert outcome.code == 2 and "is there already" in outcome.err and list(out.iterdir()) == []
    (out / "file").touch()
    assert peftlab("export {sft} --as merged --output {out}/file/x", sft=shop["sft"], out=str(out)).code == 2


def test_what_is_printed_loads_it_without_the_lab(shop, out):
    """The very lines, in a process of their own."""
    outcome = peftlab("export {policy} --as gguf-ready --output {out}", policy=shop["policy"], out=str(out))
    adapter = export(Path("runs"), shop["policy"], "adapter", out.with_name("adapter"))
    head, code, command = re.split(r"\n\n", outcome.out.strip())[0], *re.split(r"\n\n(?=from|next)", outcome.out)[1:]
    assert head.startswith(f"{out}: model on {shop['base']}")
    assert command.split() == [
        "next,",
        "beside",
        "a",
        "clone",
        "of",
        "llama.cpp:",
        "python",
        "llama.cpp/convert_hf_to_gguf.py",
        str(out),
        "--outfile",
        f"{out}.gguf",
        "--outtype",
        "f16",
    ]
    assert command.strip().splitlines()[1].strip() in (out / "README.md").read_text()
    told = "import torch, sys\nids = torch.arange(2, 30)[None]\n"
    for lines in (code, adapter["load"]):
        told += f"{lines}\nprint(model(ids).logits.sum().item(), len(tokenizer))\n"
    told += "print('peftlab' in sys.modules)\n"
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True)
    merged, adapted_, lab = done.stdout.splitlines()
    assert float(merged.split()[0]) == pytest.approx(float(adapted_.split()[0]), rel=1e-4, abs=0.05)
    assert merged.split()[1] == adapted_.split()[1] == "320" and lab == "False"


def test_what_is_printed_runs_in_any_folder(shop, tmp_path, monkeypatch):
    """However base and output were typed."""
    base = Path(shop["base"])
    (tmp_path / "here").mkdir()
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(base, tmp_path / "here/base")
    monkeypatch.chdir(tmp_path / "here")
    adapted("base", Path("mine"), LoraVariants(r=2))
    for number, output in enumerate(("near", "./below", "../beside", str(tmp_path / "whole"))):
        form = ("adapter", "merged")[number % 2]
        told = export(Path("runs"), "mine", form, Path(output))["load"]
        subprocess.run([sys.executable, "-c", told], check=True, capture_output=True, cwd=tmp_path / "elsewhere")
        assert ".." not in told and told.count(f"'{tmp_path}") == (3 if form == "adapter" else 2)


@pytest.fixture
def run(shop, tmp_path) -> Iterator[Path]:
    """A PPO run with a real adapter, below runs/."""
    folder = fake_runs.ppo_run(tmp_path / "runs").path
    adapted(shop["sft"], folder / "adapter", LoraVariants(r=2))
    yield folder


def test_the_card_is_valid_and_tells_of_the_run(run, out):
    """Checked offline: the Hub's own classes read the metadata, and give back what they read."""
    done = export(run.parent, "ppo", "hub-folder", out)
    assert done["holds"] == "adapter"
    found = ModelCard.load(out / "README.md")
    again = ModelCard(f"---\n{found.data.to_yaml()}\n---\n")
    assert again.data.to_dict() == found.data.to_dict()
    figures = {result.metric_name: result.metric_value for result in again.data.eval_results}
    assert figures["eval/judge"] == 0.861 and "invariant/first_kl" not in figures
    assert found.data.library_name == "peft" and found.data.pipeline_tag == "text-generation"
    text = found.text
    assert "| `eval/judge` | 0.472 | 0.861 | 0.826 to 0.893 |" in text
    assert "`imdb:train` | 9000" in text and 'reward = "imdb-sentiment + 0.5*rubric:length"' in text
    assert "## Limits" in text and "## Licence" in text and str(run.parent.parent) not in text
    assert set(re.findall(r"^## (.+)", text, re.M)) >= {"Load it", "Data", "Figures", "Config"}
    base = Path(read_stack(run / "adapter").base).name
    assert f"AutoModelForCausalLM.from_pretrained('{base}')" in text and f"Base: `{base}`, " in text


def test_the_card_tells_no_folder_of_this_disk():
    told = export_card._without_folders("/home/me/a b/x.jsonl + imdb:train + me/set:test, at most 6 rows")
    assert told == "x.jsonl + imdb:train + me/set:test, at most 6 rows"


def test_what_is_no_adapter_goes_to_the_hub_whole(shop, out):
    done = export(Path("runs"), shop["dora"], "hub-folder", out)
    assert done["holds"] == "model" and (out / "model.safetensors").is_file()
    assert ModelCard.load(out / "README.md").data.library_name == "transformers"


def test_a_card_names_a_base_of_the_hub(out):
    export(Path("runs"), "imdb-sentiment", "hub-folder", out)
    data = ModelCard.load(out / "README.md").data
    assert data.base_model == "sentence-transformers/all-MiniLM-L6-v2" and data.license == "apache-2.0"


def test_a_name_without_a_model_is_told_as_by_any_verb(run, monkeypatch):
    for name in ("demo", "demo/sft"):
        fake_runs.sft_run(run.parent, name, steps=2)
    (run.parent / "demo/reward/adapter").mkdir(parents=True)
    monkeypatch.chdir(run.parent.parent)
    for name, told in {
        "demo": "adapters are in its stages: runs/demo/reward", "demo/sft": "it is a run that left none: `peftlab runs",
        "tiny-gpt": "no such model, run or folder; did you mean tiny-gpt2?", "runs/dem": "did you mean runs/demo?",
    }.items():
        lines = f"export {name} --as merged --output x", f"generate {name}", f"doctor {name}", f"chat {name}"
        first, *others = [peftlab(line) for line in lines]
        assert first.code == 2 and told in first.err and others == [first] * 3
    assert not Path("x").exists()


def test_push_says_why_it_does_not(run, monkeypatch):
    import huggingface_hub

    assert huggingface_hub.constants.HF_HUB_OFFLINE
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set.*--as hub-folder"):
        recipe.push(run.parent, "ppo", "me/ppo", False)
    with pytest.raises(UserError, match="OWNER/NAME"):
        recipe.push(run.parent, "ppo", "me/../ppo", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="no token"):
        recipe.push(run.parent, "ppo", "me/ppo", False)


def test_push_uploads_the_hub_folder(run, monkeypatch):
    import huggingface_hub

    seen: list[Any] = []

    class Hub:
        def create_repo(self, repo_id: str, **options: Any) -> None:
            seen.append((repo_id, options["private"]))

        def upload_folder(self, folder_path: str, **_: Any) -> str:
            seen.append({file.name for file in Path(folder_path).iterdir()})
            if len(seen) > 2:
                raise OSError("no route")
            return "its address"

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert recipe.push(run.parent, "ppo", "me/ppo", False)["url"] == "its address"
    assert seen[0] == ("me/ppo", True) and {"README.md", "adapter_model.safetensors"} <= seen[1]
    with pytest.raises(LabError, match=r"did not take it \(no route\); `peftlab export"):
        recipe.push(run.parent, "ppo", "me/ppo", True)
    assert seen[2] == ("me/ppo", False)


def test_heads_of_a_reward_are_read_where_it_ends(shop):
    """The tests above would pass with a head of zeros: it has none."""
    reward = RewardModel.load(shop["reward"], "cpu")
    head = reward.net.heads[0]
    assert isinstance(head, ScalarHead) and abs(float(head.linear.bias.detach())) > 1e-3
