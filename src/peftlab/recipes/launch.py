"""From a verb and a config to a run: what `peftlab sft`, `classify`, `ppo` ... have in common."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ..config import Config, load_config, to_toml
from ..report import render
from ..runs.rundir import RunDir
from . import load


def launch(
    verb: str, source: str | None, overrides: list[str], root: Path, name: str | None = None, resume: bool = False
) -> dict[str, Any]:
    """Resolve the config, open the run folder, train, render the report. Returns the summary."""
    config, default = _resolve(verb, source, overrides)
    return start(verb, config, root, name or free_name(root, default, resume), resume)


def start(verb: str, config: Config, root: Path, name: str, resume: bool = False) -> dict[str, Any]:
    """Run a recipe with a config that is already resolved."""
    run = RunDir.create(root, name, verb, to_toml(config), resume=resume)
    if run.finished:
        print(f"{name}: already done; nothing to resume", file=sys.stderr)
    try:
        summary: dict[str, Any] = load(verb).run(config, run)
    finally:
        if (run.path / "summary.json").is_file():
            render(run.path)
    return summary


def dry_run(verb: str, source: str | None, overrides: list[str]) -> dict[str, Any]:
    """The resolved config and the job's sizes."""
    config, _ = _resolve(verb, source, overrides)
    return {"config": config.model_dump(), **load(verb).plan(config)}


def _resolve(verb: str, source: str | None, overrides: list[str]) -> tuple[Config, str]:
    module = load(verb)
    return load_config(module.CONFIG, source, overrides), Path(source).stem if source else verb


def free_name(root: Path, name: str, resume: bool) -> str:
    """`name`, or the first of name-2, name-3 ... that is not taken; a resume continues the last taken one."""
    names = [name, *(f"{name}-{n}" for n in range(2, 1000))]
    taken = [n for n in names if (root / n / "config.toml").exists()]
    if resume and taken:
        return taken[-1]
    return next(n for n in names if n not in taken)
