"""Line charts as inline SVG: no script, no font; colours come from the page's stylesheet by class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from .text import clean, compact, number

WIDTH, HEIGHT = 380, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 18, 28
MOST_POINTS = 240
_LARGEST = 1e300  # beyond it differences overflow; such a value is a gap in the line


@dataclass(frozen=True)
class Series:
    """One line: `points` are (x, y), y None (or not finite) where the line has a gap."""

    label: str
    points: Sequence[tuple[float, float | None]]


@dataclass(frozen=True)
class Marker:
    """A single value beside the line: `at` "start" (step 0) or "end" of the x axis."""

    label: str
    value: float
    at: str


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` multiples of 1, 2 or 5 times a power of ten that lie within [low, high], low < high."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((m * power for m in (1, 2, 5) if m * power >= rough * 0.999), 10 * power)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def thin(
    points: Sequence[tuple[float, float | None]], most: int = MOST_POINTS
) -> list[tuple[float, float | None]]:
    """At most `most` points: of each bucket the lowest, the highest and a gap, if any, in their order."""
    if len(points) <= most:
        return list(points)
    kept: list[tuple[float, float | None]] = []
    buckets = most // 3
    for bucket in range(buckets):
        part = points[bucket * len(points) // buckets : (bucket + 1) * len(points) // buckets]
        known = [index for index, (_, y) in enumerate(part) if y is not None]
        gaps = [index for index, (_, y) in enumerate(part) if y is None]
        extremes = {pick(known, key=lambda i: part[i][1] or 0.0) for pick in (min, max)} if known else set()
        kept += [part[index] for index in sorted(extremes | set(gaps[:1]))]
    return kept


def line_chart(
    series: Sequence[Series],
    label: str,
    unit: str = "",
    band: tuple[float | None, float | None] | None = None,
    markers: Sequence[Marker] = (),
) -> Markup:
    """An SVG element: axes with ticks, a shaded `band` (None for an open end), one line a series, markers.

    Holds no coordinate that is not finite, whatever the points hold. `label` says what it shows to who cannot
    see it.
    """
    lines = [thin([(float(x), _known(y)) for x, y in one.points if _known(x) is not None]) for one in series]
    xs = [x for line in lines for x, _ in line]
    ys = [y for line in lines for _, y in line if y is not None]
    ys += [marker.value for marker in markers if _known(marker.value) is not None]
    if xs and any(marker.at == "start" for marker in markers):
        xs.append(0.0)  # "before" is step 0, whichever step was the first to be logged
    x_low, x_high = _domain(xs, 0.0)
    y_low, y_high = _domain(_with_band(ys, band), 0.06)

    def at_x(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def at_y(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(clean(label))}" '
        f'preserveAspectRatio="xMidYMid meet"><title>{escape(clean(label))}</title>'
    ]
    if band and ys:
        top = at_y(min(y_high, y_high if band[1] is None else band[1]))
        bottom = at_y(max(y_low, y_low if band[0] is None else band[0]))
        if bottom > top:
            parts.append(rect("band", LEFT, top, WIDTH - LEFT - RIGHT, bottom - top))
    for tick in nice_ticks(y_low, y_high) if ys else []:
        y = at_y(tick)
        parts.append(segment("grid", LEFT, y, WIDTH - RIGHT, y))
        parts.append(words("tick", LEFT - 6, y + 3.5, compact(tick), "end"))
    for tick in _whole_ticks(x_low, x_high, xs):
        parts.append(words("tick", at_x(tick), HEIGHT - BOTTOM + 14, compact(tick), "middle"))
    parts.append(segment("axis", LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM))
    parts.append(words("unit", LEFT - 6, 10, unit, "start" if len(unit) > 6 else "end"))
    parts.append(words("unit", WIDTH - RIGHT, HEIGHT - 3, "step", "end"))
    for index, line in enumerate(lines):
        parts += _curve(f"s{index % 6 + 1}", [(at_x(x), None if y is None else at_y(y)) for x, y in line])
    for marker in markers:
        if _known(marker.value) is not None:
            parts += _marker(marker, at_x(x_low if marker.at == "start" else x_high), at_y(marker.value))
    if not ys:
        parts.append(words("empty", WIDTH / 2, HEIGHT / 2, "no finite values", "middle"))
    return Markup("".join(parts) + "</svg>")


def swatch(index: int) -> Markup:
    """The legend's sample of the line of series `index`, counted from 0."""
    line = segment(f"line s{index % 6 + 1}", 1, 4, 21, 4)
    return Markup(f'<svg class="swatch" viewBox="0 0 22 8" aria-hidden="true">{line}</svg>')


def _known(value: float | None) -> float | None:
    return float(value) if value is not None and abs(value) < _LARGEST else None


def _domain(values: Sequence[float], margin: float) -> tuple[float, float]:
    """An interval of positive width around the values, with a share `margin` of it on each side."""
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    if high - low <= max(abs(low), abs(high)) * 1e-9 or high - low < 1e-290:
        pad = abs(low) * 0.1 if abs(low) > 1e-280 else 1.0
        return low - pad, high + pad
    pad = (high - low) * margin
    # A quantity that never goes below 0 gets an axis that does not either.
    return (0.0 if low >= 0 > low - pad else low - pad), high + pad


def _with_band(values: list[float], band: tuple[float | None, float | None] | None) -> list[float]:
    """The values, and those ends of the band that stand near enough not to flatten the line."""
    if not band or not values:
        return values
    low, high = _domain(values, 0.0)
    room = high - low
    return values + [edge for edge in band if edge is not None and low - room <= edge <= high + room]


def _whole_ticks(low: float, high: float, xs: Sequence[float]) -> list[float]:
    if len(set(xs)) < 2:
        return sorted(set(xs))
    return [tick for tick in nice_ticks(low, high, 5) if tick == round(tick)]


def _curve(kind: str, points: list[tuple[float, float | None]]) -> list[str]:
    """The line, broken at gaps; a point without neighbours, and each point of a short line, is a dot."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is None:
            runs.append([])
        else:
            runs[-1].append((x, y))
    parts = []
    few = len(points) <= 12
    for run in runs:
        if len(run) > 1:
            path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in run)
            parts.append(f'<path class="line {kind}" d="{path}"/>')
        if few or len(run) == 1:
            parts += [f'<circle class="dot {kind}" cx="{x:.1f}" cy="{y:.1f}" r="2.4"/>' for x, y in run]
    return parts


def _marker(marker: Marker, x: float, y: float) -> list[str]:
    anchor, shift = ("start", 8) if marker.at == "start" else ("end", -8)
    text_y = min(max(y - 7, TOP + 4), HEIGHT - BOTTOM - 4)
    return [
        f'<circle class="marker {marker.at}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>',
        words("mark", x + shift, text_y, f"{marker.label} {number(marker.value)}", anchor),
    ]


def segment(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def rect(kind: str, x: float, y: float, width: float, height: float) -> str:
    return f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"/>'


def words(kind: str, x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(clean(text))}</text>'
