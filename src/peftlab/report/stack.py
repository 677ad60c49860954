"""What each part brings to the reward: its weight times its value, step by step, stacked in one chart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from markupsafe import Markup, escape

from .svg import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, nice_ticks, rect, segment, words
from .text import clean, compact

PART, TOTAL = "reward/part/", "reward/mean"
BARS = 60
COLOURS = 6
ROUNDING = 1e-4  # of the largest contribution; means are float32, and a file may hold fewer figures

Columns = Mapping[str, Sequence[tuple[float, float | None]]]
Points = Sequence[tuple[float, float]]


def contributions(columns: Columns, spec: object) -> dict[str, list[tuple[float, float]]]:
    """Part -> (step, weight * its mean), which add up to reward/mean at every step. Empty where they do not.

    `spec` is the config's reward, such as "imdb-sentiment + 0.5*rubric:length": the log holds the parts unweighted, in
    that order. Weights that do not give the logged reward are no such weights: then nothing is told.
    """
    parts = {name.removeprefix(PART): dict(points) for name, points in columns.items() if name.startswith(PART)}
    weights = _weights(str(spec), len(parts))
    total = {step: value for step, value in columns.get(TOTAL, []) if value is not None}
    if not total or not parts or len(weights) != len(parts):
        return {}
    brought = {
        name: [(step, weight * value) for step in total if (value := part.get(step)) is not None]
        for (name, part), weight in zip(parts.items(), weights, strict=True)
    }
    if any(len(points) < len(total) for points in brought.values()):
        return {}
    largest = max(abs(value) for points in brought.values() for _, value in points)
    sums = [sum(value for _, value in bar) for bar in zip(*brought.values(), strict=True)]
    apart = max(abs(found - wanted) for found, wanted in zip(sums, total.values(), strict=True))
    return brought if apart <= ROUNDING * max(1.0, largest) else {}


def stack_chart(parts: Mapping[str, Points], label: str) -> Markup:
    """Bars over steps: what is above 0 piles up from there, what is below piles down; a line is their sum.

    `parts` have the same steps, one at least. More than BARS steps are averaged.
    """
    steps = [step for step, _ in next(iter(parts.values()))]
    cuts = [round(at * len(steps) / min(BARS, len(steps))) for at in range(min(BARS, len(steps)) + 1)]
    spans = list(zip(cuts, cuts[1:], strict=False))
    bars = [[sum(v for _, v in points[a:b]) / (b - a) for points in parts.values()] for a, b in spans]
    name = escape(clean(label))
    head = f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}"><title>{name}</title>'
    return Markup(head + "".join(_drawn(bars, [steps[a] for a, _ in spans])) + "</svg>")


def block(index: int) -> Markup:
    """The legend's sample of part `index`, counted from 0."""
    return _sample(rect(_pile(index), 1, 0, 20, 8))


def total_line() -> Markup:
    """The legend's sample of the sum."""
    return _sample(segment("line total", 1, 4, 21, 4))


def _weights(spec: str, count: int) -> list[float]:
    """The weight of each of `count` logged parts; empty where the line does not tell.

    A function may have returned several parts, which its one weight is for; two such functions cannot be told apart.
    """
    terms = [piece.rpartition("*") for piece in spec.split("+")]
    functions = [":" in name and not name.strip().startswith("rubric:") for *_, name in terms]
    more = count - len(terms)
    if more < 0 or more and sum(functions) != 1:
        return []
    try:
        weights = [float(number or 1) for number, *_ in terms]
    except ValueError:
        return []
    return [w for w, function in zip(weights, functions, strict=True) for _ in range(1 + more * function)]


def _drawn(bars: Sequence[Sequence[float]], steps: Sequence[float]) -> list[str]:
    """Grid, bars, the line of their sums, and axes."""
    low = min(0.0, *(sum(value for value in bar if value < 0) for bar in bars))
    high = max(0.0, *(sum(value for value in bar if value > 0) for bar in bars))
    low, high = (1.06 * low, 1.06 * high) if high > low else (-1.0, 1.0)
    room = (WIDTH - LEFT - RIGHT) / len(bars)

    def at_y(y: float) -> float:
        return HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    drawn = []
    for tick in nice_ticks(low, high):
        drawn.append(segment("grid", LEFT, at_y(tick), WIDTH - RIGHT, at_y(tick)))
        drawn.append(words("tick", LEFT - 6, at_y(tick) + 3.5, compact(tick), "end"))
    totals = []
    for place, bar in enumerate(bars):
        left, up, down = LEFT + place * room, 0.0, 0.0
        for index, value in enumerate(bar):
            base = up if value > 0 else down
            top, bottom = at_y(max(base, base + value)), at_y(min(base, base + value))
            if bottom - top >= 0.05:
                drawn.append(rect(_pile(index), left + 0.08 * room, top, 0.84 * room, bottom - top))
            up, down = (up + value, down) if value > 0 else (up, down + value)
        totals.append((left + room / 2, at_y(up + down)))
    drawn.append(f'<path class="line total" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in totals)}"/>')
    drawn += [f'<circle class="dot total" cx="{x:.1f}" cy="{y:.1f}" r="1.8"/>' for x, y in totals]
    drawn.append(segment("axis", LEFT, at_y(0), WIDTH - RIGHT, at_y(0)))
    for place in range(0, len(bars), -(-len(bars) // 6)):
        middle = LEFT + (place + 0.5) * room
        drawn.append(words("tick", middle, HEIGHT - BOTTOM + 14, compact(steps[place]), "middle"))
    return [*drawn, words("unit", WIDTH - RIGHT, HEIGHT - 3, "step", "end")]


def _pile(index: int) -> str:
    """A seventh part bears the first one's colour, paler."""
    return f"pile s{index % COLOURS + 1}" + (" pale" if index >= COLOURS else "")


def _sample(drawn: str) -> Markup:
    return Markup(f'<svg class="swatch" viewBox="0 0 22 8" aria-hidden="true">{drawn}</svg>')
