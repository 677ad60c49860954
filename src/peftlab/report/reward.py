"""A reward model's own figures: how its scores part the answers, how far they may be trusted, and where they fail."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from . import text
from .classifier import bin_rows, bins_of, reliability_chart
from .svg import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, nice_ticks, rect, segment, words

SIDES = (("chosen", "s1"), ("rejected", "s2"))


@dataclass(frozen=True)
class WrongPair:
    """A pair whose rejected answer won; `scores` are raw, `probability` that of the chosen answer."""

    name: str
    prompt: str
    chosen: str
    rejected: str
    scores: tuple[str, str]
    probability: str


@dataclass(frozen=True)
class RewardView:
    """`histograms`: (when, chart). `agreement`: (part, pairs, share of the model, share of the data's preferences)."""

    histograms: list[tuple[str, Markup]]
    reliability: Markup
    bins: list[tuple[str, str, str, str]]
    agreement: list[tuple[str, str, str, str]]
    wrong: list[WrongPair]


def reward_of(path: Path) -> RewardView | None:
    """What `reward.json` in a run folder says; None where there is none, or none that can be read."""
    try:
        tables: Any = json.loads((path / "reward.json").read_text(encoding="utf-8"))
        bins = bins_of(tables["reliability"])
        return RewardView(
            [(f"{when.capitalize()} training", histogram_chart(when, *_counts(tables["histogram"][when])))
             for when in ("before", "after")],
            reliability_chart(bins),
            bin_rows(bins),
            [(str(row["part"]), f"{int(row['pairs']):,}", _percent(row["model"]), _percent(row["preferences"]))
             for row in tables["agreement"]],
            [_wrong(row) for row in tables["wrong"]],
        )
    except (OSError, ValueError, KeyError, TypeError, IndexError, OverflowError):
        return None


def histogram_chart(when: str, edges: list[float], counts: dict[str, list[int]]) -> Markup:
    """Two outlines over one axis: how many chosen and how many rejected answers have which score."""
    most = max(1, *(n for side in counts.values() for n in side))

    def at_x(x: float) -> float:
        return LEFT + (x - edges[0]) / (edges[-1] - edges[0]) * (WIDTH - LEFT - RIGHT)

    def at_y(y: float) -> float:
        return HEIGHT - BOTTOM - y / most * (HEIGHT - TOP - BOTTOM)

    spoken = f"Scores {when} training, in standard deviations. " + "; ".join(
        f"{side} answers: mean {_mean(edges, counts[side]):.2f}" for side, _ in SIDES
    )
    parts = [f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(spoken)}">']
    for tick in nice_ticks(0, most):
        if tick == round(tick):
            parts.append(segment("grid", LEFT, at_y(tick), WIDTH - RIGHT, at_y(tick)))
            parts.append(words("tick", LEFT - 6, at_y(tick) + 3.5, text.compact(tick), "end"))
    for tick in nice_ticks(edges[0], edges[-1], 8):
        parts.append(words("tick", at_x(tick), HEIGHT - BOTTOM + 14, text.compact(tick), "middle"))
    for side, ink in SIDES:
        bars = list(zip(edges, edges[1:], counts[side], strict=False))
        parts += [rect(f"bar-{ink}", at_x(a), at_y(n), at_x(b) - at_x(a), at_y(0) - at_y(n)) for a, b, n in bars if n]
        steps = "L".join(f"{at_x(a):.1f} {at_y(n):.1f}L{at_x(b):.1f} {at_y(n):.1f}" for a, b, n in bars)
        parts.append(f'<path class="line {ink}" d="M{steps}"/>')
    parts.append(segment("axis", LEFT, at_y(0), WIDTH - RIGHT, at_y(0)))
    parts.append(words("unit", LEFT - 6, 10, "answers", "start"))
    parts.append(words("unit", WIDTH - RIGHT, HEIGHT - 3, "score, in standard deviations", "end"))
    return Markup("".join(parts) + "</svg>")


def _counts(table: Any) -> tuple[list[float], dict[str, list[int]]]:
    """Raises ValueError unless edges ascend and each side has a count between every two of them."""
    edges = [float(edge) for edge in table["edges"]]
    counts = {side: [int(n) for n in table[side]] for side, _ in SIDES}
    fits = all(len(side) == len(edges) - 1 and min(side, default=-1) >= 0 for side in counts.values())
    if not (fits and all(a < b for a, b in zip(edges, edges[1:], strict=False)) and all(map(math.isfinite, edges))):
        raise ValueError("no histogram")
    return edges, counts


def _mean(edges: list[float], counts: list[int]) -> float:
    middles = [(a + b) / 2 for a, b in zip(edges, edges[1:], strict=False)]
    return sum(m * n for m, n in zip(middles, counts, strict=True)) / max(1, sum(counts))


def _percent(share: Any) -> str:
    return f"{100 * float(share):.1f}%"


def _wrong(row: Any) -> WrongPair:
    chosen, rejected = (text.fixed(float(score), 2, plus=True) for score in row["scores"])
    name, prompt, better, worse = (str(row[key]) for key in ("id", "prompt", "chosen", "rejected"))
    return WrongPair(name, prompt, better, worse, (chosen, rejected), _percent(row["probability"]))
