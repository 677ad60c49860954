"""A classifier's own figures: which class is taken for which, and how far its confidence may be trusted."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from . import text
from .read import as_number
from .svg import rect, segment, words

SIZE, LEFT, BOTTOM, TOP = 260, 40, 34, 20


@dataclass(frozen=True)
class ClassifierView:
    """`rows` of the confusion table: (true label, [(count, share of the row in percent, is it right)])."""

    labels: list[str]
    rows: list[tuple[str, list[tuple[str, str, bool]]]]
    chart: Markup
    bins: list[tuple[str, str, str, str]]


def classifier_of(path: Path) -> ClassifierView | None:
    """What `classifier.json` in a run folder says; None where there is none, or none that can be read."""
    try:
        tables: Any = json.loads((path / "classifier.json").read_text(encoding="utf-8"))
        labels = [str(label) for label in tables["labels"]]
        counts = [[int(count) for count in row] for row in tables["confusion"]]
        bins = bins_of(tables["reliability"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    rows = []
    for index, (label, row) in enumerate(zip(labels, counts, strict=False)):
        total = max(1, sum(row))
        rows.append((label, [(f"{n:,}", f"{100 * n / total:.1f}%", at == index) for at, n in enumerate(row)]))
    return ClassifierView(labels, rows, reliability_chart(bins), bin_rows(bins))


def bins_of(table: Any) -> list[dict[str, float]]:
    """The bins of a reliability diagram, as a run's file lists them. ValueError, KeyError or TypeError for no such."""
    return [{key: float(row[key]) for key in ("low", "high", "rows", "confidence", "accuracy")} for row in table]


def chance_error(path: Path) -> tuple[int, float]:
    """The rows that a run's calibration error was measured on, and the error that chance alone can make of them.

    Of a calibrated model, the accuracy of a bin of n rows at confidence c scatters about c by sqrt(c (1 - c) / n), so
    the error is a mean of half-normal distances, and never 0. Given is its mean and two standard deviations more. Where
    a run's files tell no bins: (0, 0.0).
    """
    for name in ("classifier.json", "reward.json"):
        try:
            bins = bins_of(json.loads((path / name).read_text(encoding="utf-8"))["reliability"])
            spreads = [b["rows"] * max(b["confidence"] * (1 - b["confidence"]), 0.0) for b in bins]  # n^2 s^2
            rows = sum(b["rows"] for b in bins)
            mean = math.sqrt(2 / math.pi) * sum(map(math.sqrt, spreads))
            return int(rows), (mean + 2 * math.sqrt((1 - 2 / math.pi) * sum(spreads))) / rows
        except (OSError, ValueError, KeyError, TypeError, OverflowError, ZeroDivisionError):
            continue
    return 0, 0.0


def bin_rows(bins: list[dict[str, float]]) -> list[tuple[str, str, str, str]]:
    """A bin's edges, rows, mean confidence and accuracy, for a table."""
    return [
        (f"{b['low']:.2f} to {b['high']:.2f}", f"{b['rows']:.0f}", text.number(as_number(b["confidence"])),
         text.number(as_number(b["accuracy"])))
        for b in bins
    ]


def reliability_chart(bins: list[dict[str, float]]) -> Markup:
    """A bar a bin, as high as its accuracy, a tick at its mean confidence; calibrated ones follow the diagonal.

    Bins of less than 1% of the rows are pale: their accuracy is mostly chance.
    """
    total = max(1.0, sum(b["rows"] for b in bins))

    def at_x(x: float) -> float:
        return LEFT + x * (SIZE - LEFT - 8)

    def at_y(y: float) -> float:
        return SIZE - BOTTOM - y * (SIZE - BOTTOM - TOP)

    spoken = "Reliability diagram. " + "; ".join(
        f"confidence {b['confidence']:.2f}: accuracy {b['accuracy']:.2f} of {b['rows']:.0f} rows" for b in bins
    )
    parts = [f'<svg class="plot square" viewBox="0 0 {SIZE} {SIZE}" role="img" aria-label="{escape(spoken)}">']
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(segment("grid", LEFT, at_y(tick), at_x(1), at_y(tick)))
        parts.append(words("tick", LEFT - 6, at_y(tick) + 3.5, f"{tick:g}", "end"))
        parts.append(words("tick", at_x(tick), SIZE - BOTTOM + 14, f"{tick:g}", "middle"))
    for b in bins:
        left, right = at_x(b["low"]), at_x(b["high"])
        ink = "share few" if b["rows"] < 0.01 * total else "share"
        parts.append(rect(ink, left + 1, at_y(b["accuracy"]), right - left - 2, at_y(0) - at_y(b["accuracy"])))
        parts.append(segment("confidence", left + 1, at_y(b["confidence"]), right - 1, at_y(b["confidence"])))
    parts.append(segment("diagonal", at_x(0), at_y(0), at_x(1), at_y(1)))
    parts.append(segment("axis", LEFT, at_y(0), at_x(1), at_y(0)))
    parts.append(words("unit", at_x(1), SIZE - 4, "confidence", "end"))
    parts.append(words("unit", LEFT, TOP - 9, "accuracy", "middle"))
    return Markup("".join(parts) + "</svg>")
