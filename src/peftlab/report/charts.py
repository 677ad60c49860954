"""Which curves a run's page draws, which of them share axes, and what stands under each."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from ..runs.metrics import Metric, healthy_text, metric
from . import text
from .read import RunFiles
from .svg import Marker, Series, line_chart, swatch

# Names in one tuple share an axis; a star takes every name that begins so. Metrics in no group follow at the end.
_GROUPS: list[tuple[str, list[tuple[str, ...]]]] = [
    ("What was gained, and its price", [
        ("reward/mean", "eval/reward"), ("eval/judge",), ("reward/part/*",), ("kl/reference", "kl/k3", "eval/kl"),
        ("eval/accuracy", "eval/f1"), ("train/loss", "eval/loss"), ("eval/perplexity",), ("eval/ece",),
        ("eval/rouge1", "eval/rouge2", "eval/rougeL"), ("eval/pair_accuracy",), ("eval/perplexity_ratio",),
    ]),
    ("The policy", [
        ("policy/entropy", "eval/entropy"), ("rollout/length", "eval/length"),
        ("eval/distinct_1", "eval/distinct_2", "eval/self_bleu_4"), ("policy/approx_kl",),
        ("policy/clip_fraction", "value/clip_fraction"), ("policy/loss",), ("policy/grad_norm", "train/grad_norm"),
        ("rollout/eos_fraction", "eval/eos_fraction"), ("reward/std",), ("advantage/mean",), ("advantage/std",),
        ("policy/ratio_error",),
    ]),
    ("The critic", [("value/explained_variance",), ("value/loss",)]),
    ("Schedule and cost", [
        ("train/lr",), ("kl/coef",), ("update/epochs",),
        ("time/step_s", "time/rollout_s", "time/score_s", "time/update_s"),
        ("train/tokens_per_s",), ("memory/peak_bytes",),
    ]),
]
_LEFT_OUT = frozenset({"data/tokens", "data/rows"})  # straight lines


@dataclass(frozen=True)
class Line:
    """One series' legend and definition."""

    name: str
    title: str
    swatch: Markup
    last: str
    definition: str
    healthy: str


@dataclass(frozen=True)
class Chart:
    """A figure of the page."""

    title: str
    unit: str
    now: str
    svg: Markup
    lines: list[Line]


def chart_groups(run: RunFiles) -> tuple[list[tuple[str, list[Chart]]], list[tuple[str, Metric, str]]]:
    """The titled groups of charts, and (name, entry, value) of the metrics that never changed."""
    left = {name: points for name, points in run.columns.items() if name not in _LEFT_OUT}
    constants = []
    for name, points in list(left.items()):
        values = {value for _, value in points}
        if len(points) > 1 and len(values) == 1 and None not in values:
            constants.append((name, _entry(name), text.number(points[0][1], _entry(name).unit)))
            del left[name]
    groups = []
    for heading, members in _GROUPS:
        charts = []
        for names in _sharing(members, left):
            present = [name for name in names if name in left]
            if present:
                charts.append(_chart(run, present))
                for name in present:
                    del left[name]
        if charts:
            groups.append((heading, charts))
    if left:
        groups.append(("Further figures", [_chart(run, [name]) for name in left]))
    return groups, constants


def _sharing(members: list[tuple[str, ...]], left: dict[str, list[tuple[float, float | None]]]) -> list[list[str]]:
    """The groups with stars filled in. Proxy reward and judge go on one plot where the reward lies in [0, 1] too."""
    groups = []
    for names in members:
        filled = []
        for name in names:
            filled += [known for known in left if known.startswith(name[:-1])] if name.endswith("*") else [name]
        groups.append(filled)
    reward = [value for _, value in left.get("reward/mean", []) if value is not None]
    if "eval/judge" in left and reward and 0 <= min(reward) and max(reward) <= 1:
        groups = [[*names, "eval/judge"] if "reward/mean" in names else names for names in groups]
    return groups


def _entry(name: str) -> Metric:
    """The registry's entry, or a blank one: a page shows what a newer program wrote, too."""
    try:
        return metric(name)
    except KeyError:
        return Metric(name, "Not in this program's registry.")


def _chart(run: RunFiles, names: list[str]) -> Chart:
    entries = [_entry(name) for name in names]
    unit = entries[0].unit
    bands = {entry.healthy for entry in entries}
    band = bands.pop() if len(bands) == 1 else None
    heading = " and ".join(dict.fromkeys(text.title(name) for name in names)) if len(names) <= 2 else _family(names)
    return Chart(
        title=heading,
        unit=unit,
        now=_now(run.columns[names[0]], unit),
        svg=line_chart(
            [Series(name, run.columns[name]) for name in names], _spoken(heading, run, names), unit, band, _markers(run, names)
        ),
        lines=[
            Line(name, text.title(name), swatch(index), _last(run.columns[name], entry.unit), entry.definition,
                 _healthy(entry, run.columns[name]))
            for index, (name, entry) in enumerate(zip(names, entries, strict=True))
        ],
    )
