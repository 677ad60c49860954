"""The user's rows become records: every bad row is found in one pass and named by its line. No torch.

Files are read row by row, so a check needs the memory of one row and of the ids.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError, did_you_mean
from .readers import READERS, Row
from .records import FIELDS, KINDS, Missing, Record, fields_of, parse_row, row_id, shown

# The shapes of a row of `sft`: a mapping that names one means it, whatever other columns are called.
SHAPES = ({"text"}, {"prompt", "completion"}, {"messages"})
Found = tuple[int, Record | str]  # a row's line and its record, or the reason why it is bad
# The kind of rows that a verb reads which is not called as they are.
READS = {"reward": "preferences", "dpo": "preferences", "ppo": "prompts", "rloo": "prompts", "pretrain": "sft"}
OF_A_KIND = 5  # bad rows that a person is shown of one and the same mistake
_VALUES = re.compile(r"""(['"]).*?(?:\1|\.{3})|\d+""")  # what two rows with one mistake differ in: texts, and numbers


@dataclass
class CheckResult:
    """`rows` data rows: the good ones as `records`, the bad ones as (line, reason); lines count from 1."""

    rows: int = 0
    records: list[Record] = field(default_factory=list)
    bad: list[tuple[int, str]] = field(default_factory=list)


class BadRows:
    """Bad rows as lines, `count` of them. With `fold`, for a person, a mistake that many rows share is shown of its
    first few: a wrong column would push every other one off the screen."""

    def __init__(self, fold: bool) -> None:
        self.count, self._fold = 0, fold
        self._kinds: dict[str, tuple[str, int]] = {}  # of a mistake: where it is first, and how often

    def lines(self, place: str, reason: str) -> list[str]:
        """What to show of one more bad row: a line, or nothing."""
        self.count += 1
        kind = _VALUES.sub("_", reason) if self._fold else ""
        first, before = self._kinds.get(kind, (place, 0))
        self._kinds[kind] = first, before + 1
        return [] if self._fold and before >= OF_A_KIND else [f"{place}: {reason}"]

    def rest(self) -> list[str]:
        """What to show at the end: how many more there are of each mistake; nothing where each was shown."""
        more = [(first, count - OF_A_KIND) for first, count in self._kinds.values() if self._fold and count > OF_A_KIND]
        return [f"... and {count} more row{'s' * (count > 1)} like {first}" for first, count in more]


def check_file(
    path: Path, kind: str, labels: Sequence[str] | None = None, columns: Mapping[str, str] | None = None
) -> CheckResult:
    """What `scan_file` finds, gathered."""
    result = CheckResult()
    for line, found in scan_file(path, kind, labels, columns):
        result.rows += 1
        if isinstance(found, str):
            result.bad.append((line, found))
        else:
            result.records.append(found)
    return result


def scan_file(
    path: Path, kind: str, labels: Sequence[str] | None = None, columns: Mapping[str, str] | None = None
) -> Iterator[Found]:
    """Every row of a JSONL, CSV or Parquet file for a kind of job, in order. `columns` maps a field to its column.

    A leading BOM and CRLF are accepted; blank lines are no rows. A CSV row's line is where it begins, a
    Parquet row's line is its number. Raises UserError where the file itself is unusable.
    """
    if kind not in KINDS:
        hint = f"{kind} reads {READS[kind]}" if kind in READS else f"expected one of {', '.join(KINDS)}"
        raise UserError(f"--for {kind}: {hint}")
    yield from scan_rows(file_rows(path), kind, labels, columns)


def file_rows(path: Path, suffix: str | None = None) -> Iterator[Row]:
    """Every row of a JSONL, CSV or Parquet file with its line, or the ValueError that says why it cannot be read.

    `suffix` stands for that of `path`. Raises UserError where the file itself is unusable.
    """
    if path.is_dir():
        raise UserError(f"{path}: cannot be read: is a folder; give a JSONL, CSV or Parquet file")
    read = READERS.get(path.suffix.lower() if suffix is None else suffix)
    if read is None:
        raise UserError(f"{path}: expected a file that ends in {', '.join(READERS)}")
    try:
        yield from read(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or str(error).splitlines()[0]}") from None


def scan_rows(
    rows: Iterable[Row],
    kind: str,
    labels: Sequence[str] | None = None,
    columns: Mapping[str, str] | None = None,
    place: str = "line",
) -> Iterator[Found]:
    """Each row's record, or why it is none. Results are told apart by id, so each is there once."""
    ids = _Ids(place)
    for number, (line, row) in enumerate(rows):
        try:
            if isinstance(row, ValueError):
                raise row
            renamed = rename_columns(row, columns)
            record = parse_row(kind, renamed, number, labels)
            ids.add(record.id, line, row_id(renamed) is None)
            yield line, record
        except Missing as error:
            yield line, _in_their_words(error, row, columns or {})
        except ValueError as error:
            yield line, str(error)


@dataclass
class _Ids:
    """The ids of the good rows and where each is: those that rows have, and the numbers of those that have none."""

    place: str
    given: dict[str, int] = field(default_factory=dict)
    counted: dict[str, int] = field(default_factory=dict)

    def add(self, identity: str, line: int, numbered: bool) -> None:
        """Raises ValueError where another row has the id."""
        if identity in self.given:
            what = f"missing, and the row's number, {identity}," if numbered else shown(identity)
            raise ValueError(f"id: {what} is also in {self.place} {self.given[identity]}")
        if identity in self.counted:
            where = f"{self.place} {self.counted[identity]}"
            raise ValueError(f"id: {shown(identity)} is also in {where}, which has no id and goes by its number")
        (self.counted if numbered else self.given)[identity] = line


def _in_their_words(error: Missing, row: Mapping[str, Any], columns: Mapping[str, str]) -> str:
    """What is missing of a row, by the column that it should be in, and with the names that the row has itself."""
    for name in error.fields:
        if name in columns and columns[name] not in row:
            return f"{name}: the row has no column {shown(columns[name])}; it has {fields_of(row)}"
    # Of a turn, or a field that is there but hidden by a mapping, the message holds as it is.
    if not error.fields or any(name in row for name in error.fields):
        return str(error)
    return str(Missing(row, error.told, error.fields))


def rename_columns(row: Any, columns: Mapping[str, str] | None) -> Any:
    """The row with each field of `columns` taken from the column it names, and from no other.

    A field whose column is not in the row is missing, even where a column has the field's name.
    """
    if not columns or not isinstance(row, Mapping):
        return row
    hidden = set(columns)
    for shape in SHAPES:
        if shape & columns.keys():
            hidden |= set().union(*SHAPES) - shape
    kept = {name: value for name, value in row.items() if name not in hidden}
    return kept | {name: row[column] for name, column in columns.items() if column in row}


def column_pairs(pairs: Sequence[str]) -> dict[str, str]:
    """FIELD=COLUMN as typed on the command line. Raises UserError."""
    columns = {}
    for pair in pairs:
        name, equals, column = pair.partition("=")
        if not equals or not column:
            raise UserError(f"--columns {pair}: expected FIELD=COLUMN, for example text=review")
        if re.search(r",\w+=", column):
            raise UserError(f"--columns {pair}: once for each field, --columns text=review --columns label=stars")
        columns[name] = column
    try:
        known_fields(columns)
    except ValueError as error:
        raise UserError(f"--columns: {error}") from None
    return columns


def class_names(labels: str | None) -> list[str] | None:
    """Names divided by commas, as typed on the command line. Raises UserError."""
    if labels is None:
        return None
    names = [name.strip() for name in labels.split(",")]
    if len({name.lower() for name in names} - {""}) < max(2, len(names)):
        raise UserError(f"--labels {labels}: expected two or more different names, divided by commas")
    return names


def known_fields(columns: Mapping[str, str]) -> Mapping[str, str]:
    """`columns` itself. Raises ValueError where a key is no field of any row, or where two shapes are mapped."""
    for name in columns:
        if name not in FIELDS:
            hint = did_you_mean(name, FIELDS) or f"expected some of {', '.join(FIELDS)}"
            raise ValueError(f"{shown(name)} is no field of a row; {hint}")
    shapes = [next(name for name in columns if name in shape) for shape in SHAPES if shape & columns.keys()]
    if len(shapes) > 1:
        raise ValueError(f"{' and '.join(shapes)} are of different shapes of a row; map one of them")
    return columns
