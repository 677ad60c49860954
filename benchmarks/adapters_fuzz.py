"""Adapters that were damaged or forged, thousands of them: each is refused in one line, or changes nothing.

    python benchmarks/adapters_fuzz.py [--mutations 10000] [--seed 0]

Adapters of every kind on random bases of two layers: LoRA on another one, a classifier with its head, an ensemble of
reward models, both prefixes, and a plain PEFT adapter without a manifest. Each mutation spoils a copy, which is then
loaded as the lab loads it. In every other one the hashes are made anew, so that what stands behind them is met.
The last line is JSON. Exit 0 where no mutation loaded silently, and none ended in a traceback.

`warned`: a plain PEFT adapter has no hashes, so other numbers in it load, with the warning that says so.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import io
import json
import math
import os
import pickle
import random
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save, save_file
from transformers.utils import logging

from peftlab.errors import PeftlabError
from peftlab.models import adapter_files
from peftlab.models.adapter_files import save_adapter
from peftlab.models.adapters import Lora, adapter_parameters, attach, attach_decoder_prefix
from peftlab.models.backbone import Backbone, load_backbone
from peftlab.models.classifier import TextClassifier
from peftlab.models.prefix import attach_prefix, prefix_shapes
from peftlab.models.reward_model import RewardModel, RewardNet
from peftlab.models.reward_scale import Scale
from peftlab.models.stacks import Stack

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import tiny

TEXTS = ["the film was great fun", "it is a dull plot and i was not"]
IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])
LORA = Lora(r=2, alpha=4)
MANIFEST = "manifest.json"
# What stands in a file for a thing of another kind.
JUNK: list[Any] = [None, True, -1, 0, 2**70, 0.5, "", "x", "../..", "\u202e\x1b[2J", [], [1], ["a", "b"], {}, {"a": 1}]
WRONG: list[Any] = [None, "x", [], {}, "\u202e\x1b[2J", [[]], [None], {"a": 1}]
STANDING = ("kind", "base", "fingerprint", "under")  # of stack.json: what an adapter stands on
# Of adapter_config.json: what says which tensors there are. Other keys (alpha, say) make another adapter of it.
SHAPING = ["r", "target_modules", "peft_type", "task_type", "num_virtual_tokens", "num_layers", "token_dim",
           "num_attention_heads", "modules_to_save"]


class Bench:
    """A folder with bases, and by kind an adapter on one of them with the numbers it makes."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.bases: dict[tuple[Any, ...], Backbone] = {}
        adapter_files.load_backbone = self.base  # each load stands on a copy of what was read once
        for folder in (tiny.causal_folder, tiny.encoder_folder, tiny.seq2seq_folder):
            for seed in (0, 1):
                folder(home / f"{folder.__name__.split('_')[0]}-{seed}", seed)
        makers = {"text": self.text, "classifier": self.classifier, "reward": self.reward, "prefix": self.prefix,
                  "peft-prefix": self.peft_prefix, "foreign": self.foreign}
        self.kinds = {kind: make(home / kind) for kind, make in makers.items()}
        self.numbers = {kind: self.load(kind, folder) for kind, folder in self.kinds.items()}

    def base(self, name: str, task: Any = "causal", *, device: str = "cpu", num_labels: int = 2, **_: Any) -> Backbone:
        """As `load_backbone`."""
        if (key := (name, task, num_labels)) not in self.bases:
            self.bases[key] = load_backbone(name, task, device="cpu", num_labels=num_labels)
        return copy.deepcopy(self.bases[key])

    def _filled(self, model: Any, name: str) -> Any:
        """With an adapter that says something."""
        for parameter in adapter_parameters(model, name).values():
            torch.nn.init.normal_(parameter, std=0.1)
        return model

    def _stack(self, base: Backbone, kind: Any, *under: Path, **extra: Any) -> Stack:
        return Stack(kind, base.name, base.fingerprint, under, extra)

    def text(self, folder: Path) -> Path:
        """An adapter on another one."""
        base = self.base(str(self.home / "causal-0"))
        below = self._filled(attach(base.model, LORA, "policy", base=base.name), "policy")
        save_adapter(below, "policy", self.home / "below", self._stack(base, "causal"))
        above = self._filled(attach(below.merge_and_unload(), LORA, "policy", base=base.name), "policy")
        return save_adapter(above, "policy", folder, self._stack(base, "causal", self.home / "below"))

    def classifier(self, folder: Path) -> Path:
        """With its head."""
        base = self.base(str(self.home / "encoder-0"), "classifier")
        model = self._filled(attach(base.model, LORA, "policy", "classifier", base.name), "policy")
        facts = {"labels": ["negative", "positive"], "max_length": 48, "temperature": 1.5}
        return save_adapter(model, "policy", folder, self._stack(base, "classifier", **facts))

    def reward(self, folder: Path) -> Path:
        """Two of them, each with its head."""
        base = self.base(str(self.home / "causal-0"))
        net = RewardNet.fresh(base, LORA, members=2)
        for member in range(2):
            self._filled(net.model, f"member-{member}")
        scale = Scale(((1.0, 0.0), (2.0, 0.5)))
        return RewardModel("reward", net, base.tokenizer, 64, scale).save(folder, self._stack(base, "causal"))

    def prefix(self, folder: Path) -> Path:
        """The lab's own."""
        base = self.base(str(self.home / "seq2seq-0"), "seq2seq")
        shapes = prefix_shapes(base.model, 3)
        attach_prefix(base.model, {kind: torch.randn(shape) for kind, shape in shapes.items()})
        return save_adapter(base.model, "policy", folder, self._stack(base, "seq2seq"))

    def peft_prefix(self, folder: Path) -> Path:
        """PEFT's."""
        base = self.base(str(self.home / "seq2seq-0"), "seq2seq")
        model = self._filled(attach_decoder_prefix(base.model, 3, 0, "policy", base.name), "policy")
        return save_adapter(model, "policy", folder, self._stack(base, "seq2seq"))

    def foreign(self, folder: Path) -> Path:
        """As PEFT writes one: neither stack nor manifest."""
        shutil.copytree(self.home / "below", folder)
        (folder / "stack.json").unlink()
        (folder / MANIFEST).unlink()
        return folder

    @torch.no_grad()
    def load(self, kind: str, folder: Path) -> torch.Tensor:
        """What the adapter makes of a text or two, as the lab loads it."""
        name = str(folder)
        if kind == "classifier":
            return TextClassifier.load(name, "cpu").logits(TEXTS)
        if kind == "reward":
            return RewardModel.load(name, "cpu").scores(TEXTS, TEXTS[::-1])
        backbone, _ = adapter_files.load_stack(name, device="cpu")
        labels = {"decoder_input_ids": IDS} if "prefix" in kind else {}
        logits: torch.Tensor = backbone.model(input_ids=IDS, **labels).logits
        return logits


