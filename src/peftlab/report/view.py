"""From a run's records to what the template lays out: figures, charts, samples, rollouts. No markup is made here."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ..runs.metrics import METRICS, Metric, healthy_text, metric
from . import text
from .charts import Chart, chart_groups
from .read import RunFiles, read_run, stage_folders

SHOWN_SAMPLES = 6
MOST_TOKENS = 256
_WHAT = {
    "demo": "The whole lab on real reviews, stage by stage, each trained for real and measured beside its baseline.",
    "pretrain": "A language model learns to predict text, from random weights.",
    "sft": "A LoRA adapter learns to write like the text it reads; the base stays frozen.",
    "classify": "A LoRA adapter and a small head learn to label text; the base stays frozen.",
    "summarize": "A prefix, or a LoRA adapter, learns to summarize; the base stays frozen.",
    "reward": "A LoRA adapter and a scalar head learn which of two answers people prefer.",
    "dpo": "A LoRA policy learns straight from pairs of answers, held near its reference.",
    "ppo": "A LoRA policy learns from a reward by PPO, held near its reference by a KL penalty. Only adapters learn.",
    "rloo": "A LoRA policy learns from a reward by RLOO, held near its reference by a KL penalty. Only adapters learn.",
}
_HEADLINE = {  # the figure that says whether the job was done; then what it cost
    "classify": ("eval/accuracy", "eval/ece"),
    "pretrain": ("eval/perplexity",),
    "sft": ("eval/perplexity",),
    "summarize": ("eval/rougeL",),
    "reward": ("eval/pair_accuracy",),
}
_HEADLINE_RL = ("eval/judge", "eval/reward", "eval/kl", "eval/perplexity_ratio", "eval/distinct_2")
_COSTS = frozenset({"eval/kl"})  # the baseline is 0 by definition: a cost to weigh, not a loss of quality
_STATUS = {
    "done": ("✓", "Done"), "stopped": ("■", "Stopped"), "failed": ("✕", "Failed"),
    "running": ("▸", "Running"), "killed": ("✕", "Ended without a summary"),
}


@dataclass(frozen=True)
class Figure:
    """One row of the table before -> after. `verdict` is "better", "worse", "healthy", "unhealthy", "cost" or ""."""

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
    """One invariant: `holds` is None where the registry's limit alone cannot tell."""

    name: str
    value: str
    entry: Metric
    holds: bool | None


@dataclass(frozen=True)
class RunView:
    """One run's section of the page; `slug` is its anchor."""

    slug: str
    name: str
    recipe: str
    what: str
    status: str
    status_sign: str
    status_text: str
    reason: str
    facts: list[tuple[str, str]]
    headline: list[Figure]
    figures: list[Figure]
    checks: list[Check]
    groups: list[tuple[str, list[Chart]]]
    constants: list[tuple[str, Metric, str]]
    pairs: list[Pair]
    other_samples: list[list[tuple[str, Any]]]
    sample_rows: int
    rollouts: list[tuple[int, list[RolloutView]]]
    rollout_rows: int
    data: list[tuple[str, str, str]]
    environment: list[tuple[str, str]]
    events: list[tuple[str, str, str]]
    config_toml: str
    seconds: str
    stages: list[RunView] = field(default_factory=list)


@dataclass(frozen=True)
class Pair:
    """One prompt with what was written before and after: (side, completion, [(name, value)])."""

    prompt: str
    sides: list[tuple[str, str, list[tuple[str, str]]]]


@dataclass(frozen=True)
class TokenView:
    """One token. `strength` is |advantage| over the rollout's largest, 0 to 1; `sign` is "pos", "neg" or ""."""

    token: Any
    sign: str
    strength: str
    advantage: str
    cells: list[str]


@dataclass(frozen=True)
class RolloutView:
    """One sampled rollout, token by token."""

    prompt_id: str
    prompt: str
    score: str
    parts: list[tuple[str, str]]
    tokens: list[TokenView]
    left_out: int


