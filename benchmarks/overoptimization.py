"""Draws docs/pictures/overoptimization.svg from the rows of LOG.md in overoptimization.csv; without arguments."""

import csv
import math
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from peftlab.report.svg import nice_ticks, segment, words
from peftlab.report.text import compact

HERE = Path(__file__).resolve().parent
BEFORE = 0.463  # the judge of the model before PPO
WIDTH, FLOOR, LEFT, TOP = 540, 392, 44, 40  # of a chart, with its margins; FLOOR is where its x axis lies
ACROSS = 68  # pixels to one of the seven units on the x axis
STYLE = """
svg { font: 13px system-ui, sans-serif; background: #fff; --c: #6a665d }
text { fill: #1e1d1a } .tick, .unit { fill: #6a665d } .title { font-size: 15px; font-weight: 600 }
.grid { stroke: #e8e4da } .axis { stroke: #6a665d } .most { stroke: #6a665d; stroke-dasharray: 1.5 3 }
.line { fill: none; stroke: var(--c); stroke-width: 1.8; stroke-linejoin: round } .turned { stroke-dasharray: 6 4 }
.mark { fill: var(--c); stroke: var(--c) } .of5 { fill: #fff; stroke-width: 1.5 }
.p500 { --c: #c25114 } .p2000 { --c: #2467a8 } .p20000 { --c: #1f7f66 }
"""
SHAPES = {"1": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z", "5": "M-4-4h8v8h-8z"}  # by the number of reward models
LEGEND = {
    "500 clean": "500 pairs", "2000 clean": "2,000 pairs", "20000 clean": "20,000 pairs", " clean": "clean labels",
    " turned": "a quarter of the pairs swapped", "1": "one reward model", "5": "the lowest score of five",
}  # fmt: skip


def line(pairs: str, labels: str, at: list[tuple[float, float]]) -> str:
    return f'<path class="line {labels} p{pairs}" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in at)}"/>'


def mark(pairs: str, members: str, x: float, y: float) -> str:
    return f'<path class="mark of{members} p{pairs}" d="{SHAPES[members]}" transform="translate({x:.1f} {y:.1f})"/>'


def chart(left: int, title: str, rows: list[dict[str, str]], gain: str, start: float, high: float) -> list[str]:
    """A curve for each reward model, from (0, 0): what `gain` has above `start`, over the square root of the KL."""
    parts = [words("title", left, TOP - 20, title, "start"), segment("axis", left, FLOOR, left + 7 * ACROSS, FLOOR)]
    parts.append(words("unit", left + 3.5 * ACROSS, FLOOR + 38, "square root of the KL (nats a completion)", "middle"))
    parts += [words("tick", left + n * ACROSS, FLOOR + 18, str(n), "middle") for n in range(8)]
    for y, tick in ((FLOOR - tick / high * (FLOOR - TOP), compact(tick)) for tick in nice_ticks(0, high, 6)):
        parts += [segment("grid", left, y, left + 7 * ACROSS, y), words("tick", left - 8, y + 4, tick, "end")]
    for (pairs, labels, members), own in groupby(rows, itemgetter("pairs", "labels", "members")):
        gains = [(math.sqrt(float(row["kl"])), (float(row[gain]) - start) / high) for row in own]
        at = [(left + x * ACROSS, FLOOR - y * (FLOOR - TOP)) for x, y in gains]
        parts += [line(pairs, labels, [(left, FLOOR), *at]), *(mark(pairs, members, *point) for point in at)]
    return parts


def picture() -> str:
    rows = list(csv.DictReader((HERE / "overoptimization.csv").read_text().splitlines()))
    parts = chart(LEFT, "Judge: gain in probability", rows, "judge", BEFORE, 0.6)
    top = FLOOR - (1 - BEFORE) / 0.6 * (FLOOR - TOP)
    parts.append(segment("most", LEFT, top, LEFT + 7 * ACROSS, top))
    parts.append(words("unit", LEFT + 6, top - 7, "the most there is: a judge of 1", "start"))
    parts += chart(WIDTH + LEFT, "Proxy: gain in its own standard deviations", rows, "proxy_gain", 0.0, 6.5)
    for row, (kind, told) in enumerate(LEGEND.items()):
        x, y = WIDTH + LEFT + 18, TOP + 16 + 20 * row
        pairs, _, labels = kind.partition(" ")
        parts.append(line(pairs, labels, [(x, y), (x + 26, y)]) if labels else mark("", kind, x + 13, y))
        parts.append(words("label", x + 36, y + 4.5, told, "start"))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * WIDTH} {FLOOR + 48}"><style>{STYLE}</style>'
    return "".join([head, *parts, "</svg>\n"])


if __name__ == "__main__":
    (HERE.parent / "docs/pictures/overoptimization.svg").write_text(picture())
