"""A run folder's files as plain records: bounded, and tolerant of a run that only began or was cut short."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..runs.atomic import read_rows
from ..runs.summary import outcome, read_environment

MOST_SAMPLES = 48  # pairs
MOST_EVENTS = 60

Row = dict[str, Any]


@dataclass(frozen=True)
class RunFiles:
    """What a run left.

    summary     as in the contract; status "running" or "killed" where the file is missing
    columns     {metric: [(step, value or None)]}, in ascending order of steps
    samples     the first rows of samples.jsonl; sample_rows is how many it has
    """

    path: Path
    summary: Row
    environment: Row
    config: Row
    config_toml: str
    columns: dict[str, list[tuple[float, float | None]]]
    samples: list[Row]
    sample_rows: int
    events: list[Row]

    @property
    def name(self) -> str:
        return str(self.summary["run"])

    def table(self, key: str) -> Row:
        """The summary's table `key`: metrics, baseline, intervals or time; empty where it is none."""
        table = self.summary.get(key)
        return table if isinstance(table, dict) else {}


def read_run(path: Path) -> RunFiles:
    """Everything that the page shows of one run; UserError where `path` is no run folder."""
    if not (path / "config.toml").is_file():
        raise UserError(f"{path} is not a run folder: it has no config.toml; `peftlab runs` lists the runs")
    config_toml = (path / "config.toml").read_text(encoding="utf-8", errors="replace")
    try:
        config = tomllib.loads(config_toml)
    except tomllib.TOMLDecodeError:
        config = {}
    samples, sample_rows = _samples(read_rows(path / "samples.jsonl"))
    return RunFiles(
        path=path,
        summary=outcome(path),
        environment=read_environment(path),
        config=config,
        config_toml=config_toml,
        columns=_columns(read_rows(path / "metrics.jsonl")),
        samples=samples,
        sample_rows=sample_rows,
        events=list(read_rows(path / "events.jsonl"))[-MOST_EVENTS:],
    )


def stage_folders(path: Path) -> list[Path]:
    """The stages of a demo, in the order in which they began."""
    found = [
        (str(read_environment(file.parent).get("started", "")), file.parent)
        for file in path.glob("*/config.toml")
    ]
    return [folder for _, folder in sorted(found)]


def as_number(value: Any) -> float | None:
    """`value` where JSON holds a finite number that a float can hold, None where it holds anything else."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _columns(rows: Iterable[Row]) -> dict[str, list[tuple[float, float | None]]]:
    """Each metric by step; where a resume logged a step again, the later row counts."""
    columns: dict[str, dict[float, float | None]] = {}
    for row in rows:
        step = as_number(row.get("step"))
        for name, value in row.items():
            number = as_number(value)
            if step is not None and name not in ("step", "time") and (value is None or number is not None):
                columns.setdefault(name, {})[step] = number
    return {name: sorted(values.items(), key=lambda item: item[0]) for name, values in columns.items()}


def _samples(rows: Iterable[Row]) -> tuple[list[Row], int]:
    """The rows of the first prompts, both sides of each, and the number of all rows."""
    kept: list[Row] = []
    prompts: dict[str, None] = {}
    count = 0
    for count, row in enumerate(rows, start=1):
        key = str(row.get("prompt_id", row.get("id", count)))
        if key in prompts or len(prompts) < MOST_SAMPLES:
            prompts[key] = None
            kept.append(row)
    return kept[: 4 * MOST_SAMPLES], count
