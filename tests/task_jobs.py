"""Jobs of seconds whose prompts and reward are one's own, and what a run leaves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import tiny

from peftlab.recipes.launch import launch
from peftlab.runs.atomic import read_rows
from peftlab.runs.metrics import metric


def keys(shop: Mapping[str, str], verb: str, *pairs: str) -> list[str]:
    """A job of seconds in this workshop, its prompts from the pairs alone."""
    own = [pair for pair in tiny.overrides(shop, verb) if not pair.startswith(("train_data", "eval_data", "prompts="))]
    if verb == "dpo":
        own += [pair.format(**shop) for pair in ("train_data={preferences}", "eval_data={preferences_test}")]
    return [*own, *(pair.format(**shop) for pair in pairs)]


def go(verb: str, given: list[str], runs: Path) -> tuple[dict, Path]:
    """A finished run's summary and folder; every name in it is a metric's."""
    summary = launch(verb, None, given, runs, verb)
    names = summary["metrics"].keys() | summary["baseline"].keys() | summary["intervals"].keys()
    names |= {n for row in read_rows(runs / verb / "metrics.jsonl") for n in row.keys() - {"step", "time"}}
    assert all(metric(name) for name in names)
    assert summary["baseline"].keys() <= summary["metrics"].keys() and summary["status"] == "done"
    assert "</html>" in (runs / verb / "report.html").read_text()
    return summary, runs / verb


def means(run: Path, side: str) -> dict[str, float]:
    """The mean of each number in the samples of one side."""
    rows = [row for row in read_rows(run / "samples.jsonl") if row["side"] == side]
    return {name: float(np.mean([row[name] for row in rows])) for name, v in rows[0].items() if isinstance(v, float)}
