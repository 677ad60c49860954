"""What people say of pairs of answers: a journal of their choices, and the pairs in their order. No torch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import LabError, UserError
from ..runs.atomic import append_line, disk_errors, fsync_folder
from .check import check_file
from .readers import READERS
from .records import PreferencePair, shown

CHOICES = ("chosen", "rejected", "tie", "skip")
SIDES = ("left", "right")
_SHOWN = 5  # bad rows that an error names
_HEAD = b'{"choice": "'  # how every line of a journal begins


@dataclass(frozen=True)
class Pair:
    """A row of the file: its `record`, the whole `row`, and `texts`, a short hash of prompt, chosen and rejected."""

    record: PreferencePair
    row: Mapping[str, Any]
    texts: str


@dataclass(frozen=True)
class Choice:
    """What a person said of a pair: one of CHOICES, and which answer stood on the left."""

    choice: str
    left: str


def journal_of(prefs: Path) -> Path:
    """Where the choices of a file's pairs go, unless told."""
    return prefs.with_name(f"{prefs.stem}.labels.jsonl")


def read_pairs(path: Path) -> list[Pair]:
    """All pairs of a JSONL file of preferences, in order. Raises UserError that names the first bad rows."""
    if path.suffix.lower() != ".jsonl":
        raise UserError(f"{path}: expected a file that ends in .jsonl")
    found = check_file(path, "preferences")
    if found.bad:
        lines = [f"{path}:{line}: {reason}" for line, reason in found.bad[:_SHOWN]]
        told = f"{len(found.bad)} of {found.rows} rows are not usable:\n" + "\n".join(lines)
        raise UserError(f"{told}\n`peftlab data check {path} --for preferences` lists every one")
    if not found.records:
        raise UserError(f"{path}: holds no pair")
    rows = [row for _, row in READERS[".jsonl"](path)]
    pairs = []
    for record, row in zip(found.records, rows, strict=True):
        assert isinstance(record, PreferencePair)
        pairs.append(Pair(record, row, _hash(record)))
    return pairs


def _hash(record: PreferencePair) -> str:
    texts = json.dumps([record.prompt, record.chosen, record.rejected])
    return hashlib.sha256(texts.encode("ascii")).hexdigest()[:16]


def left_of(seed: int, identity: str) -> str:
    """Which answer of a pair stands on the left, "chosen" or "rejected": a fair coin that seed and id toss."""
    return CHOICES[hashlib.sha256(f"{seed}:{identity}".encode()).digest()[0] & 1]


