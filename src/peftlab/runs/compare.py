"""Two runs beside each other: the keys of their configs that differ, and their figures."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .metrics import EVALUATION
from .summary import flat, outcome


def diff_runs(one: Path, other: Path) -> dict[str, Any]:
    """{"runs": two names, "config": rows of key, a, b that differ, "metrics": rows of metric, a, b, their intervals}.

    A key that a config lacks, and a figure that a run did not measure, is None. Runs still under way have no figures.
    """
    runs = [outcome(folder) for folder in (one, other)]
    runs = [run | {"metrics": measured(run)} for run in runs]
    configs = [read_config(folder) for folder in (one, other)]
    keys = [*configs[0], *(key for key in configs[1] if key not in configs[0])]
    names = [*runs[0]["metrics"], *(name for name in runs[1]["metrics"] if name not in runs[0]["metrics"])]
    return {
        "runs": [{key: run[key] for key in ("run", "recipe", "status")} for run in runs],
        "config": [
            {"key": key, "a": configs[0].get(key), "b": configs[1].get(key)}
            for key in keys
            if configs[0].get(key) != configs[1].get(key)
        ],
        "metrics": [
            {"metric": name}
            | {side: run["metrics"].get(name) for side, run in zip("ab", runs, strict=True)}
            | {f"interval_{side}": run["intervals"].get(name) for side, run in zip("ab", runs, strict=True)}
            for name in names
        ],
    }


def measured(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a summary. Of a run that ended early none of the evaluation counts: the last one in its log is of
    the model before the job."""
    figures, done = summary["metrics"], summary["status"] == "done"
    return {name: value for name, value in figures.items() if done or not name.startswith(EVALUATION)}


def read_config(folder: Path) -> dict[str, Any]:
    """The config with dotted keys; empty where it cannot be read."""
    try:
        table = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return flat(table)
