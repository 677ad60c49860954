"""A data spec becomes records: bundled names with their blocks, the user's files, Hub datasets.

    imdb:train      imdb:judge+rotten-tomatoes      reviews.jsonl      stanfordnlp/imdb:train
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from .check import READERS, check_file, rename_columns
from .imdb import BLOCKS, ROTTEN, load_block
from .records import LabelledText, Prompt, Record, Text, parse_row

ERRORS_SHOWN = 5
OFFLINE = f"imdb:train, {ROTTEN}, or a local {', '.join(READERS)} file"


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
    """Records of every part of `spec`, in order; `limit` draws that many (seeded, in a random order).

    `labels` names the classes of the user's rows and `columns` maps fields to their columns. Raises UserError
    for unknown names, bad rows (the first few by line, and how many) and empty data.
    """
    if limit is not None and limit < 1:
        raise UserError(f"data {spec}: a limit of {limit} leaves no rows; give 1 or more, or no limit")
    records: list[Record] = []
    for part in [spec] if Path(spec).is_file() else spec.split("+"):
        records += _load_part(part.strip(), kind, labels, columns)
    if not records:
        raise UserError(f"data {spec}: holds no rows")
    if limit is not None and limit < len(records):
        records = random.Random(seed).sample(records, limit)
    return RecordSet(records, spec, _digest(records))


def _load_part(
    part: str, kind: str, labels: Sequence[str] | None, columns: Mapping[str, str] | None
) -> list[Record]:
    if Path(part).suffix.lower() in READERS:
        return _from_file(part, kind, labels, columns)
    name, _, split = part.partition(":")
    if name == "imdb":
        if split not in BLOCKS:
            raise UserError(f"data {part}: imdb has the splits {', '.join(BLOCKS)}; for example imdb:train")
        return _as_kind(load_block(split), kind, part)
    if part == ROTTEN:
        return _as_kind(load_block(ROTTEN), kind, part)
    if "/" in name and not Path(name).exists():
        return _from_hub(name, split or "train", kind, labels, columns)
    raise UserError(f"data {part}: no such data; give imdb:SPLIT, a Hub dataset's OWNER/NAME, or {OFFLINE}")


def _as_kind(rows: Iterable[LabelledText], kind: str, name: str) -> list[Record]:
    if kind == "classify":
        return list(rows)
    if kind == "sft":
        return [Text(row.id, row.text) for row in rows]
    if kind == "prompts":
        return [Prompt(row.id, row.text, row.label) for row in rows]
    raise UserError(f"data {name}: holds labelled reviews, which do not serve {kind}")


def _from_file(
    part: str, kind: str, labels: Sequence[str] | None, columns: Mapping[str, str] | None
) -> list[Record]:
    result = check_file(Path(part), kind, labels, columns)
    if not result.bad:
        return result.records
    lines = [f"{len(result.bad)} of {result.rows} rows are not usable:"]
    lines += [f"{part}:{line}: {reason}" for line, reason in result.bad[:ERRORS_SHOWN]]
    if len(result.bad) > ERRORS_SHOWN:
        rest = len(result.bad) - ERRORS_SHOWN
        lines.append(f"... and {rest} more; `peftlab data check {part} --for {kind}` lists them all")
    raise UserError("\n".join(lines))


def _from_hub(
    name: str, split: str, kind: str, labels: Sequence[str] | None, columns: Mapping[str, str] | None
) -> list[Record]:
    from datasets import load_dataset
    from huggingface_hub import HfApi, constants

    try:
        if not constants.HF_HUB_OFFLINE:  # asked first, since datasets retries for half a minute
            HfApi().dataset_info(name, timeout=10)
        rows = load_dataset(name, split=split)
    except Exception as error:  # a dozen kinds for "cannot reach" and "does not exist"
        raise UserError(
            f"data {name}:{split}: the Hub did not give it ({type(error).__name__}). Offline, use {OFFLINE}; "
            "with HF_HUB_OFFLINE=1 what was downloaded before loads"
        ) from None
    records = []
    for number, row in enumerate(rows):
        try:
            records.append(parse_row(kind, rename_columns(row, columns), number, labels))
        except ValueError as error:
            raise UserError(f"data {name}:{split}: row {number}: {error}; columns maps fields") from None
    return records


def _digest(records: Iterable[Record]) -> str:
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps(vars(record), default=vars).encode("ascii") + b"\n")
    return digest.hexdigest()
