"""A data spec becomes records: bundled names with their blocks, the user's files, Hub datasets.

    imdb:train      imdb:judge+rotten-tomatoes      reviews.jsonl      OWNER/NAME@CONFIG:SPLIT
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ..errors import UserError
from .check import BadRows, scan_file, scan_rows
from .hub import refusal
from .imdb import BLOCKS, ROTTEN, load_block
from .joined import COLUMNS, joined_records
from .readers import READERS, Row
from .records import LABELS, LabelledText, Prompt, Record, Text, known_labels

Skipped = list[tuple[str, str]]  # (place, reason) of each row left out
_HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+(@[\w.-]+)?")
HUB_SPLIT = "train"  # of a dataset of the Hub where the spec names none
OFFLINE = f"imdb:train, {ROTTEN}, or a local {', '.join(READERS)} file"


@dataclass(frozen=True)
class RecordSet:
    """Records in a deterministic order, the sha256 of their content, and (place, reason) of the rows left out."""

    records: list[Any]
    name: str
    sha256: str
    skipped: Sequence[tuple[str, str]] = ()


def load_records(
    spec: str,
    kind: str,
    limit: int | None = None,
    seed: int = 0,
    labels: Sequence[str] | None = None,
    columns: Mapping[str, str] | None = None,
    on_bad_row: Literal["stop", "skip"] | None = None,
    trained_on: int | None = None,
) -> RecordSet:
    """Records of every part of `spec`, in order; `limit` draws that many (seeded, in a random order).

    `labels` names the classes and `columns` maps fields to columns of the user's rows. With `trained_on`, the limit by
    which training drew from the same data with this seed (0: all of it), only the rows that it left are drawn from.
    Raises UserError for unknown names, for bad rows unless they are to be skipped (the first few of each mistake
    by line, and how many), for empty data, and where training left nothing. `on_bad_row` is the config's key;
    None where it has none.
    """
    if limit is not None and limit < 1:
        raise UserError(f"data {spec}: a limit of {limit} leaves no rows; give 1 or more, or no limit")
    records: list[Record] = []
    skipped: Skipped = []
    taken: set[str] = set()
    for number, part in enumerate(_parts(spec), 1):
        found = _load_part(part, kind, labels, columns, skipped, on_bad_row)
        records += _told_apart(found, taken, number)
    if not records:
        why = f"no usable row; {skipped[0][0]}: {skipped[0][1]}" if skipped else "no rows"
        raise UserError(f"data {spec}: holds {why}")
    name = spec
    if trained_on is not None:
        name, records = f"{spec}, rows not trained on", _left(spec, records, trained_on, seed)
    records = [records[i] for i in _drawn(len(records), limit, seed)]
    return RecordSet(records, name, _digest(records), skipped)


def require_known(spec: str) -> None:
    """UserError where a part of `spec` names no data, or a file that is not there; no library, and no Hub is asked."""
    for part in _parts(spec):
        path, (name, _, split) = Path(part), part.partition(":")
        if path.suffix.lower() in READERS:
            if not path.exists():
                raise UserError(f"{path}: no such file")
        elif name == "imdb" and split not in BLOCKS:
            raise UserError(f"data {part}: imdb has the splits {', '.join(BLOCKS)}; for example imdb:train")
        elif name != "imdb" and name not in COLUMNS and part != ROTTEN and ("/" not in name or Path(name).exists()):
            raise UserError(f"data {part}: no such data; give imdb:SPLIT, a Hub dataset's OWNER/NAME, or {OFFLINE}")


def same_data(one: str, other: str) -> bool:
    """Whether two specs name the same data, however the paths of their files are spelled."""
    return [*map(_place, _parts(one))] == [*map(_place, _parts(other))]


def _parts(spec: str) -> list[str]:
    return [spec] if os.path.isfile(spec) else [part.strip() for part in spec.split("+")]


def _place(part: str) -> str:
    if Path(part).is_file():
        return os.path.realpath(part)
    return part if ":" in part or "/" not in part else f"{part}:{HUB_SPLIT}"


def _drawn(rows: int, limit: int | None, seed: int) -> Sequence[int]:
    """The numbers of the rows that are drawn: all in order, or `limit` of them in a random order."""
    return range(rows) if limit is None or limit >= rows else random.Random(seed).sample(range(rows), limit)


def _left(spec: str, records: list[Record], trained_on: int, seed: int) -> list[Record]:
    """The records, in order, that training did not draw. Raises UserError where there are none."""
    drawn = set(_drawn(len(records), trained_on or None, seed))
    if len(drawn) == len(records):
        raise UserError(
            f"eval_data {spec}: is train_data too, and training takes all of its {len(records)} rows; give another "
            f"eval_data, or a train_limit below {len(records)}: evaluation takes the rows that are left (eval_limit)"
        )
    return [record for number, record in enumerate(records) if number not in drawn]


def _told_apart(records: Iterable[Record], taken: set[str], part: int) -> Iterator[Record]:
    """The records of a spec's part, "PART:" before an id that is `taken`; adds theirs to it."""
    for record in records:
        identity = record.id
        while part > 1 and identity in taken:
            identity = f"{part}:{identity}"
        taken.add(identity)
        yield record if identity == record.id else replace(record, id=identity)


