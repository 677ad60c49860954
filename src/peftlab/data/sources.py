"""A data spec becomes records: bundled names with their blocks, the user's files, Hub datasets.

    imdb:train      imdb:judge+rotten-tomatoes      reviews.jsonl      stanfordnlp/imdb:train
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from .check import check_file
from .imdb import BLOCKS, ROTTEN, load_block
from .records import LabelledText, Prompt, Record, Text, parse_row

SHOWN_ERRORS = 5
FILES = (".jsonl", ".json", ".csv", ".parquet")


@dataclass(frozen=True)
class RecordSet:
    """Records in a deterministic order, and the sha256 of their content."""

    records: list[Any]
    name: str
    sha256: str


def load_records(
    spec: str,
    kind: str,
    limit: int | None = None,
    seed: int = 0,
    labels: Sequence[str] | None = None,
    columns: Mapping[str, str] | None = None,
) -> RecordSet:
    """Records of every part of `spec`, in order; `limit` draws that many at random (seeded, in a random order).

    Raises UserError for unknown names, bad rows (each with its line) and empty data.
    """
    records: list[Record] = []
    for part in spec.split("+"):
        records += _load_part(part.strip(), kind, labels, columns)
    if not records:
        raise UserError(f"data {spec}: holds no rows")
    if limit is not None and limit < len(records):
        records = random.Random(seed).sample(records, limit)
    return RecordSet(records, spec, _digest(records))


def _load_part(part: str, kind: str, labels: Sequence[str] | None, columns: Mapping[str, str] | None) -> list[Record]:
    if Path(part).suffix.lower() in FILES:
        return _from_file(part, kind, labels, columns)
    name, _, split = part.partition(":")
    if name == ROTTEN:
        return _convert(load_block(ROTTEN), kind, name)
    if name == "imdb":
        if split not in BLOCKS:
            raise UserError(f"data {part}: imdb has the splits {', '.join(BLOCKS)}; for example imdb:train")
        return _convert(load_block(split), kind, part)
    if "/" in name and not Path(name).exists():
        return _from_hub(name, split or "train", kind, labels, columns)
    raise UserError(f"data {part}: not imdb:SPLIT, {ROTTEN}, a .jsonl, .csv or .parquet file, or a Hub dataset's id")


def _convert(rows: Iterable[LabelledText], kind: str, name: str) -> list[Record]:
    if kind == "classify":
        return list(rows)
    if kind == "sft":
        return [Text(row.id, row.text) for row in rows]
    if kind == "prompts":
        return [Prompt(row.id, row.text, row.label) for row in rows]
    raise UserError(f"data {name}: holds labelled reviews, which do not serve {kind}")


def _from_file(part: str, kind: str, labels: Sequence[str] | None, columns: Mapping[str, str] | None) -> list[Record]:
    result = check_file(Path(part), kind, labels, columns)
    if result.bad:
        shown = [f"{part}:{line}: {reason}" for line, reason in result.bad[:SHOWN_ERRORS]]
        more = len(result.bad) - len(shown)
        tail = [f"... and {more} more; `peftlab data check {part} --for {kind}` lists them all"] if more else []
        raise UserError("\n".join([f"{len(result.bad)} of {result.rows} rows are not usable:", *shown, *tail]))
    return result.records


def _from_hub(
    name: str, split: str, kind: str, labels: Sequence[str] | None, columns: Mapping[str, str] | None
) -> list[Record]:
    from datasets import load_dataset

    try:
        rows = load_dataset(name, split=split)
    except Exception as error:  # datasets raises a dozen kinds for "cannot reach" and "does not exist"
        raise UserError(
            f"data {name}:{split}: the Hub did not give it ({type(error).__name__}). Offline, use imdb:train or a local "
            ".jsonl, .csv or .parquet file"
        ) from None
    records = []
    for number, row in enumerate(rows):
        row = {**row, **{field: row[column] for field, column in (columns or {}).items() if column in row}}
        try:
            records.append(parse_row(kind, row, number, labels))
        except ValueError as error:
            raise UserError(f"data {name}:{split}: row {number}: {error}; set columns to map its fields") from None
    return records


def _digest(records: Iterable[Record]) -> str:
    digest = hashlib.sha256()
    for record in records:
        digest.update(repr(record).encode())
    return digest.hexdigest()
