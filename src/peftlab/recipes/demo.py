"""The whole lab on real reviews: classify, SFT, PPO, an independent judge, and one report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..config import Config, load_config, to_toml
from ..errors import Interrupted
from ..report import render
from ..runs.rundir import RunDir
from ..runs.sanitize import sanitize
from . import load
from .launch import free_name

STAGES = ("classify", "sft", "ppo")


class DemoConfig(Config):
    """The demo has no keys of its own: its stages are the shipped configs demo-classify, demo-sft and demo-ppo."""

    recipe: str = "demo"
    stages: tuple[str, ...] = STAGES


def run_demo(root: Path, name: str | None = None, *, resume: bool = False, as_json: bool = False) -> dict[str, Any]:
    """Run the stages in order, each in its own run folder below `root/name`; then table, samples, report."""
    name = name or free_name(root, "demo", resume)
    run = RunDir.create(root, name, "demo", to_toml(DemoConfig()), resume=resume)
    console = Console(stderr=as_json)
    with run.session():
        summary = run.summary if run.finished else _run_stages(run, console, root, resume)
    assert summary is not None
    stages, report = summary["stages"], render(run.path)
    if as_json:
        print(json.dumps(summary, indent=1))
    else:
        console.print(outcome(stages))
        show_samples(console, root / name / "ppo")
        console.print(f"\n{summary['time']['wall_s']:.0f} s. Report: {report}", highlight=False, soft_wrap=True)
        console.print(f"Talk to it: peftlab chat {root / name / 'ppo' / 'adapter'}", highlight=False, soft_wrap=True)
    return summary


def _run_stages(run: RunDir, console: Console, root: Path, resume: bool) -> dict[str, Any]:
    stages: dict[str, Any] = {}
    for stage in STAGES:
        console.rule(stage)
        stages[stage] = _stage(stage, root, run.name, resume)
        if run.stop_requested:  # it came while the stage measured: the stage is done, the demo is not
            raise Interrupted(run.stop_requested)
    ppo = stages["ppo"]
    artifacts = {"report": "report.html", "adapter": "ppo/adapter"}
    return run.finish(ppo["metrics"], ppo["baseline"], ppo["intervals"], artifacts, stages=stages)


def _stage(stage: str, root: Path, name: str, resume: bool) -> dict[str, Any]:
    """One stage. A stage that is done is kept; PPO starts from this demo's own SFT adapter."""
    module = load(stage)
    config = load_config(module.CONFIG, f"demo-{stage}")
    if stage == "ppo":
        config = config.with_(model=str(root / name / "sft" / "adapter"))
    run = RunDir.create(root, f"{name}/{stage}", stage, to_toml(config), resume=resume)
    summary: dict[str, Any] = module.run(config, run)
    render(run.path)
    return summary


def outcome(stages: dict[str, Any]) -> Table:
    """The table that ends the demo: before -> after of every stage."""
    classify, sft, ppo = (stages[stage] for stage in STAGES)
    table = Table(title="what was learned", title_style="bold", show_edge=False, pad_edge=False)
    for column in ("stage", "figure", "before", "after", "seconds"):
        table.add_column(column, justify="left" if column in ("stage", "figure") else "right")
    lines = [
        ("classify", classify, "eval/accuracy", "accuracy on unseen reviews"),
        ("", classify, "compare/accuracy", "the same for the bundled imdb-sentiment"),
        ("sft", sft, "eval/perplexity", "perplexity of unseen openings"),
        ("ppo", ppo, "eval/judge", "p(wanted sentiment), independent judge"),
        ("", ppo, "eval/kl", "KL to the SFT model, nats a completion"),
        ("", ppo, "eval/perplexity_ratio", "perplexity under SFT, ratio"),
        ("", ppo, "eval/distinct_2", "distinct bigrams"),
    ]
    for stage, summary, metric, words in lines:
        before, after = (summary[side].get(metric) for side in ("baseline", "metrics"))
        seconds = f"{summary['time']['wall_s']:.0f}" if stage else ""
        table.add_row(stage, words, _number(before), _number(after), seconds)
    return table


def show_samples(console: Console, folder: Path, count: int = 3) -> None:
    """The same prompts before and after, evenly spread over the evaluation prompts (not picked)."""
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    before = [row for row in rows if row["side"] == "before"]
    after = [row for row in rows if row["side"] == "after"]
    for index in range(0, len(before), max(1, len(before) // count)):
        if count == 0:
            return
        count -= 1
        console.print()
        for side, row in (("before", before[index]), ("after", after[index])):
            line = Text(f"{side:>6} {row['judge']:.2f}  ", style="dim")
            line.append(sanitize(row["prompt"]), style="bold")
            line.append(" ".join(sanitize(row["completion"]).splitlines()), style="default")
            console.print(line)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
