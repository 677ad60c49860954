"""Texts made of the IMDb reviews, shipped without the reviews: a row names its review by id and hash.

The reviews come from the pulled blocks and are joined in here: a review that is not the one a text was made of stops
the load.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from .explanations import prompt_of
from .imdb import load_block
from .records import LabelledText, Prompt, PromptCompletion, Record, SummaryPair

# Held-out rows are of the block that nothing learns from.
BLOCK_OF = {"train": "train", "test": "prompts"}
COLUMNS = {"imdb-explanations": "answer", "imdb-gist": "summary"}
SHIPPED = Path(__file__).parent


def digest(text: str) -> str:
    """The first 16 hex digits of a text's sha256."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


@dataclass(frozen=True)
class Joined:
    """A review, what was made of it, and by which maker."""

    review: LabelledText
    text: str
    maker: str


def load_joined(name: str, split: str) -> list[Joined]:
    """The rows of "imdb-explanations" or "imdb-gist": the shipped "train" and "test", or a file of `peftlab data`.

    Raises UserError for an unknown split, a file that is not of this kind, and a review that is missing or another.
    """
    what = name.removeprefix("imdb-")
    if split in BLOCK_OF:
        path = SHIPPED / f"{what}-{split}.jsonl.gz"
        missing, built = "is not shipped with this version", f"FOLDER/{path.name}"
    elif split.endswith(".jsonl.gz"):
        path, missing, built = Path(split), "there is no such file", f"FOLDER/{what}-train.jsonl.gz"
    else:
        known = ", ".join(BLOCK_OF)
        raise UserError(f"data {name}:{split}: has the splits {known}, or give a .jsonl.gz that `peftlab data` built")
    if not path.is_file():
        raise UserError(
            f"data {name}:{split}: {missing}; build it with `peftlab data {what} --output FOLDER`, "
            f"then give {name}:{built}"
        )
    return join(path, COLUMNS[name], (BLOCK_OF[split],) if split in BLOCK_OF else tuple(BLOCK_OF.values()))


def join(path: Path, column: str, blocks: Iterable[str]) -> list[Joined]:
    """The rows of a file, each with its review of one of `blocks`."""
    reviews = {review.id: review for block in blocks for review in load_block(block)}
    joined = []
    for number, row in enumerate(_rows(path), 1):
        if not isinstance(row, dict) or not all(isinstance(row.get(k), str) for k in ("id", "sha", column, "maker")):
            raise UserError(f"{path}:{number}: expected text in id, sha, {column} and maker")
        review = reviews.get(row["id"])
        if review is None:
            raise UserError(f"{path}:{number}: review {row['id']} is not in the block {' or '.join(blocks)}")
        if digest(review.text) != row["sha"]:
            raise UserError(
                f"{path}:{number}: review {row['id']} is not the text that this row was made of (sha256 differs); "
                "pull imdb again, or build the data anew"
            )
        joined.append(Joined(review, row[column], row["maker"]))
    return joined


def _rows(path: Path) -> list[Any]:
    try:
        text = gzip.decompress(path.read_bytes()).decode("utf-8")
        return [json.loads(line) for line in text.splitlines()]
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"{path}: is no gzipped JSONL file: {error}") from None


def joined_records(part: str, kind: str) -> list[Record]:
    """What a spec such as imdb-explanations:train is for a job of this kind. Raises UserError where it serves none."""
    name, _, split = part.partition(":")
    rows = load_joined(name, split)
    if name == "imdb-gist" and kind == "summarize":
        return [SummaryPair(row.review.id, row.review.text, row.text) for row in rows]
    if name == "imdb-explanations" and kind == "sft":
        return [PromptCompletion(r.review.id, prompt_of(r.review.text), r.text, r.review.label) for r in rows]
    if name == "imdb-explanations" and kind == "prompts":
        return [Prompt(row.review.id, prompt_of(row.review.text), row.review.label) for row in rows]
    serves = "summarize" if name == "imdb-gist" else "sft and prompts"
    raise UserError(f"data {part}: serves {serves}, not {kind}")