def view_run(path: Path) -> RunView:
    """The page's content for the run folder `path`, its stages included."""
    run = read_run(path)
    stages = [view_run(folder) for folder in stage_folders(path)]
    sign, status_text = _STATUS.get(run.summary["status"], ("?", str(run.summary["status"])))
    figures = _figures(run)
    wanted = _HEADLINE.get(run.summary["recipe"], _HEADLINE_RL)
    groups, constants = chart_groups(run)
    pairs, others = _samples(run.samples)
    return RunView(
        slug="run-" + "".join(char if char.isalnum() else "-" for char in run.name),
        name=run.name,
        recipe=str(run.summary["recipe"]),
        what=_WHAT.get(run.summary["recipe"], ""),
        status=str(run.summary["status"]),
        status_sign=sign,
        status_text=status_text,
        reason=str(run.summary.get("reason") or ""),
        facts=_facts(run),
        headline=[figure for name in wanted for figure in figures if figure.name == name][:4],
        figures=figures,
        checks=_checks(run),
        groups=groups,
        constants=constants,
        pairs=pairs,
        other_samples=others,
        sample_rows=run.sample_rows,
        rollouts=[(step, [_rollout(row) for row in rows]) for step, rows in sorted(run.rollouts.items())],
        rollout_rows=run.rollout_rows,
        data=_data(run),
        environment=_environment(run),
        events=_events(run),
        config_toml=run.config_toml,
        seconds=text.seconds(_number((run.summary.get("time") or {}).get("wall_s"))),
        stages=stages,
    )


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _known(name: str) -> Metric:
    """The registry's entry, or a blank one: a report shows what a newer program wrote, too."""
    try:
        return metric(name)
    except KeyError:
        return Metric(name, "")


def _figures(run: RunFiles) -> list[Figure]:
    after, before = run.summary.get("metrics") or {}, run.summary.get("baseline") or {}
    names = [name for name in dict.fromkeys((*after, *before)) if not name.startswith("invariant/")]
    if run.summary["status"] != "done":  # the last logged values are on the charts already
        names = [name for name in names if name in before]
    order = {name: index for index, name in enumerate(METRICS)}
    names.sort(key=lambda name: order.get(_known(name).name, len(order)))
    intervals = run.summary.get("intervals") or {}
    return [_figure(name, _number(before.get(name)), _number(after.get(name)), intervals.get(name)) for name in names]


def _figure(name: str, before: float | None, after: float | None, interval: Any) -> Figure:
    entry = _known(name)
    bounds = [_number(end) for end in interval] if isinstance(interval, list) and len(interval) == 2 else []
    low, high = bounds or (None, None)
    verdict, words = _verdict(entry, before, after, low, high)
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
    entry: Metric, before: float | None, after: float | None, low: float | None, high: float | None
) -> tuple[str, str]:
    if after is None:
        return "", ""
    if entry.healthy is not None and entry.healthy != (0, None):
        floor, ceiling = entry.healthy
        inside = (floor is None or after >= floor) and (ceiling is None or after <= ceiling)
        return ("healthy", "within") if inside else ("unhealthy", "outside")
    if entry.name in _COSTS:
        return "cost", "the price"
    if before is None or before == after or entry.better is None:
        return "", ""
    if low is not None and high is not None and low <= before <= high:
        return "", "within the interval"
    return ("better", "better") if (after > before) == (entry.better == "higher") else ("worse", "worse")


def _checks(run: RunFiles) -> list[Check]:
    checks = []
    for name, raw in (run.summary.get("metrics") or {}).items():
        if name.startswith("invariant/"):
            entry, value = _known(name), _number(raw)
            holds = None if value is None or entry.limit is None else value <= entry.limit or None
            if name == "invariant/first_kl" and value is not None:
                holds = value == 0.0
            checks.append(Check(name, text.number(value), entry, holds))
    return checks


def _facts(run: RunFiles) -> list[tuple[str, str]]:
    config, environment = run.config, run.environment
    facts = [(key, str(config[key])) for key in ("model", "train_data", "eval_data", "reward", "judge") if config.get(key)]
    for key in ("device", "dtype"):
        if environment.get(key) or config.get(key):
            facts.append((key, str(environment.get(key) or config[key])))
    if "seed" in config:
        facts.append(("seed", str(config["seed"])))
    times = run.summary.get("time") or {}
    facts.append(("time", text.seconds(_number(times.get("wall_s")))))
    if _number(times.get("step_s")) is not None:
        facts.append(("a step", text.seconds(_number(times["step_s"]))))
    facts.append(("started", _when(environment.get("started"))))
    if environment.get("commit"):
        commit, _, dirty = str(environment["commit"]).partition("-")
        facts.append(("commit", commit[:10] + (" with local changes" if dirty else "")))
    return [(key.replace("_", " "), value) for key, value in facts]