def _files(folder: Path, *suffixes: str) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix in (suffixes or (p.suffix,)))


def _hash_again(folder: Path) -> None:
    """The manifests as if the files had always been what they are, the innermost first."""
    for manifest in sorted(folder.rglob(MANIFEST), key=lambda path: -len(path.parts)):
        listed = {
            str(path.relative_to(manifest.parent)): {
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size
            }
            for path in _files(manifest.parent)
            if path != manifest
        }
        manifest.write_text(json.dumps({"schema_version": 1, "files": listed}))


def flip(folder: Path, draw: random.Random) -> str:
    """One to three bits of any file."""
    file = draw.choice(_files(folder))
    data = bytearray(file.read_bytes())
    for _ in range(draw.randint(1, 3)):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(data)
    return f"bits of {file.name}"


def truncate(folder: Path, draw: random.Random) -> str:
    """Any file, at any length."""
    file = draw.choice(_files(folder))
    data = file.read_bytes()
    file.write_bytes(data[: draw.randrange(len(data))])
    return f"{file.name} cut"


def remove(folder: Path, draw: random.Random) -> str:
    """Any file."""
    file = draw.choice(_files(folder))
    file.unlink()
    return f"{file.name} removed"


def add(folder: Path, draw: random.Random) -> str:
    """A file that nobody listed."""
    file = folder / draw.choice(["adapter_model.bin", "pytorch_model.bin", "x.py", "x/model.safetensors"])
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(pickle.dumps({"a": 1}))
    return f"{file.name} added"


