"""Which curves a run's page draws, which of them share axes, and what stands under each."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass

from markupsafe import Markup

from ..runs.metrics import Metric, healthy_text, metric
from . import text
from .read import RunFiles
from .stack import TOTAL, block, contributions, stack_chart, total_line
from .svg import Marker, Series, line_chart, swatch

Points = list[tuple[float, float | None]]

_GAIN = "What was gained, and its price"
# (heading, [(title where several lines share the axis, names)]). A star takes every name that begins so. What
# is in no group follows at the end.
_GROUPS: list[tuple[str, list[tuple[str, tuple[str, ...]]]]] = [
    (
        _GAIN,
        [
            ("Reward", ("reward/mean", "eval/reward")),
            ("", ("eval/judge",)),
            ("Reward parts", ("reward/part/*",)),
            ("KL to the reference", ("kl/reference", "kl/exact", "eval/kl")),
            ("Accuracy and F1", ("eval/accuracy", "eval/f1")),
            ("Loss", ("train/loss", "eval/loss")),
            ("", ("eval/perplexity",)),
            ("", ("eval/ece",)),
            ("ROUGE", ("eval/rouge1", "eval/rouge2", "eval/rougeL")),
            ("Explanations by the rubric", ("rubric/label", "rubric/evidence", "rubric/all")),
            ("Their form", ("rubric/explained", "rubric/length", "rubric/repetition", "rubric/ended")),
            ("Accuracy on pairs", ("eval/pair_accuracy", "eval/ood_pair_accuracy")),
            ("Pairs by margin", tuple(f"eval/pair_accuracy_margin_{third}" for third in ("low", "middle", "high"))),
            ("Pairs by length", tuple(f"eval/pair_accuracy_length_{third}" for third in ("low", "middle", "high"))),
            ("Agreement with the rubric", ("agreement/*",)),
            ("", ("eval/length_correlation",)),
            ("", ("eval/perplexity_ratio",)),
        ],
    ),
    (
        "The policy",
        [
            ("Entropy", ("policy/entropy", "eval/entropy")),
            ("Length", ("rollout/length", "eval/length")),
            ("Diversity", ("eval/distinct_1", "eval/distinct_2", "eval/self_bleu_4")),
            ("Further estimates of the KL", ("kl/k2", "kl/k3")),
            ("", ("policy/approx_kl",)),
            ("Clip fractions", ("policy/clip_fraction", "value/clip_fraction")),
            ("", ("policy/loss",)),
            ("", ("policy/grad_norm",)),
            ("Ended by EOS", ("rollout/eos_fraction", "eval/eos_fraction")),
            ("Spread of the reward", ("reward/std", "reward/group_std")),
            ("", ("advantage/mean",)),
            ("", ("advantage/std",)),
            ("", ("policy/ratio_error",)),
        ],
    ),
    ("The critic", [("", ("value/explained_variance",)), ("", ("value/loss",))]),
    (
        "Schedule and cost",
        [
            ("", ("train/lr",)),
            ("", ("train/grad_norm",)),
            ("", ("kl/coef",)),
            ("", ("update/epochs",)),
            ("Seconds a step", ("time/step_s", "time/rollout_s", "time/score_s", "time/update_s")),
            ("", ("train/tokens_per_s",)),
            ("", ("memory/peak_bytes",)),
        ],
    ),
]


@dataclass(frozen=True)
class Line:
    """One series: its legend, its last value, its definition, and how it kept to its healthy range."""

    name: str
    swatch: Markup
    last: str
    entry: Metric
    healthy: str
    strayed: bool


@dataclass(frozen=True)
class Chart:
    """One drawn figure."""

    title: str
    unit: str
    svg: Markup
    lines: list[Line]


@dataclass(frozen=True)
class Constant:
    """A metric that had one value through the run, and so needs no curve."""

    name: str
    title: str
    value: str
    entry: Metric


def entry_of(name: str) -> Metric:
    """The registry's entry, or a blank one: a page shows what a newer program wrote, too."""
    try:
        return metric(name)
    except KeyError:
        return Metric(name, "This program's registry does not know it.")


def charts_of(run: RunFiles, excused: Container[str] = ()) -> tuple[list[tuple[str, list[Chart]]], list[Constant]]:
    """The charts under their headings, and the metrics that never changed.

    `excused`: what lies outside its healthy range for a reason that the run's table tells, and is not marked again.
    """
    left = dict(run.columns)
    constants = [_constant(name, points) for name, points in left.items() if _is_constant(name, points)]
    for constant in constants:
        del left[constant.name]
    groups: list[tuple[str, list[Chart]]] = []
    for heading, members in _GROUPS:
        charts = []
        for shared_title, names in members:
            present = [name for name in _filled(names, left) if name in left]
            if present:
                charts.append(
                    _chart(run, shared_title if len(present) > 1 else text.title(present[0]), present, excused)
                )
                for name in present:
                    del left[name]
        if heading == _GAIN:
            charts[1:1] = _stack(run)
        if charts:
            groups.append((heading, charts))
    if left:
        groups.append(("Further figures", [_chart(run, text.title(name), [name], excused) for name in left]))
    return groups, constants


