"""A name becomes a folder on this disk and a kind, or one message that says what does."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from safetensors import SafetensorError

from peftlab.errors import UserError
from peftlab.models import catalog
from peftlab.models.catalog import list_models, resolve


def model(folder, weights="model.safetensors", **config):
    """A folder that looks like a model."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / weights).write_bytes(b"1234")
    return folder


@pytest.fixture
def bundled(tmp_path, monkeypatch):
    """A package that brings tiny-gpt2, an adapter, and a stray folder."""
    folder = tmp_path / "bundled"
    model(folder / "tiny-gpt2", model_type="gpt2", architectures=["GPT2LMHeadModel"])
    (folder / "imdb-judge").mkdir()
    (folder / "imdb-judge" / "adapter_config.json").write_text("{}")
    (folder / "__pycache__").mkdir()
    monkeypatch.setattr(catalog, "BUNDLED", folder)
    monkeypatch.setenv("PEFTLAB_HOME", str(tmp_path / "home"))
    return folder


KINDS = {
    "causal": [
        {"model_type": "gpt2"},
        {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
        {"model_type": "qwen3", "architectures": None},
    ],
    "encoder": [
        {"model_type": "distilbert", "architectures": ["DistilBertModel"]},
        {"model_type": "new", "architectures": ["NewForMaskedLM"]},
        {"model_type": "roberta"},
    ],
    "seq2seq": [
        {"model_type": "t5", "is_encoder_decoder": True, "architectures": ["T5ForConditionalGeneration"]},
        {"model_type": "bart", "is_encoder_decoder": True},
    ],
    "classifier": [
        {"model_type": "gpt2", "architectures": ["GPT2ForSequenceClassification"]},
        {"model_type": "bert", "architectures": ["BertForSequenceClassification"], "id2label": {"0": "a", "1": "b"}},
        {"model_type": "bart", "architectures": ["BartForSequenceClassification"], "is_encoder_decoder": True},
    ],
    "reward": [{"model_type": "gpt2", "architectures": ["GPT2ForSequenceClassification"], "id2label": {"0": "a"}}],
}


@pytest.mark.parametrize(("kind", "config"), [(kind, config) for kind in KINDS for config in KINDS[kind]])
def test_the_kind_is_read_from_the_config(kind, config, tmp_path):
    entry = resolve(str(model(tmp_path, **config)))
    assert (entry.kind, entry.path, entry.origin) == (kind, tmp_path, "path")
    assert entry.size == sum(f.stat().st_size for f in tmp_path.iterdir())


def test_an_adapter_and_the_run_that_trained_it(tmp_path):
    adapter = tmp_path / "demo" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    for name in (adapter, tmp_path / "demo"):
        entry = resolve(str(name))
        assert (entry.kind, entry.path) == ("adapter", adapter)
    trained = model(tmp_path / "base" / "model", model_type="gpt2")
    assert resolve(str(tmp_path / "base")).path == trained


def test_bundled_names_come_before_folders_of_that_name(bundled, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model(tmp_path / "tiny-gpt2", model_type="t5", is_encoder_decoder=True)
    entry = resolve("tiny-gpt2")
    assert (entry.origin, entry.kind, entry.path) == ("bundled", "causal", bundled / "tiny-gpt2")
    assert resolve("./tiny-gpt2").kind == "seq2seq"
    assert resolve("imdb-judge").kind == "adapter"


def test_a_disk_that_fills_while_weights_are_written_is_one_message(bundled, tmp_path, monkeypatch):
    def build(folder):
        (folder / "config.json").write_text("{}")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    failing = replace(catalog.CONVERTED["smollm2-135m"], build=build)
    monkeypatch.setitem(catalog.CONVERTED, "smollm2-135m", failing)
    with pytest.raises(UserError, match="No space left on device.*PEFTLAB_HOME"):
        resolve("smollm2-135m")
    assert not [p for p in (tmp_path / "home" / "models").iterdir() if p.is_dir()]


def test_listing_pulls_nothing(bundled, tmp_path):
    entries = {entry.name: entry for entry in list_models()}
    assert list(entries) == ["imdb-judge", "tiny-gpt2", "minilm-distilbert", "smollm2-135m"]
    assert entries["smollm2-135m"].size == 92_871_040
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny-gpt", "did you mean tiny-gpt2"),
        ("smolm2-135m", "did you mean smollm2-135m"),
        ("imdb-jugde", "did you mean imdb-judge"),
        ("gpt2", "the Hub did not give it .*tiny-gpt2, tiny-t5, smollm2-135m, minilm-distilbert, or a local folder"),
        ("someone/smollm2-135m", "the Hub did not give it"),
        ("../bundled", "no such folder"),
        ("runs/none", "no such folder; known offline"),
        ("runs/dpo-tiny", "no such folder; run `peftlab dpo dpo-tiny` first; known offline"),
        ("runs/sft-tny", "no such folder; did you mean runs/sft-tiny"),
        ("sft-tiny", "did you mean runs/sft-tiny"),
        ("critc", "did you mean the persona critic .*--persona critic"),
        ("critic", "did you mean the persona critic"),
        ("someone/critic", "the Hub did not give it .*Offline, use"),
        ("", "no such folder"),
        ("a\0b", "no such folder"),
        ("a" * 5000, "the Hub did not give it"),
        ("x y", "the Hub did not give it"),
    ],
)
def test_an_unknown_name_is_one_message(name, message, bundled, tmp_path, monkeypatch):
    (tmp_path / "bundled" / "runs" / "sft-tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "bundled")
    with pytest.raises(UserError, match=message) as caught:
        resolve(name if name != "../bundled" else "../none")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "no config.json or adapter_config.json"),
        ("{", "is not valid JSON"),
        ("[]", "names no model_type"),
        ("{}", "names no model_type"),
    ],
)
def test_a_folder_that_is_no_model_is_one_message(config, message, tmp_path):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match=message):
        resolve(str(tmp_path))


def test_a_run_that_left_no_model_is_called_one(tmp_path):
    (tmp_path / "config.toml").touch()
    with pytest.raises(UserError, match="it is a run that left none: `peftlab runs list` says why"):
        resolve(str(tmp_path))


def test_pickled_weights_are_not_loaded(tmp_path):
    with pytest.raises(UserError, match="no .safetensors file; pickled weights are not loaded"):
        resolve(str(model(tmp_path, weights="pytorch_model.bin", model_type="gpt2")))


def test_a_hub_snapshot_asks_for_no_pickle_and_no_code(bundled, tmp_path, monkeypatch):
    import fnmatch

    import huggingface_hub

    def snapshot(name, allow_patterns):
        files = ["pytorch_model.bin", "model.pt", "modeling_x.py", "model.safetensors", "tokenizer.json"]
        wanted = [file for file in files if any(fnmatch.fnmatch(file, p) for p in allow_patterns)]
        assert wanted == ["model.safetensors", "tokenizer.json"]
        return str(model(tmp_path / "hub", model_type="gpt2"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    entry = resolve("someone/some-model")
    assert (entry.origin, entry.kind, entry.path) == ("hub", "causal", tmp_path / "hub")
