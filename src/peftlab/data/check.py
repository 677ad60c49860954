"""Reading the user's files: every bad row is found in one pass and named by its line. No torch."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from .records import KINDS, Record, parse_row


@dataclass
class CheckResult:
    """`rows` data rows, the good ones as `records`, the bad ones as (line, reason); lines count from 1."""

    rows: int = 0
    records: list[Record] = field(default_factory=list)
    bad: list[tuple[int, str]] = field(default_factory=list)


def check_file(
    path: Path, kind: str, labels: Sequence[str] | None = None, columns: Mapping[str, str] | None = None
) -> CheckResult:
    """Parse a JSONL, CSV or Parquet file for a kind of job. `columns` maps a field's name to the file's column.

    A leading BOM and CRLF are accepted; blank lines are no rows. Raises UserError where the file itself is unusable.
    """
    if kind not in KINDS:
        raise UserError(f"--for {kind}: expected one of {', '.join(KINDS)}")
    readers = {".jsonl": _jsonl, ".json": _jsonl, ".csv": _csv, ".parquet": _parquet}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path}: expected a file that ends in .jsonl, .csv or .parquet")
    result, seen = CheckResult(), {}
    try:
        for line, row in readers[path.suffix.lower()](path):
            number = result.rows
            result.rows += 1
            try:
                if isinstance(row, ValueError):
                    raise row
                if columns and isinstance(row, Mapping):
                    row = {**row, **{name: row[column] for name, column in columns.items() if column in row}}
                record = parse_row(kind, row, number, labels)
                if record.id in seen and "id" in row:
                    raise ValueError(f"id: {record.id!r} is also in line {seen[record.id]}")
                seen[record.id] = line
                result.records.append(record)
            except ValueError as error:
                result.bad.append((line, str(error)))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    return result


def _jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    for line, raw in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not raw.strip():
            continue
        try:
            yield line, json.loads(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            yield line, ValueError(f"not UTF-8 at byte {error.start}")
        except json.JSONDecodeError as error:
            yield line, ValueError(f"not valid JSON: {error.msg} at column {error.colno}")
        except RecursionError:
            yield line, ValueError("not valid JSON: nested too deep")


def _csv(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    csv.field_size_limit(1 << 30)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header = next(reader, None)
    if not header:
        return
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, ValueError(f"not valid CSV: {error}")
            continue
        if not cells:
            continue
        if len(cells) != len(header):
            yield line, ValueError(f"{len(cells)} cells, but the header has {len(header)}")
        else:
            yield line, dict(zip(header, cells, strict=True))


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    """A Parquet row's "line" is its number, from 1."""
    import pyarrow.parquet
    from pyarrow.lib import ArrowInvalid

    try:
        table = pyarrow.parquet.read_table(path)
    except ArrowInvalid as error:
        raise UserError(f"{path}: not a readable Parquet file: {str(error).splitlines()[0]}") from None
    yield from enumerate(table.to_pylist(), 1)
