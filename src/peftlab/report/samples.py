"""Model text before and after, prompt by prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from . import text
from .read import Row, as_number


@dataclass(frozen=True)
class Side:
    """What one side wrote, and its measures; side is before, after or reference."""

    side: str
    completion: str
    measures: list[tuple[str, str]]


@dataclass(frozen=True)
class Pair:
    """One prompt with what was written before and after, and the reference where there is one."""

    prompt: str
    sides: list[Side]

    @property
    def apart(self) -> bool:
        """Whether the prompt stands above its answers, once: they do not continue its line, as a story's would."""
        return "\n" in self.prompt

    @property
    def opening(self) -> str:
        """The beginning of a prompt too long to stand unfolded; empty for others."""
        return text.opening(self.prompt)


def pairs_of(rows: list[Row]) -> tuple[list[Pair], list[list[tuple[str, str]]]]:
    """Rows with a side, paired by prompt; any other rows as lists of (key, value)."""
    paired: dict[str, dict[str, Row]] = {}
    others = []
    for row in rows:
        if row.get("side") in ("before", "after") and "completion" in row:
            paired.setdefault(str(row.get("prompt_id")), {})[row["side"]] = row
        else:
            others.append([(str(key), _cell(value)) for key, value in row.items()])
    return [_pair(sides) for sides in paired.values()], others


def _pair(sides: dict[str, Row]) -> Pair:
    shown = [
        Side(side, str(sides[side]["completion"]), _measures(sides[side]))
        for side in ("before", "after")
        if side in sides
    ]
    reference = next((row["reference"] for row in sides.values() if row.get("reference")), None)
    if reference is not None:
        shown.append(Side("reference", str(reference), []))
    return Pair(str(next(iter(sides.values())).get("prompt", "")), shown)


def _measures(row: Row) -> list[tuple[str, str]]:
    numbers = ((key, as_number(value)) for key, value in row.items() if key not in ("prompt_id", "id"))
    return [(key, text.number(value)) for key, value in numbers if value is not None]


def _cell(value: Any) -> str:
    return text.number(value) if isinstance(value, float) else str(value)