def _when(stamp: Any) -> str:
    try:
        return datetime.datetime.fromisoformat(str(stamp)).strftime("%Y-%m-%d %H:%M %Z").strip()
    except ValueError:
        return text.NONE


def _data(run: RunFiles) -> list[tuple[str, str, str]]:
    data = run.environment.get("data")
    entries = data.items() if isinstance(data, dict) else ()
    return [
        (name, text.number(_number(entry.get("rows"))), str(entry.get("sha256", "")))
        for name, entry in entries
        if isinstance(entry, dict)
    ]


def _environment(run: RunFiles) -> list[tuple[str, str]]:
    rows = []
    for key, value in run.environment.items():
        if key in ("data", "schema_version", "run", "recipe", "started"):
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{name} {inner}" for name, inner in value.items())
        elif isinstance(value, list):
            value = " ".join(map(str, value))
        rows.append((key, text.NONE if value is None else str(value)))
    return rows


def _events(run: RunFiles) -> list[tuple[str, str, str]]:
    rows = []
    for event in run.events:
        rest = {key: value for key, value in event.items() if key not in ("time", "kind", "packages") and value is not None}
        detail = ", ".join(f"{key} {value}" for key, value in rest.items())
        rows.append((str(event.get("time", ""))[:19].replace("T", " "), str(event.get("kind", "")), detail))
    return rows


def _samples(rows: list[dict[str, Any]]) -> tuple[list[Pair], list[list[tuple[str, Any]]]]:
    """Rows with a side, paired by prompt; any other rows as lists of (key, value)."""
    paired: dict[str, dict[str, dict[str, Any]]] = {}
    others = []
    for row in rows:
        if row.get("side") in ("before", "after") and "completion" in row:
            paired.setdefault(str(row.get("prompt_id")), {})[row["side"]] = row
        else:
            others.append([(str(key), _cell(value)) for key, value in row.items()])
    pairs = []
    for sides in paired.values():
        shown = [
            (side, str(sides[side]["completion"]), _measures(sides[side])) for side in ("before", "after") if side in sides
        ]
        pairs.append(Pair(str(next(iter(sides.values())).get("prompt", "")), shown))
    return pairs, others


def _cell(value: Any) -> str:
    plain = _number(value)
    return text.number(plain) if isinstance(value, float) else str(value if plain is None else value)


def _measures(row: dict[str, Any]) -> list[tuple[str, str]]:
    skip = ("prompt_id", "side", "prompt", "completion")
    numbers = ((key, _number(value)) for key, value in row.items() if key not in skip)
    return [(key, text.number(value)) for key, value in numbers if value is not None]


def _rollout(row: dict[str, Any]) -> RolloutView:
    tokens = [token for token in row.get("tokens") or [] if isinstance(token, dict)]
    shown = tokens[:MOST_TOKENS]
    largest = max((abs(_number(token.get("advantage")) or 0.0) for token in shown), default=0.0)
    parts = row.get("score_parts")
    return RolloutView(
        prompt_id=str(row.get("prompt_id", "")),
        prompt=str(row.get("prompt", "")),
        score=text.signed(_number(row.get("score"))),
        parts=[(str(n), text.signed(_number(v))) for n, v in parts.items()] if isinstance(parts, dict) else [],
        tokens=[_token(token, largest) for token in shown],
        left_out=len(tokens) - len(shown),
    )


def _token(token: dict[str, Any], largest: float) -> TokenView:
    values = {key: _number(token.get(key)) for key in ("logprob", "ref_logprob", "kl", "value", "reward", "advantage")}
    advantage = values["advantage"]
    return TokenView(
        token=token.get("token", ""),
        sign="" if not advantage else "pos" if advantage > 0 else "neg",
        strength=f"{abs(advantage) / largest:.2f}" if advantage and largest else "0",
        advantage="" if advantage is None else f"{advantage:+.2f}".replace("-", "−"),
        cells=[text.NONE if v is None else f"{v:+.3f}".replace("-", "−") if k in ("kl", "reward", "advantage")
               else f"{v:.3f}".replace("-", "−") for k, v in values.items()],
    )


__all__ = ["Markup", "RunView", "healthy_text", "view_run"]
