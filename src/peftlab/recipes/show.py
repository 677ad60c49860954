"""`peftlab runs show`: one run in short, and what to type next. No torch."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from ..config import to_toml
from ..report.read import RunFiles, read_run, stage_folders
from ..report.recorded import read_recorded
from ..report.watch import alarms_of, in_short
from ..runs.compare import measured, read_config
from ..runs.lock import LOCK
from ..runs.panel import FIGURES
from ..runs.rundir import find_run, vacant
from ..runs.summary import flat
from ..runs.typed import resuming, typed
from . import RECIPES
from .declared import declared

# The verb that uses what a recipe trained, and the options that it takes.
PREDICT = ("predict", "--text", "A lovely, lovely film.")
USES: dict[str, tuple[str, ...]] = {
    "classify": PREDICT, "summarize": PREDICT, "reward": ("predict", "--input", "answers.jsonl"),
    **dict.fromkeys(("sft", "ppo", "rloo", "dpo"), ("chat",)),
}  # fmt: skip
PREFIX = "prefix-full"  # the lab's own, which other programs do not read
LEFT = {"adapter": "adapter", "model": "merged"}  # what a run left, and as what it is exported


def show_run(root: Path, name: str) -> dict[str, Any]:
    """The summary of the run `name` below `root` or in the folder `name`, as far as it was measured, and more of it:

    step     the last one that was logged, None before the first
    config   the keys that differ from the recipe's defaults
    alarms   how many of a policy's fired, in words
    files    what is in its `folder`
    next     commands to type; a resume needs to be launched in as many `processes` as the run began in
    """
    path = find_run(root, name)
    run = read_run(path)
    called = path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
    return {
        **run.summary,
        "metrics": measured(run.summary) or _last(run),
        "step": max((points[-1][0] for points in run.columns.values()), default=None),
        "config": _chosen(run.summary["recipe"], read_config(path)),
        "alarms": in_short(alarms_of(run, read_recorded(path).distinct_2)),
        "folder": str(path),
        "files": sorted(entry.name + "/" * entry.is_dir() for entry in path.iterdir() if entry.name != LOCK),
        "processes": run.environment.get("processes", 1),
        "next": _next(run, called, path.parent.resolve().is_relative_to(root.resolve())),
    }


def _last(run: RunFiles) -> dict[str, float | None]:
    """What a person watches of a run that goes on, as it was logged last."""
    return {name: run.columns[name][-1][1] for name in FIGURES if name in run.columns}


def _chosen(recipe: str, config: dict[str, Any]) -> dict[str, Any]:
    """The keys of a config that differ from its recipe's defaults: what a person chose, so nothing of a demo's."""
    if recipe not in RECIPES:
        return {}
    defaults = flat(tomllib.loads(to_toml(declared(recipe)())))  # as a config's file has them: a list for a tuple
    return {key: value for key, value in config.items() if key != "recipe" and value != defaults.get(key)}


def _next(run: RunFiles, called: str, here: bool) -> list[str]:
    """What to do with a run that is done, or how to go on with one that ended early, if it is one that --run finds."""
    recipe, status = run.summary["recipe"], run.summary["status"]
    if status == "running" or status != "done" and not here:
        return [typed("report", called)]
    if status != "done":
        again = vacant(run.path)  # nothing to go on from
        return [resuming(run.path, recipe, again), *([] if again else [typed("report", called)])]
    if stages := stage_folders(run.path):
        return [typed("runs", "show", f"{called}/{folder.name}") for folder in stages]
    lines: list[tuple[str, ...]] = [("report", called)]
    lines += [("inspect", called)] if (run.path / "rollouts.jsonl").is_file() else []
    form = next((form for inner, form in LEFT.items() if (run.path / inner).is_dir()), None)
    if form:
        verb, *options = USES.get(recipe, ("eval",))
        lines.append((verb, called, *options))
        if run.config.get("method") != PREFIX:
            lines.append(("export", called, "--as", form, "--output", f"{run.path.name}-{form}"))
    return [typed(*line) for line in lines]