def _stack(run: RunFiles) -> list[Chart]:
    """What each of several parts brings to the reward; none where there is one, or their weights cannot be told."""
    parts = contributions(run.columns, run.config.get("reward"))
    if len(parts) < 2:
        return []
    lasts = {name: f"{text.signed(points[-1][1])} at step {points[-1][0]:.0f}" for name, points in parts.items()}
    spoken = "What each part brings to the reward, by step. " + ". ".join(f"{n}: {last}" for n, last in lasts.items())
    told = Metric(TOTAL, "Each part times its weight: above 0 what it adds, below 0 what it takes; the line sums them.")
    lines = [Line(TOTAL, total_line(), _last(run.columns[TOTAL], ""), told, "", False)]
    lines += [
        Line(name, block(index), last, Metric(name, ""), "", False) for index, (name, last) in enumerate(lasts.items())
    ]
    return [Chart("The reward, stacked from its parts", "", stack_chart(parts, spoken), lines)]


def _is_constant(name: str, points: Points) -> bool:
    """Whether one number says it all: an unchanging metric, or a size that is logged once."""
    values = {value for _, value in points}
    once = name.startswith(("data/", "compare/", "eval/temperature"))
    return (len(points) > 1 or once) and len(values) == 1 and None not in values


def _constant(name: str, points: Points) -> Constant:
    entry = entry_of(name)
    return Constant(name, text.title(name), _plain(points[0][1], entry.unit), entry)


def _plain(value: float | None, unit: str) -> str:
    return text.number(value, unit) if value is None or unit == "bytes" else text.compact(value)


def _filled(names: tuple[str, ...], left: Mapping[str, Points]) -> list[str]:
    """The names, stars filled in. A proxy reward within [0, 1], as the judge is, takes the judge along."""
    filled = []
    for name in names:
        filled += [known for known in left if known.startswith(name[:-1])] if name.endswith("*") else [name]
    reward = [value for _, value in left.get("reward/mean", []) if value is not None]
    if "reward/mean" in names and reward and min(reward) >= 0 and max(reward) <= 1:
        filled.append("eval/judge")
    return filled


def _chart(run: RunFiles, title: str, names: list[str], excused: Container[str]) -> Chart:
    entries = [entry_of(name) for name in names]
    bands = {entry.healthy for entry in entries}
    lasts = [_last(run.columns[name], entry.unit) for name, entry in zip(names, entries, strict=True)]
    spoken = f"{title} by step. " + ". ".join(
        f"{name}: {last}" for name, last in zip(names, lasts, strict=True)
    )
    svg = line_chart(
        [Series(name, run.columns[name]) for name in names],
        label=spoken,
        unit=entries[0].unit,
        band=bands.pop() if len(bands) == 1 else None,
        markers=_markers(run, names),
    )
    lines = [
        Line(name, swatch(index), last, entry, *_healthy(entry, run.columns[name], name in excused))
        for index, (name, entry, last) in enumerate(zip(names, entries, lasts, strict=True))
    ]
    return Chart(title, entries[0].unit, svg, lines)


def _last(points: Points, unit: str) -> str:
    step, value = points[-1]
    return f"{text.number(value, unit)} at step {step:.0f}"


def _healthy(entry: Metric, points: Points, excused: bool) -> tuple[str, bool]:
    """The healthy range and how the points kept to it, in words; and whether any strayed without an excuse."""
    if entry.healthy is None:
        return "", False
    low, high = entry.healthy
    known = [value for _, value in points if value is not None]
    outside = sum((low is not None and v < low) or (high is not None and v > high) for v in known)
    kept = "all points inside" if not outside else f"{outside} of {len(known)} points outside"
    return f"Healthy: {healthy_text(entry)}; {kept}.", outside > 0 and not excused


def _markers(run: RunFiles, names: list[str]) -> list[Marker]:
    """The summary's value before and after, for the first of the names that it holds."""
    before, after = run.table("baseline"), run.table("metrics")
    for name in names:
        found = [
            Marker(label, float(values[name]), at)
            for label, values, at in (("before", before, "start"), ("after", after, "end"))
            if isinstance(values.get(name), int | float)
        ]
        if name in before and found:
            return found
    return []
