"""The table before -> after: each figure beside its baseline, with its interval and a verdict in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..runs.metrics import METRICS, Metric
from . import text
from .charts import entry_of
from .classifier import chance_error
from .read import RunFiles, as_number

# The figures that say whether the job was done, then what it cost.
_HEADLINE = {
    "classify": ("eval/accuracy", "eval/f1", "eval/ece"),
    "pretrain": ("eval/perplexity",),
    "sft": ("rubric/label", "rubric/evidence", "eval/perplexity"),
    "summarize": ("eval/rougeL", "compare/rougeL", "eval/rouge1", "eval/rouge2"),
    "reward": ("eval/pair_accuracy", "eval/ece"),
}
_HEADLINE_RL = ("eval/judge", "eval/kl", "eval/perplexity_ratio", "eval/distinct_2")
_JUDGED_TASK = "continuation"  # what an answer is worth is the judge's to say; elsewhere the reward alone says it
_COSTS = frozenset(
    {"eval/kl"}
)  # 0 before by definition: a price to weigh against the gain, not a loss of quality


CALIBRATION = "eval/ece"


@dataclass(frozen=True)
class Figure:
    """One row. `verdict` is better, worse, healthy, unhealthy, cost or empty; `verdict_text` its words."""

    name: str
    title: str
    entry: Metric
    before: str
    after: str
    change: str
    interval: str
    verdict: str
    verdict_text: str
    direction: str


@dataclass(frozen=True)
class Check:
    """One invariant. `holds` is None where the limit depends on the precision; the run has checked that."""

    name: str
    value: str
    entry: Metric
    holds: bool | None


def figures_of(run: RunFiles) -> list[Figure]:
    """Every figure of the summary, as the registry orders them; those with a baseline if it ended early."""
    after, before = run.table("metrics"), run.table("baseline")
    names = [name for name in {**after, **before} if not name.startswith("invariant/")]
    if run.summary["status"] != "done":  # its last logged values are on the charts already
        names = [name for name in names if name in before]
    order = {name: index for index, name in enumerate(METRICS)}
    names.sort(key=lambda name: order.get(entry_of(name).name, len(order)))
    intervals = run.table("intervals")
    chance = chance_error(run.path)
    return [
        _figure(name, as_number(before.get(name)), as_number(after.get(name)), intervals.get(name), chance)
        for name in names
    ]


def headline(run: RunFiles, figures: list[Figure]) -> list[Figure]:
    """The few figures to read first."""
    wanted = _HEADLINE.get(run.summary["recipe"], _HEADLINE_RL)
    if wanted is _HEADLINE_RL and run.config.get("task", _JUDGED_TASK) != _JUDGED_TASK:
        wanted = (wanted[0], "eval/reward", *wanted[1:])
    chosen = [figure for name in wanted for figure in figures if figure.name == name]
    return chosen or figures[:3]


def checks_of(run: RunFiles) -> list[Check]:
    """The run's invariants."""
    checks = []
    for name, raw in run.table("metrics").items():
        if name.startswith("invariant/"):
            entry, value = entry_of(name), as_number(raw)
            holds = None
            if value is not None and entry.limit is not None:
                holds = True if value <= entry.limit else False if entry.limit == 0 else None
            checks.append(Check(name, text.number(value), entry, holds))
    return checks


def _figure(
    name: str, before: float | None, after: float | None, interval: Any, chance: tuple[int, float]
) -> Figure:
    entry = entry_of(name)
    low, high = (
        map(as_number, interval) if isinstance(interval, list) and len(interval) == 2 else (None, None)
    )
    verdict, words = _verdict(entry, before, after, (low, high), chance)
    return Figure(
        name=name,
        title=text.title(name),
        entry=entry,
        before=text.number(before, entry.unit),
        after=text.number(after, entry.unit),
        change=text.signed(after - before) if before is not None and after is not None else "",
        interval="" if low is None or high is None else f"{text.number(low)} to {text.number(high)}",
        verdict=verdict,
        verdict_text=words,
        direction=text.direction(entry),
    )


def _verdict(
    entry: Metric,
    before: float | None,
    after: float | None,
    interval: tuple[float | None, float | None],
    chance: tuple[int, float],
) -> tuple[str, str]:
    """A verdict and its words. `chance`: rows of the calibration error, and what chance alone can make it."""
    if after is None:
        return "", ""
    if entry.name in _COSTS:
        return "cost", "the price paid"
    told = before is not None and before != after and entry.better is not None
    better = before is not None and told and (after > before) == (entry.better == "higher")
    if entry.healthy is not None:
        low, high = entry.healthy
        inside = (low is None or after >= low) and (high is None or after <= high)
        if inside:
            return "healthy", "in the healthy range"
        # Gaps are averaged without their sign, so chance adds at most its own error to that of the model.
        if entry.name == CALIBRATION and high is not None and after <= high + chance[1]:
            return "", f"{chance[0]} rows are too few to tell: chance alone adds up to {text.number(chance[1])}"
        if better:
            return "", "better, yet outside the healthy range"
        return "unhealthy", "outside the healthy range"
    if before is None or not told:
        return "", ""
    if None not in interval and interval[0] <= before <= interval[1]:  # type: ignore[operator]
        return "", "before lies in the interval"
    return ("better", "better") if better else ("worse", "worse")
