"""What an adapter's folder says of it, before anything loads: its kind, its base, what lies merged under it.

An adapter folder is a plain PEFT adapter (adapter_config.json, adapter_model.safetensors) plus `stack.json`, which
names its base and the adapters that lie merged under it (copied to `under/0`, `under/1` ...), plus `manifest.json`
with the sha256 of every file. The lab's own T5 prefix is no PEFT adapter: its weights are `prefix.safetensors`, and its
adapter_config.json has a `peft_type` that PEFT refuses. A reward model's folder is laid out by models/reward_model.py.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from ..data.tokenize import PLAIN_CHAT
from ..errors import UserError
from ..runs.checkpoint import MANIFEST, verify_manifest, write_manifest
from .catalog import resolve

Kind = Literal["causal", "classifier", "seq2seq", "reward"]
# PEFT's name of each kind; a reward model's LoRA is one of a causal model.
TASK_TYPES: dict[Kind, str] = {"causal": "CAUSAL_LM", "classifier": "SEQ_CLS", "seq2seq": "SEQ_2_SEQ_LM"}
PEFT_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Stack:
    """What an adapter stands on: kind of model, base name and fingerprint, adapters merged under it, extra facts."""

    kind: Kind
    base: str
    fingerprint: str
    under: tuple[Path, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)


def stack_over(name: str, under: Stack, tokenizer: Any, **extra: Any) -> Stack:
    """The stack of a new text adapter trained on `name`, whose own stack is `under`: an adapter lies merged below."""
    entry = resolve(name)
    merged = (*under.under, Path(entry.path)) if entry.kind == "adapter" else ()
    template = {"chat_template": "plain"} if tokenizer.chat_template == PLAIN_CHAT else {}
    return Stack("causal", under.base, under.fingerprint, merged, {**extra, **template})


def read_stack(folder: Path) -> Stack:
    """The stack of an adapter folder; for a foreign PEFT adapter, what its adapter_config.json says."""
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder}: not an adapter folder (no adapter_config.json)")
    _verify(folder)
    name = "stack.json" if (folder / "stack.json").is_file() else "adapter_config.json"
    facts = read_facts(folder, name)
    try:
        if name == "adapter_config.json":
            kinds = {task: kind for kind, task in TASK_TYPES.items()}
            return _sound(Stack(kinds.get(str(facts.get("task_type")), "causal"), facts["base_model_name_or_path"], ""))
        inside = facts.pop("under")
        if not isinstance(inside, list):
            raise TypeError("`under` is no list")
        under = tuple(folder / inner for inner in inside)
        if sorted(under) != sorted((folder / "under").glob("*")):
            raise ValueError("`under` does not list the adapters that are there")
        if not all(folder.resolve() in inner.resolve().parents for inner in under):
            raise ValueError("`under` leaves the folder")
        return _sound(Stack(facts.pop("kind"), facts.pop("base"), facts.pop("fingerprint"), under, facts))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"adapter {folder}: {name} is damaged ({error!r}); restore it or train again") from None


def _sound(stack: Stack) -> Stack:
    """The stack, if its facts are of the right kind; else ValueError."""
    names = isinstance(stack.base, str) and isinstance(stack.fingerprint, str)
    if not (stack.kind in get_args(Kind) and names):
        raise ValueError(f"kind {stack.kind!r}, base {stack.base!r}, fingerprint {stack.fingerprint!r}")
    return stack


def _verify(folder: Path) -> None:
    """Manifest and stack.json go together; a folder that the lab did not write has neither."""
    ours = [(folder / name).is_file() for name in (MANIFEST, "stack.json")]
    problems = verify_manifest(folder) if any(ours) else []
    if not problems and any(ours) and not all(ours):
        problems = ["stack.json is missing"]
    if problems:
        raise UserError(f"adapter {folder}: {'; '.join(problems)}; restore the folder or train it again")


def read_facts(folder: Path, name: str = "adapter_config.json") -> dict[str, Any]:
    """What a JSON file of an adapter's folder says. UserError where it is damaged."""
    try:
        facts = json.loads((folder / name).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"adapter {folder}: {name} is damaged ({error}); restore it") from None
    if not isinstance(facts, dict):
        raise UserError(f"adapter {folder}: {name} is damaged (no object); restore it")
    return facts


def write_stack(folder: Path, stack: Stack) -> None:
    """Copies of the adapters below, stack.json, and last the manifest of all that lies in `folder`."""
    for index, under in enumerate(stack.under):
        shutil.copytree(under, folder / "under" / str(index), dirs_exist_ok=True)
    facts = {"kind": stack.kind, "base": stack.base, "fingerprint": stack.fingerprint, **stack.extra}
    facts["under"] = [f"under/{index}" for index in range(len(stack.under))]
    (folder / "stack.json").write_text(json.dumps(facts, indent=1) + "\n")
    write_manifest(folder)


def check_base(folder: Path, stack: Stack, fingerprint: str) -> None:
    """UserError where the adapter in `folder` was trained on another base than the one of this fingerprint."""
    if stack.fingerprint and stack.fingerprint != fingerprint:
        raise UserError(f"adapter {folder}: its {stack.base} is another one ({stack.fingerprint}, not {fingerprint})")


def same_ground(one: Stack, other: Stack) -> bool:
    """Whether two adapters stand on the same weights: one base, and below them adapters of the same bytes."""
    known = one.base == other.base and one.fingerprint == other.fingerprint and len(one.under) == len(other.under)
    pairs = zip(one.under, other.under, strict=False)
    files = (PEFT_WEIGHTS, "adapter_config.json")
    return known and all((a / file).read_bytes() == (b / file).read_bytes() for a, b in pairs for file in files)


def files_hash(name: str) -> str:
    """sha256 over the weights and JSON files of an adapter, those under it included, or of a whole model with a head;
    empty for a base model.

    stack.json tells the fingerprint of the adapter's base, which loading compares, so this one stands for both.
    """
    entry = resolve(name)
    if entry.kind not in ("adapter", "classifier", "reward"):
        return ""
    digest = hashlib.sha256()
    for file in sorted(Path(entry.path).rglob("*")):
        if file.suffix in (".safetensors", ".json") and file.name != MANIFEST:
            digest.update(f"{file.relative_to(entry.path).as_posix()}\0".encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def kind_of(name: str) -> str:
    """What a name or folder is by its job: that of its stack for an adapter, else the model's own kind."""
    entry = resolve(name)
    return read_stack(entry.path).kind if entry.kind == "adapter" else entry.kind