def _load_part(
    part: str,
    kind: str,
    labels: Sequence[str] | None,
    columns: Mapping[str, str] | None,
    skipped: Skipped,
    on_bad_row: Literal["stop", "skip"] | None,
) -> list[Record]:
    require_known(part)
    if Path(part).suffix.lower() in READERS:
        found = ((f"{part}:{line}", row) for line, row in scan_file(Path(part), kind, labels, columns))
        return _usable(found, f"`{check_command(part, kind, labels, columns)}` lists them all", skipped, on_bad_row)
    name, _, split = part.partition(":")
    if name == "imdb":
        return _as_kind(load_block(split), kind, part, labels)
    if name in COLUMNS:
        return joined_records(part, kind)
    if part == ROTTEN:
        return _as_kind(load_block(ROTTEN), kind, part, labels)
    split = split or HUB_SPLIT
    rows = scan_rows(_from_hub(name, split, labels, columns), kind, labels, columns, "row")
    found = ((f"{name}:{split}: row {number}", row) for number, row in rows)
    return _usable(found, "columns maps a field to a column", skipped, on_bad_row)


def refuse_source(spec: str, kind: str) -> None:
    """UserError where `spec` is no file to check for `kind`, but data by its name: of the lab, or of the Hub."""
    name = spec.partition(":")[0]
    own = name in ("imdb", ROTTEN, *COLUMNS)
    if Path(spec).exists() or not (own or _HUB_NAME.fullmatch(name) and not Path(name).suffix):
        return
    why = "is data of the lab, whose rows are checked" if own else "is no file; on the Hub a job checks what it loads"
    preview = shlex.join(["peftlab", "data", "preview", spec, "--for", kind])
    raise UserError(f"{spec}: {why}; `{preview}` shows them")


def _as_kind(rows: Iterable[LabelledText], kind: str, name: str, labels: Sequence[str] | None) -> list[Record]:
    if kind == "classify" and labels:
        classes = {LABELS[label.lower()]: number for number, label in enumerate(labels) if label.lower() in LABELS}
        if len(classes) < 2:
            raise UserError(f"data {name}: has the classes negative and positive; labels has {', '.join(labels)}")
        return [LabelledText(row.id, row.text, classes[row.label]) for row in rows]
    if kind == "classify":
        return list(rows)
    if kind == "sft":
        return [Text(row.id, row.text) for row in rows]
    if kind == "prompts":
        return [Prompt(row.id, row.text, row.label) for row in rows]
    raise UserError(f"data {name}: holds labelled reviews, which do not serve {kind}")


def check_command(
    file: str, kind: str, labels: Sequence[str] | None, columns: Mapping[str, str] | None
) -> str:
    """What to type for a list of every bad row."""
    words = ["peftlab", "data", "check", file, "--for", kind]
    words += ["--labels", ",".join(labels)] if labels else []
    for name, column in (columns or {}).items():
        words += ["--columns", f"{name}={column}"]
    return shlex.join(words)


def _usable(
    found: Iterable[tuple[str, Record | str]], hint: str, skipped: Skipped, on_bad_row: Literal["stop", "skip"] | None
) -> list[Record]:
    """The records among what was found by place. Bad rows are added to `skipped` where they are to be, else refused."""
    records: list[Record] = []
    bad, told = BadRows(fold=True), []
    for place, row in found:
        if not isinstance(row, str):
            records.append(row)
        elif on_bad_row == "skip":
            skipped.append((place, row))
        else:
            told += bad.lines(place, row)
    if bad.count:
        count = f"{bad.count} of {len(records) + bad.count} rows are not usable:"
        if any(": label: " in line and " is not one of " in line for line in told):
            hint += "; `labels` in a classifier's config names the classes, as in labels=bad,fair,good"
        if on_bad_row:
            hint += "; on_bad_row=skip leaves them out"
        raise UserError("\n".join([count, *told, *bad.rest(), hint]))
    return records


def _from_hub(
    name: str, split: str, labels: Sequence[str] | None, columns: Mapping[str, str] | None
) -> Iterator[Row]:
    """Rows of OWNER/NAME or OWNER/NAME@CONFIG, numbered from 0. A class goes by its name where `labels` has one."""
    from datasets import load_dataset
    from huggingface_hub import HfApi, constants

    repository, _, config = name.partition("@")
    try:
        if not constants.HF_HUB_OFFLINE:  # asked first, since datasets retries for half a minute
            HfApi().dataset_info(repository, timeout=10)
        rows = load_dataset(repository, config or None, split=split)
    except Exception as error:  # also a ValueError that says which configs and splits there are
        raise UserError(
            f"data {name}:{split}: the Hub did not give it ({refusal(error)}). Offline, use {OFFLINE}; "
            "with HF_HUB_OFFLINE=1 what was downloaded before loads"
        ) from None
    column = (columns or {}).get("label", "label")
    names = _class_names(rows, column, labels)
    for number, row in enumerate(rows):
        value = row.get(column)
        if names and isinstance(value, int) and 0 <= value < len(names):
            row = {**row, column: names[value]}
        yield number, row


def _class_names(rows: Any, column: str, labels: Sequence[str] | None) -> list[str]:
    """The names that the dataset gives its classes; none where `labels` knows none of them and so goes by number."""
    names = getattr((getattr(rows, "features", None) or {}).get(column), "names", None) or []
    return names if known_labels(labels).keys() & {name.lower() for name in names} else []


def _digest(records: Iterable[Record]) -> str:
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps(vars(record), default=vars).encode("ascii") + b"\n")
    return digest.hexdigest()