def header(folder: Path, draw: random.Random) -> str:
    """A bit of the JSON or of the length in front of it."""
    file = draw.choice(_files(folder, ".safetensors"))
    data = bytearray(file.read_bytes())
    data[draw.randrange(8 + int.from_bytes(data[:8], "little"))] ^= 1 << draw.randrange(8)
    file.write_bytes(data)
    return f"a bit of the header of {file.name}"


def tensors(folder: Path, draw: random.Random) -> str:
    """A renamed, lost, doubled, reshaped or spoilt tensor."""
    file = draw.choice(_files(folder, ".safetensors"))
    held = load_file(file)
    name = draw.choice(sorted(held))
    value = held.pop(name)
    how = draw.choice(["renamed", "lost", "doubled", "reshaped", "longer", "nan", "inf", "integers", "swapped"])
    other = draw.choice(sorted(held) or [name])
    if how == "renamed":
        cut = draw.randrange(len(name))
        held[name[:cut] + draw.choice(["x", "", "..", "\x1b[2J"]) + name[cut + 1 :]] = value
    elif how == "doubled":
        held |= {name: value, name + ".1": value.clone()}
    elif how == "reshaped":
        held[name] = value.reshape(*value.shape[::-1]).contiguous() if len(set(value.shape)) > 1 else value[None]
    elif how == "longer":
        held[name] = torch.cat([value, value])
    elif how in ("nan", "inf"):
        spoilt = value.clone()
        spoilt.view(-1)[draw.randrange(value.numel())] = {"nan": math.nan, "inf": -math.inf}[how]
        held[name] = spoilt
    elif how == "integers":
        held[name] = (value * 10).to(draw.choice([torch.int64, torch.uint8, torch.bool]))
    elif how == "swapped" and held and held[other].shape != value.shape:
        held |= {name: held[other], other: value}
    save_file(held, file)
    return f"{name} {how} in {file.name}"


def disguise(folder: Path, draw: random.Random) -> str:
    """Something else under the name of weights."""
    file = draw.choice(_files(folder, ".safetensors"))
    held, buffer = load_file(file), io.BytesIO()
    torch.save(held, buffer)
    what = {
        "a pickle": pickle.dumps(_Trap()),
        "torch's archive": buffer.getvalue(),
        "text": b"{}",
        "nothing": b"",
        "noise": draw.randbytes(200),
        "a header of a terabyte": (2**40).to_bytes(8, "little") + b"{}",
        "no tensors": save({}),
    }
    name = draw.choice(sorted(what))
    file.write_bytes(what[name])
    return f"{name} under the name {file.name}"


