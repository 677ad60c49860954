"""The reward-KL frontier as one SVG file: no script, no font, and colours that follow the reader's light or dark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import escape

from .svg import nice_ticks, segment, words
from .text import clean, compact

WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 30, 46
LEGEND_ROW, LEGEND_CHAR = 18, 6.4
# Colours that are told apart by readers who see fewer of them; each run has a shape of its own besides.
_STYLE = """
svg { font: 12px system-ui, sans-serif; background: #fff; color: #1e1d1a }
text { fill: #1e1d1a } .tick, .unit { fill: #6a665d } .unit { font-size: 13px }
.grid { stroke: #e8e4da } .axis { stroke: #6a665d }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round } .whisker { stroke-width: 1.2; stroke-opacity: .55 }
.c0 { stroke: #1e1d1a } .c1 { stroke: #1e1d1a; stroke-dasharray: 7 4 }
.c2 { stroke: #8a857a } .c3 { stroke: #8a857a; stroke-dasharray: 7 4 }
.r0 { --c: #2467a8 } .r1 { --c: #c25114 } .r2 { --c: #1f7f66 }
.r3 { --c: #7d4fa3 } .r4 { --c: #8f6c00 } .r5 { --c: #a8325e }
.whisker, .mark { stroke: var(--c) } .mark { fill: var(--c); stroke-width: 1 }
@media (prefers-color-scheme: dark) {
  svg { background: #161614 } text { fill: #ebe8e0 } .tick, .unit { fill: #a09b8f }
  .grid { stroke: #34332e } .axis { stroke: #a09b8f } .c0, .c1 { stroke: #ebe8e0 } .c2, .c3 { stroke: #a09b8f }
  .r0 { --c: #6db0ec } .r1 { --c: #f2935c } .r2 { --c: #5cc5a4 }
  .r3 { --c: #c29ae0 } .r4 { --c: #d9b548 } .r5 { --c: #f08fb2 }
}
"""
# Square, triangle, diamond, cross, triangle on its tip: five shapes and six colours, so that 30 runs differ.
_SHAPES = (
    "M-4-4h8v8h-8z",
    "M0-5.5L5 4H-5z",
    "M0-5.5L5.5 0L0 5.5L-5.5 0z",
    "M-5-1.6h3.4V-5h3.2v3.4H5v3.2H1.6V5h-3.2V1.6H-5z",
    "M0 5.5L5-4H-5z",
)

Span = tuple[float, float]


@dataclass(frozen=True)
class Cross:
    """Points of one run: (KL, value, the KL's interval, the value's interval) each."""

    label: str
    points: Sequence[tuple[float, float, Span, Span]]


@dataclass(frozen=True)
class Curve:
    """A line of (KL, value)."""

    label: str
    points: Sequence[tuple[float, float]]


def frontier_chart(runs: Sequence[Cross], curves: Sequence[Curve], value: str) -> str:
    """A whole SVG file: KL to the right, `value` upwards, a legend below; points bear 95% whiskers."""
    xs = [x for curve in curves for x, _ in curve.points]
    ys = [y for curve in curves for _, y in curve.points]
    for run in runs:
        xs += [x for kl, _, span, _ in run.points for x in (kl, *span)]
        ys += [y for _, level, _, span in run.points for y in (level, *span)]
    x_low, x_high = _widened(min([*xs, 0.0]), max([*xs, 0.0]), below=False)
    y_low, y_high = _widened(min(ys), max(ys))

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM),
        )

    legend, height = _legend([curve.label for curve in curves], [run.label for run in runs])
    title = escape(clean(f"{value} against KL to the reference: {len(runs)} runs and what the reference could give"))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT + height}" role="img" '
        f'aria-label="{title}"><title>{title}</title><style>{_STYLE}</style>'
    ]
    for tick in nice_ticks(y_low, y_high, 6):
        y = at(0, tick)[1]
        parts += [segment("grid", LEFT, y, WIDTH - RIGHT, y), words("tick", LEFT - 8, y + 4, compact(tick), "end")]
    for tick in nice_ticks(x_low, x_high, 8):
        parts.append(words("tick", at(tick, 0)[0], HEIGHT - BOTTOM + 18, compact(tick), "middle"))
    parts.append(segment("axis", LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM))
    parts.append(words("unit", LEFT - 8, TOP - 12, value, "start"))
    parts.append(words("unit", WIDTH - RIGHT, HEIGHT - 8, "KL to the reference, nats a completion", "end"))
    for index, curve in enumerate(curves):
        path = "L".join("{:.1f} {:.1f}".format(*at(x, y)) for x, y in curve.points)
        parts.append(f'<path class="line c{index % 4}" d="M{path}"/>')
    for index, run in enumerate(runs):
        parts.append(f'<g class="r{index % 6}">')
        for kl, level, kl_span, span in run.points:
            parts.append(segment("whisker", *at(kl_span[0], level), *at(kl_span[1], level)))
            parts.append(segment("whisker", *at(kl, span[0]), *at(kl, span[1])))
        parts += [_mark(index, *at(kl, level)) for kl, level, *_ in run.points] + ["</g>"]
    return "".join([*parts, *legend, "</svg>\n"])


def _mark(index: int, x: float, y: float) -> str:
    shape = _SHAPES[index % len(_SHAPES)]
    return f'<path class="mark" d="{shape}" transform="translate({x:.1f} {y:.1f})"/>'


def _widened(low: float, high: float, below: bool = True) -> Span:
    """A span of positive width with some room at its ends."""
    room = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
    return (low - room if below else low), high + room


def _legend(curves: Sequence[str], runs: Sequence[str]) -> tuple[list[str], int]:
    """Samples with their labels, in rows below the chart, and the height of these rows."""
    parts, x, row = [], float(LEFT), 0
    for number, label in enumerate([*curves, *runs]):
        width = 34 + LEGEND_CHAR * len(label)
        if x > LEFT and x + width > WIDTH - RIGHT:
            x, row = float(LEFT), row + 1
        y = HEIGHT + 8.0 + row * LEGEND_ROW
        if number < len(curves):
            parts.append(segment(f"line c{number % 4}", x, y, x + 22, y))
        else:
            index = number - len(curves)
            parts.append(f'<g class="r{index % 6}">{_mark(index, x + 11, y)}</g>')
        parts.append(words("label", x + 28, y + 4, label, "start"))
        x += width
    return parts, (row + 1) * LEGEND_ROW + 8
