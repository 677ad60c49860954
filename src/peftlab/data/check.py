"""Reading the user's files: every bad row is found in one pass and named by its line. No torch."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from .records import KINDS, Record, parse_row, row_id, shown


@dataclass
class CheckResult:
    """`rows` data rows: the good ones as `records`, the bad ones as (line, reason); lines count from 1."""

    rows: int = 0
    records: list[Record] = field(default_factory=list)
    bad: list[tuple[int, str]] = field(default_factory=list)


def check_file(
    path: Path, kind: str, labels: Sequence[str] | None = None, columns: Mapping[str, str] | None = None
) -> CheckResult:
    """Parse a JSONL, CSV or Parquet file for a kind of job. `columns` maps a field to the file's column.

    A leading BOM and CRLF are accepted; blank lines are no rows. A CSV row's line is where it begins, a
    Parquet row's line is its number. Raises UserError where the file itself is unusable.
    """
    if kind not in KINDS:
        raise UserError(f"--for {kind}: expected one of {', '.join(KINDS)}")
    read = READERS.get(path.suffix.lower())
    if read is None:
        raise UserError(f"{path}: expected a file that ends in {', '.join(READERS)}")
    result = CheckResult()
    seen: dict[str, int] = {}
    try:
        for line, row in read(path):
            result.rows += 1
            try:
                if isinstance(row, ValueError):  # the line could not be read as a row
                    raise row
                row = rename_columns(row, columns)
                record = parse_row(kind, row, result.rows - 1, labels)
                _refuse_twin(row, line, seen)
                result.records.append(record)
            except ValueError as error:
                result.bad.append((line, str(error)))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or str(error).splitlines()[0]}") from None
    return result


def rename_columns(row: Any, columns: Mapping[str, str] | None) -> Any:
    """The row with each field of `columns` taken from the column it names; no mapping, no change."""
    if not columns or not isinstance(row, Mapping):
        return row
    return {**row, **{name: row[column] for name, column in columns.items() if column in row}}


def _refuse_twin(row: Mapping[str, Any], line: int, seen: dict[str, int]) -> None:
    """Results are told apart by id, so an id that a file gives must be given once."""
    identity = row_id(row)
    if identity is not None and seen.setdefault(identity, line) != line:
        raise ValueError(f"id: {shown(identity)} is also in line {seen[identity]}")


def _jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    for line, raw in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not raw.strip():
            continue
        try:
            yield line, json.loads(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            yield line, ValueError(f"not UTF-8 at byte {error.start + 1}")
        except json.JSONDecodeError as error:
            yield line, ValueError(f"not valid JSON: {error.msg} at column {error.colno}")
        except (ValueError, RecursionError):  # a number of thousands of digits, or of brackets
            yield line, ValueError("not valid JSON: a number too long or nested too deep")


def _csv(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start + 1}; save it as UTF-8") from None
    csv.field_size_limit(1 << 30)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        raise UserError(f"{path}:1: not valid CSV: {error}") from None
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{path}:1: the column {shown(twice)} appears twice")
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, ValueError(f"not valid CSV: {error}")
            continue
        if not cells or (len(cells) == 1 < len(header) and not cells[0].strip()):
            continue
        if len(cells) != len(header):
            yield line, ValueError(f"{len(cells)} cells, but the header has {len(header)}")
        else:
            yield line, dict(zip(header, cells, strict=True))


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow.parquet
    from pyarrow.lib import ArrowInvalid

    try:
        table = pyarrow.parquet.read_table(path)
    except ArrowInvalid as error:
        raise UserError(f"{path}: not a readable Parquet file: {str(error).splitlines()[0]}") from None
    yield from enumerate(table.to_pylist(), 1)


READERS: dict[str, Callable[[Path], Iterator[tuple[int, Any]]]] = {
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
}