class Journal:
    """The choices made so far, each on disk before the next pair is asked for.

    `path` is open as `handle`, which the caller has locked. A line is one choice, or "undo", which takes the last
    one back; `position` counts the lines, so it names a state. What a crash left of a line is cut off, `cut` bytes.
    Raises UserError where the file is no journal of these pairs.
    """

    def __init__(self, path: Path, handle: int, pairs: Sequence[Pair], seed: int = 0) -> None:
        self.path, self.pairs, self.seed = path, pairs, seed
        self.position = 0
        self.choices: dict[str, Choice] = {}  # in the order they were made: undo takes the last
        self._handle = handle
        self._by_id = {pair.record.id: pair for pair in pairs}
        self.cut = self._load()

    def current(self) -> Pair | None:
        """The first pair that nobody has judged; None at the end."""
        return next((pair for pair in self.pairs if pair.record.id not in self.choices), None)

    def sides(self, pair: Pair) -> dict[str, str]:
        """The answers as they are shown, {"left": text, "right": text}."""
        answers = [pair.record.chosen, pair.record.rejected]
        if left_of(self.seed, pair.record.id) == "rejected":
            answers.reverse()
        return dict(zip(SIDES, answers, strict=True))

    def choose(self, said: str, seconds: float, pair: Pair | None = None) -> None:
        """Writes what was said of a pair, by default the current one: left, right, tie or skip, `seconds` after it was
        shown."""
        pair = pair or self.current()
        if pair is None or said not in (*SIDES, "tie", "skip"):
            raise ValueError(f"no pair, or no choice: {said}")
        left = left_of(self.seed, pair.record.id)
        if said in SIDES:
            said = left if said == "left" else CHOICES[1 - CHOICES.index(left)]
        self._append(said, pair, left=left, seconds=round(seconds, 2))
        self.choices[pair.record.id] = Choice(said, left)

    def undo(self) -> bool:
        """Takes the last choice back, which is a line too; False where there is none."""
        if not self.choices:
            return False
        last = next(reversed(self.choices))
        self._append("undo", self._by_id[last])
        del self.choices[last]
        return True

    def labelled(self) -> Iterator[dict[str, Any]]:
        """The rows in the person's order, without ties and skips.

        Where the person preferred the other answer, every pair of fields whose names tell `chosen` from `rejected`
        is exchanged; `margin` speaks for the old order and is left out.
        """
        for pair in self.pairs:
            made = self.choices.get(pair.record.id)
            row = {"id": pair.record.id, **pair.row} | {"id": pair.record.id}  # first, and there where it was a number
            if made and made.choice == "chosen":
                yield row
            elif made and made.choice == "rejected":
                yield {name: value for name, value in _exchanged(row).items() if name != "margin"}

    def _append(self, said: str, pair: Pair, **more: Any) -> None:
        """Raises LabError where the disk is full, or where another program has changed the file since."""
        with disk_errors(self.path):
            if not self._is_ours():
                raise LabError(f"{self.path}: changed or moved by another program; start again to go on from it")
            row = {"choice": said, "id": pair.record.id, **more}
            append_line(self.path, {**row, "time": datetime.now(UTC).isoformat("T", "seconds"), "texts": pair.texts})
        self._size = os.fstat(self._handle).st_size
        self.position += 1

    def _is_ours(self) -> bool:
        held = os.fstat(self._handle)
        return self.path.exists() and os.path.samestat(held, self.path.stat()) and held.st_size == self._size

    def _load(self) -> int:
        """Replays the file; how many bytes of a torn line were cut."""
        data = self.path.read_bytes()
        lines = data.split(b"\n")
        torn = lines.pop()
        if not torn and lines and _parsed(lines[-1]) is None:
            torn = lines.pop() + b"\n"  # blocks of one line can reach the disk out of order
        for number, line in enumerate(lines, 1):
            try:
                self._replay(_parsed(line))
            except ValueError as error:
                raise UserError(f"{self.path}:{number}: {error}") from None
        # Of a file that is something else nothing is cut. A power cut can leave NULs where a block was to be.
        if not (torn.startswith((_HEAD, b"\0")) or _HEAD.startswith(torn)):
            raise UserError(f"{self.path}:{len(lines) + 1}: no line of `peftlab label`; choose another --output")
        self.position, self._size = len(lines), len(data) - len(torn)
        with disk_errors(self.path):
            os.ftruncate(self._handle, self._size)
            os.fsync(self._handle)
            fsync_folder(self.path.parent)
        return len(torn)

    def _replay(self, row: Any) -> None:
        """Raises ValueError where the line cannot follow those before it."""
        if not isinstance(row, dict) or not {"choice", "id", "texts"} <= row.keys():
            raise ValueError("no line of `peftlab label`; choose another --output")
        said, identity = row["choice"], row["id"]
        pair = self._by_id.get(identity) if isinstance(identity, str) else None
        if pair is None:
            raise ValueError(f"pair {shown(identity)} is not in the file now; restore it or choose another --output")
        if pair.texts != row["texts"]:
            raise ValueError(
                f"the texts of pair {shown(identity)} changed after they were labelled; restore the file or choose "
                "another --output"
            )
        if said == "undo":
            if not self.choices or next(reversed(self.choices)) != identity:
                raise ValueError(f"takes back pair {shown(identity)}, which is not the last one chosen")
            del self.choices[identity]
        elif said in CHOICES and row.get("left") in CHOICES[:2]:
            if identity in self.choices:
                raise ValueError(f"pair {shown(identity)} is labelled a second time")
            self.choices[identity] = Choice(said, row["left"])
        else:
            raise ValueError(f"choice: {shown(said)} is not one of {', '.join(CHOICES)}, undo")


def _parsed(line: bytes) -> Any:
    """A line's JSON; None where it is none."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _exchanged(value: Any) -> Any:
    """A mapping in which fields of `chosen` and of `rejected` have changed places, at every level."""
    if not isinstance(value, Mapping):
        return value
    return {name: _exchanged(value[other if (other := _partner(name)) in value else name]) for name in value}


def _partner(name: str) -> str:
    if "chosen" in name:
        return name.replace("chosen", "rejected")
    return name.replace("rejected", "chosen")
