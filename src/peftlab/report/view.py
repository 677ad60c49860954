"""All that one page shows of a run, its stages included, ready for the template."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import text
from .alarms import Alarm
from .charts import Chart, Constant, charts_of
from .classifier import ClassifierView, classifier_of
from .figures import Check, Figure, checks_of, figures_of, headline
from .inspector import Inspector, inspector_of
from .read import RunFiles, as_number, read_run, stage_folders
from .recorded import read_recorded
from .reward import RewardView, reward_of
from .samples import Pair, pairs_of
from .watch import alarms_of, in_short

_WHAT = {
    "demo": "The whole lab on real reviews: every stage trains for real and stands beside its own baseline.",
    "pretrain": "A language model learns to predict text, from random weights.",
    "sft": "A LoRA adapter learns to write like the text it reads. The base stays frozen.",
    "classify": "A LoRA adapter and a small head learn to label text. The base stays frozen.",
    "summarize": "An adapter learns to summarize. The base stays frozen.",
    "reward": "A LoRA adapter and a scalar head learn which of two answers is preferred.",
    "dpo": "A LoRA policy learns from pairs of answers, held near its frozen reference.",
    "explanations": "A LoRA adapter learns to say whether a review is positive, and to cite it. The base stays frozen.",
    "ppo": "A LoRA policy learns from a reward by PPO, held near its frozen reference by a KL penalty.",
    "rloo": "A LoRA policy learns from a reward by RLOO, held near its frozen reference by a KL penalty.",
}
_STATUS = {
    "done": ("✓", "Done"),
    "stopped": ("■", "Stopped"),
    "failed": ("✕", "Failed"),
    "running": ("▸", "Running"),
    "killed": ("✕", "Ended without a summary"),
}
_NOT_ENVIRONMENT = frozenset({"data", "schema_version", "run", "recipe", "started"})


@dataclass(frozen=True)
class RunView:
    """One run's section. `slug` begins its anchors; `share` is its part of the demo's time, in percent.

    `title` is the recipe, or the name of a demo's stage, of which two may be of one recipe.
    """

    slug: str
    name: str
    title: str
    recipe: str
    what: str
    status: str
    status_sign: str
    status_text: str
    reason: str
    seconds: str
    share: float
    facts: list[tuple[str, str]]
    headline: list[Figure]
    figures: list[Figure]
    checks: list[Check]
    alarms: list[Alarm]
    chart_groups: list[tuple[str, list[Chart]]]
    constants: list[Constant]
    classifier: ClassifierView | None
    reward: RewardView | None
    pairs: list[Pair]
    other_samples: list[list[tuple[str, str]]]
    sample_rows: int
    inspector: Inspector | None
    data: list[tuple[str, str, str]]
    environment: list[tuple[str, str]]
    events: list[tuple[str, str, str]]
    config_toml: str
    stages: list[RunView]

    @property
    def fired(self) -> str:
        return in_short(self.alarms)

    @property
    def contents(self) -> list[tuple[str, str]]:
        """(anchor, heading) of the sections that this run has."""
        sections = [
            ("figures", "Before and after", self.figures or self.checks),
            ("alarms", self.fired or "Alarms", self.alarms),
            ("curves", "Curves", self.chart_groups),
            ("classifier", "Right and wrong", self.classifier),
            ("reward", "The reward", self.reward),
            ("samples", "Samples", self.pairs or self.other_samples),
            ("rollouts", "Token by token", self.inspector),
            ("details", "Settings and provenance", True),
        ]
        return [(anchor, heading) for anchor, heading, there in sections if there]


def view_run(path: Path, whole: float | None = None) -> RunView:
    """The content for the run folder `path`; `whole` is the time in seconds of its demo, if it is a stage."""
    run = read_run(path)
    seconds = as_number(run.table("time").get("wall_s"))
    stages = [view_run(folder, seconds) for folder in stage_folders(path)]
    status, recipe = str(run.summary["status"]), str(run.summary["recipe"])
    title = run.name.partition("/")[2] or recipe
    sign, status_text = _STATUS.get(status, ("?", status))
    figures = figures_of(run)
    chart_groups, constants = charts_of(run, {f.name for f in figures if f.verdict_text and not f.verdict})
    pairs, others = pairs_of(run.samples)
    recorded = read_recorded(path)
    return RunView(
        slug="".join(char if char.isascii() and char.isalnum() else "-" for char in run.name),
        name=run.name,
        title=title,
        recipe=recipe,
        what=_WHAT.get(title, _WHAT.get(recipe, "")),
        status=status,
        status_sign=sign,
        status_text=status_text,
        reason=str(run.summary.get("reason") or ""),
        seconds=text.seconds(seconds),
        share=round(min(100.0, 100 * seconds / whole), 1) if seconds and whole else 0.0,
        facts=_facts(run),
        headline=headline(run, figures),
        figures=figures,
        checks=checks_of(run),
        alarms=alarms_of(run, recorded.distinct_2),
        chart_groups=chart_groups,
        constants=constants,
        classifier=classifier_of(path),
        reward=reward_of(path),
        pairs=pairs,
        other_samples=others,
        sample_rows=run.sample_rows,
        inspector=inspector_of(path, recorded),
        data=_data(run),
        environment=_environment(run),
        events=_events(run),
        config_toml=run.config_toml,
        stages=stages,
    )


def _facts(run: RunFiles) -> list[tuple[str, str]]:
    config, environment = run.config, run.environment
    keys = ("model", "train_data", "eval_data", "reward", "judge", "device", "dtype", "seed")
    pairs = [(key, environment.get(key, config.get(key))) for key in keys]
    facts = [(key.replace("_", " "), str(value)) for key, value in pairs if value not in (None, "")]
    step_s = as_number(run.table("time").get("step_s"))
    if step_s is not None:
        facts.append(("seconds a step", text.number(step_s)))
    facts.append(("started", _when(environment.get("started"))))
    if environment.get("commit"):
        commit, _, dirty = str(environment["commit"]).partition("-")
        facts.append(("commit", commit[:10] + (", files changed" if dirty else "")))
    return facts


def _when(stamp: Any) -> str:
    try:
        return f"{datetime.datetime.fromisoformat(str(stamp)):%Y-%m-%d %H:%M %Z}".strip()
    except ValueError:
        return text.NONE


def _data(run: RunFiles) -> list[tuple[str, str, str]]:
    """(name, rows, sha256) of each data set that the run read."""
    data = run.environment.get("data")
    return [
        (str(name), text.number(as_number(entry.get("rows"))), str(entry.get("sha256", "")))
        for name, entry in (data.items() if isinstance(data, dict) else ())
        if isinstance(entry, dict)
    ]


def _environment(run: RunFiles) -> list[tuple[str, str]]:
    rows = []
    for key, value in run.environment.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {inner}" for name, inner in value.items())
        elif isinstance(value, list):
            value = " ".join(map(str, value))
        if key not in _NOT_ENVIRONMENT:
            rows.append((str(key), text.NONE if value is None else str(value)))
    return rows


def _events(run: RunFiles) -> list[tuple[str, str, str]]:
    """(time, kind, the other fields in words)."""
    rows = []
    for event in run.events:
        rest = {k: v for k, v in event.items() if k not in ("time", "kind", "packages") and v is not None}
        words = ", ".join(
            f"{key} {value:,}" if isinstance(value, int) else f"{key} {value}" for key, value in rest.items()
        )
        rows.append((str(event.get("time", ""))[:19].replace("T", " "), str(event.get("kind", "")), words))
    return rows
