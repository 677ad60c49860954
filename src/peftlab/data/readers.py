"""Files become rows, one at a time: JSONL, CSV, Parquet. What cannot be read as a row is one row's error. No torch."""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from ..errors import UserError
from .records import LONGEST, shown

BOM = "\ufeff"
MARKED = "begins with a byte order mark, as where files were joined"
# What a decoder with errors="surrogateescape" makes of bytes that are not UTF-8.
_ESCAPED = re.compile("[\udc80-\udcff]")
Row = tuple[int, Any]  # a row's line and the row, or the ValueError that says why it could not be read


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for line in itertools.count(1):
            raw = file.readline(LONGEST)
            if not raw:
                return
            if len(raw) == LONGEST:
                size = LONGEST + _skip_line(file, raw)
                yield line, ValueError(f"a line of {size:,} bytes; expected fewer than {LONGEST:,}")
            elif raw := (raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw).strip():
                yield line, _parsed(raw)


def _skip_line(file: BinaryIO, raw: bytes) -> int:
    """Read on to the end of a line that began with `raw`; how many bytes that were."""
    skipped = 0
    while raw and not raw.endswith(b"\n"):
        raw = file.readline(1 << 20)
        skipped += len(raw)
    return skipped


def _parsed(raw: bytes) -> Any:
    try:
        text = raw.decode("utf-8")
        return ValueError(MARKED) if text.startswith(BOM) else _DECODER.decode(text)
    except UnicodeDecodeError as error:
        return ValueError(f"not UTF-8 at byte {error.start + 1}")
    except json.JSONDecodeError as error:
        return ValueError(f"not valid JSON: {error.msg.removesuffix(' at')} at column {error.colno}")
    except _Twice as error:
        return error
    except ValueError:  # Python's int takes 4,300 digits
        return ValueError("not valid JSON: a number too long")
    except RecursionError:
        return ValueError("not valid JSON: nested too deep")


class _Twice(ValueError):
    """A JSON object gives a key twice, so that one of two values would be lost in silence."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise _Twice(f"the key {shown(name)} is given twice in one object")
        result[name] = value
    return result


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(LONGEST + 1)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = _Lines(file)
        reader = csv.reader(lines, strict=True)
        header = _header(path, reader)
        while True:
            line = lines.begin()
            try:
                cells = next(reader)
            except StopIteration:
                return
            except (csv.Error, ValueError) as error:
                reason = str(error).replace("unexpected end of data", "a quote is never closed")
                yield line, ValueError(f"not valid CSV: {reason}")
                lines.rewind()
                continue
            if cells and (len(cells) > 1 or len(header) == 1 or cells[0].strip()):
                yield line, _row_of(cells, header)


def _header(path: Path, reader: Iterator[list[str]]) -> list[str]:
    try:
        header = [name.strip() for name in next(reader, [])]
    except (csv.Error, ValueError) as error:
        raise UserError(f"{path}:1: not valid CSV: {error}") from None
    if any(map(_ESCAPED.search, header)):
        raise UserError(f"{path}:1: the header is not UTF-8; save the file as UTF-8")
    if len(header) == 1 and (mark := next((mark for mark in ";\t" if mark in header[0]), None)):
        raise UserError(f"{path}:1: cells are separated by {mark!r}; save the file with commas")
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{path}:1: the column {shown(twice)} appears twice")
    return header


def _row_of(cells: list[str], header: list[str]) -> dict[str, str] | ValueError:
    if cells[0].startswith(BOM):
        return ValueError(MARKED)
    for number, cell in enumerate(cells, 1):
        if wrong := _ESCAPED.search(cell):
            return ValueError(f"not UTF-8: cell {number} holds the byte 0x{ord(wrong[0]) - 0xDC00:02x}")
    if len(cells) != len(header):
        return ValueError(f"{len(cells)} cells, but the header has {len(header)}")
    return dict(zip(header, cells, strict=True))


class _Lines:
    """A file's lines for csv.reader. After a row that failed, the lines behind its first are read again.

    Else one quote that is never closed would swallow the rows after it, up to the next quote or the end.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._again: deque[str] = deque()
        self._taken: list[str] = []
        self._line = self._size = 0

    def begin(self) -> int:
        """A row begins; the number of its first line."""
        self._taken, self._size = [], 0
        return self._line + 1

    def rewind(self) -> None:
        self._again.extendleft(reversed(self._taken[1:]))
        self._line -= max(0, len(self._taken) - 1)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else self._file.readline(LONGEST)
        if not line:
            raise StopIteration
        self._line += 1
        self._size += len(line)
        if len(line) == LONGEST:
            rest, line = line, line[:-1] + "\n"  # as long, but ended: read again, it skips nothing more
            while rest and not rest.endswith(("\n", "\r")):
                rest = self._file.readline(1 << 20)
        self._taken.append(line)
        if self._size >= LONGEST:
            raise ValueError(f"a row of {LONGEST:,} characters or more, or a quote that is never closed")
        return line


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow.parquet
    from pyarrow.lib import ArrowException

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            line = 0
            for batch in file.iter_batches(1024):
                for row in _batch_rows(batch):
                    line += 1
                    yield line, row
    except ArrowException as error:
        raise UserError(f"{path}: not a readable Parquet file: {str(error).splitlines()[0]}") from None


def _batch_rows(batch: Any) -> Iterator[Any]:
    """Rows as mappings; one by one where the batch holds one that Python cannot."""
    try:
        yield from batch.to_pylist()
    except ValueError:
        for number in range(batch.num_rows):
            try:
                yield batch.slice(number, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield ValueError(f"not UTF-8 at byte {error.start + 1} of a text")
            except ValueError as error:
                yield ValueError(f"holds what cannot be read: {str(error).splitlines()[0]}")


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
}
