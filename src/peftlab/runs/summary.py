"""Reading what runs left behind."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftlab.errors import UserError
from peftlab.runs.lock import is_locked


def read_summary(path: Path) -> dict[str, Any]:
    """The summary.json of the run folder `path` (or that file itself); UserError where there is none to read."""
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


@dataclass(frozen=True)
class RunInfo:
    """One line of `peftlab runs`. `status` is that of the summary, or "running" or "killed" where there is none."""

    name: str
    path: Path
    recipe: str
    status: str
    started: str
    summary: dict[str, Any] | None


def run_info(path: Path, name: str) -> RunInfo:
    """The state of the run folder `path`."""
    try:
        environment = json.loads((path / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        environment = {}
    try:
        summary = read_summary(path)
    except UserError:
        summary = None
    status = summary["status"] if summary else "running" if is_locked(path) else "killed"
    return RunInfo(
        name, path, environment.get("recipe", "?"), status, environment.get("started", ""), summary
    )


def list_runs(root: Path) -> list[RunInfo]:
    """Every run below `root`, stages after their demo, oldest first."""
    runs = []
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        if not (folder / "config.toml").is_file():
            continue
        stages = [
            run_info(inner.parent, f"{folder.name}/{inner.parent.name}")
            for inner in folder.glob("*/config.toml")
        ]
        runs.append([run_info(folder, folder.name), *sorted(stages, key=lambda stage: stage.started)])
    return [info for group in sorted(runs, key=lambda group: group[0].started) for info in group]
