"""Reading what runs left behind."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError, did_you_mean
from .atomic import read_rows
from .checkpoint import CheckpointStore
from .lock import is_locked
from .sanitize import sanitize


def read_summary(path: Path) -> dict[str, Any]:
    """The summary.json of the run folder `path`, or that file itself; UserError where none can be read."""
    file = path if path.name == "summary.json" else path / "summary.json"
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no summary at {file}; the run has not ended, or the path is not a run") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {error}; run the job again under another --run") from None
    if not isinstance(summary, dict) or summary.get("schema_version") != 1:
        raise UserError(f"{file} is not a summary of schema_version 1; was it written by another program?")
    return summary


def read_environment(path: Path) -> dict[str, Any]:
    """The environment.json of the run folder `path`; empty where there is none to read."""
    try:
        environment = json.loads((path / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return environment if isinstance(environment, dict) else {}


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A config's table with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def outcome(path: Path) -> dict[str, Any]:
    """The summary of the run folder `path`, with its "started" time; its texts are safe for a terminal.

    Where there is no summary, the figures are empty and the status is "running", or "killed" once no process
    holds the run.
    """
    environment = read_environment(path)
    blank: dict[str, Any] = {
        "schema_version": 1,
        "recipe": environment.get("recipe", "?"),
        "run": environment.get("run", path.name),
        "status": "killed",
        "reason": "ended without a summary; --resume continues",
        "metrics": {},
        "baseline": {},
        "intervals": {},
        "time": {"wall_s": None, "step_s": None},
        "artifacts": {},
        "started": str(environment.get("started", "")),
    }
    try:
        found = {**blank, "status": "?", "reason": None, **read_summary(path)}
        return {key: sanitize(value) if isinstance(value, str) else value for key, value in found.items()}
    except UserError:
        if is_locked(path):
            blank |= {"status": "running", "reason": None}
    seconds = [row.get("time") or 0.0 for row in read_rows(path / "metrics.jsonl")]
    return {**blank, "time": {"wall_s": max(seconds, default=None), "step_s": None}}


def done_since(path: Path) -> str | None:
    """When the run in `path` ended, by its own log; None where it is not done."""
    if outcome(path)["status"] != "done":
        return None
    ends = [str(event.get("time")) for event in read_rows(path / "events.jsonl") if event.get("kind") == "finish"]
    return minute(ends[-1]) if ends else "?"


def minute(time: str) -> str:
    """A time of the logs, ISO 8601 in UTC, as a person reads it; nothing where there is none."""
    return f"{time[:16].replace('T', ' ')}Z" if time else ""


def list_runs(root: Path) -> list[dict[str, Any]]:
    """`outcome` of every run below `root`, oldest first, each demo followed by its stages."""
    groups = []
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        inner = [outcome(file.parent) for file in folder.glob("*/config.toml")]
        group = [outcome(folder)] if (folder / "config.toml").is_file() else []
        if group + inner:
            groups.append(group + sorted(inner, key=lambda run: str(run["started"])))
    return [run for group in sorted(groups, key=lambda group: str(group[0]["started"])) for run in group]


def ended_runs(root: Path, recipe: str) -> list[tuple[Path, str]]:
    """(folder, status) of the runs of `recipe` right below `root` that have ended, done or with work to go on from.

    Oldest first. A run that ended before it logged a figure or wrote a checkpoint has nothing to go on from.
    """
    found = []
    for file in root.glob("*/config.toml"):
        run = outcome(file.parent)
        stages = [inner.parent for inner in file.parent.glob("*/config.toml")]
        going = run["status"] in ("stopped", "failed", "killed") and any(map(_has_work, [file.parent, *stages]))
        if run["recipe"] == recipe and (going or run["status"] == "done"):
            found.append((str(run["started"]), file.parent, str(run["status"])))
    return [(folder, status) for _, folder, status in sorted(found)]


def _has_work(folder: Path) -> bool:
    logged = next(iter(read_rows(folder / "metrics.jsonl")), None)
    return logged is not None or bool(CheckpointStore(folder / "checkpoints").steps())


def find_run(root: Path, name: str) -> Path:
    """The run folder called `name` below `root`, or the folder `name`; UserError where neither is a run."""
    for folder in (root / name, Path(name)):
        if (folder / "config.toml").is_file():
            return folder
    known = [run["run"] for run in list_runs(root)]
    hint = f"; {near}" if (near := did_you_mean(name, known)) else ""
    raise UserError(f"no run {name!r} below {root}; runs: {', '.join(known) or 'none yet'}{hint}")