class _Trap:
    """What unpickling would run."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("/nowhere/at/all",)  # raises where it is unpickled: a traceback


def stack(folder: Path, draw: random.Random) -> str:
    """A fact of stack.json lost, or of another kind; another base; an `under` that leads elsewhere."""
    file = folder / "stack.json"
    if not file.exists():
        return tensors(folder, draw)
    facts = json.loads(file.read_text())
    key = draw.choice(sorted(facts))
    if key not in STANDING:
        facts[key] = draw.choice(WRONG)
    elif draw.random() < 0.3:
        del facts[key]
    else:
        other = str(folder.parent / f"{Path(facts['base']).name[:-1]}1")
        there: dict[str, list[Any]] = {
            "kind": ["causal", "classifier", "seq2seq", "reward"], "base": [other, "nowhere/base", "tiny-gpt2"],
            "under": [["../below"], ["under/7"], ["/etc"], ["under/0", "under/0"], "under/0", [".."], ["."], []],
            "fingerprint": ["0" * 16],
        }
        facts[key] = draw.choice([v for v in [*there[key], *JUNK] if v != facts[key]])
    file.write_text(json.dumps(facts))
    return f"stack.json: {key} {facts.get(key, 'lost')!r}"


def shape(folder: Path, draw: random.Random) -> str:
    """What adapter_config.json says of the tensors, lost or of another kind."""
    file = draw.choice([path for path in _files(folder) if path.name == "adapter_config.json"])
    facts = json.loads(file.read_text())
    key = draw.choice([key for key in SHAPING if key in facts])
    there = [*JUNK, 3, 64, "LORA", "PREFIX_TUNING", "VERA", "CAUSAL_LM"]
    facts[key] = draw.choice([value for value in there if value != facts[key]])
    if draw.random() < 0.2:
        del facts[key]
    file.write_text(json.dumps(facts))
    return f"adapter_config.json: {key} {facts.get(key, 'lost')!r}"


def garble(folder: Path, draw: random.Random) -> str:
    """A JSON file that is something else."""
    file = draw.choice([path for path in _files(folder, ".json") if path.name != MANIFEST])
    what = draw.choice([b"", b"[]", b"null", b"3", b'"x"', b"{", b"{}", b"[" * 50_000, b"\xff\xfe{}", b"NaN", b"\0"])
    file.write_bytes(what)
    return f"{file.name} is {what[:9]!r}"


def manifest(folder: Path, draw: random.Random) -> str:
    """A manifest that says something else."""
    found = _files(folder)
    file = draw.choice([path for path in found if path.name == MANIFEST] or [folder / MANIFEST])
    facts = json.loads(file.read_text()) if file.exists() else {"schema_version": 1, "files": {}}
    listed = facts["files"]
    name = draw.choice(sorted(listed)) if listed else ""
    how = draw.choice(["junk", "version", "lost", "outside", "hash", "size", "removed"])
    if how == "version":
        facts["schema_version"] = draw.choice(JUNK)
    elif how == "outside":
        listed[draw.choice(["../causal-0/config.json", "/etc/passwd", "x/../../y"])] = {"sha256": "0" * 64, "bytes": 1}
    elif how == "lost":
        listed.pop(name, None)
    elif how in ("hash", "size") and name:
        listed[name]["sha256" if how == "hash" else "bytes"] = draw.choice(JUNK)
    elif how == "junk":
        facts = draw.choice([*JUNK, {"schema_version": 1, "files": draw.choice(JUNK)}])
    file.write_text(json.dumps(facts))
    if how == "removed":
        file.unlink()
    return f"manifest.json: {how} {name}"


Mutation = Callable[[Path, random.Random], str]
MET_BY_HASHES: list[Mutation] = [flip, truncate, remove, add, header, tensors, disguise, stack, shape, garble, manifest]
BEHIND_THEM: list[Mutation] = [truncate, remove, header, tensors, tensors, disguise, stack, shape, garble]


def verdict(bench: Bench, kind: str, folder: Path) -> tuple[str, str]:
    """How the load of a spoilt copy ended, and what was said."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            numbers = bench.load(kind, folder)
    except PeftlabError as error:
        named = str(folder) in str(error) and "\n" not in str(error) and len(str(error)) < 1000
        return "refused" if named else "unnamed", str(error)
    except Exception:
        return "tracebacks", traceback.format_exc()
    if numbers.shape == bench.numbers[kind].shape and torch.equal(numbers, bench.numbers[kind]):
        return "equal", ""
    return "warned" if "no manifest" in said.getvalue() else "silent", said.getvalue()


def campaign(bench: Bench, mutations: int, seed: int, show: int = 5) -> dict[str, int]:
    """Mutations in turn over the kinds; what came of them. Prints the first few that ended as none may."""
    draw, tally = random.Random(seed), Counter(dict.fromkeys(OUTCOMES, 0))
    for number in range(mutations):
        kind = list(bench.kinds)[number % len(bench.kinds)]
        folder = bench.home / "spoilt"
        shutil.copytree(bench.kinds[kind], folder)
        forged = draw.random() < 0.5
        said = draw.choice(BEHIND_THEM if forged else MET_BY_HASHES)(folder, draw)
        if forged:
            _hash_again(folder)
        end, message = verdict(bench, kind, folder)
        tally[end] += 1
        if end in BAD and tally[end] <= show:
            print(f"{number}: {kind}, {said}{', hashed again' if forged else ''}: {end}\n{message}", flush=True)
        shutil.rmtree(folder)
    return dict(tally)


BAD = ("silent", "tracebacks", "unnamed")
OUTCOMES = ("refused", "equal", "warned", *BAD)


def main() -> int:
    """Exit code 0 where each mutation was refused in one line that names the folder, or changed nothing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    constants.HF_HUB_OFFLINE = True  # a base that is not here is not looked for elsewhere
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="peftlab-fuzz-") as home:
        tally = campaign(Bench(Path(home)), arguments.mutations, arguments.seed)
    print(json.dumps({"mutations": arguments.mutations, **tally}))
    return int(any(tally[end] for end in BAD))


if __name__ == "__main__":
    sys.exit(main())
