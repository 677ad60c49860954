"""What is there by name: `pull` and `models`. Neither loads a model, and so no torch either, which takes seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..data.sources import load_records
from ..errors import UserError, did_you_mean
from ..models.catalog import list_models, resolve
from ..models.stacks import read_stack

IMDB = "imdb"  # data that `pull` fetches; any other name is a model's


def pull_names(names: list[str]) -> dict[str, Path]:
    """Fetch and convert what each name needs; where it lies now."""
    places = {}
    for name in names:
        if near := did_you_mean(name, [IMDB], 0.75) if name != IMDB and not Path(name).exists() else "":
            raise UserError(f"pull {name}: no such data or model; {near}")
    for name in names:
        if name == IMDB:
            load_records("imdb:test", "sft")
        places[name] = _imdb_folder() if name == IMDB else Path(resolve(name).path)
    return places


def model_rows() -> list[dict[str, Any]]:
    """One row a model that loads by name; an adapter's tells the base under it."""
    return [
        {
            "name": entry.name,
            "kind": entry.kind,
            "base": read_stack(entry.path).base if entry.kind == "adapter" else None,
            "origin": entry.origin,
            "licence": entry.licence,
            "size": entry.size,
        }
        for entry in list_models()
    ]


def _imdb_folder() -> Path:
    from ..data.imdb import blocks_folder

    return blocks_folder()
