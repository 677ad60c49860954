"""A run's figures in another tool: TensorBoard's event files, or trackio's database. No run needs either of them."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from ..errors import UserError
from .atomic import grown
from .compare import read_config
from .metrics import numbers
from .summary import outcome

PROJECT = "peftlab"
POLL_S = 1.0

# (step, seconds since the run began, figures) -> nothing; and what ends it.
Send = Callable[[int, float, Mapping[str, float]], None]
Sink = tuple[Send, Callable[[], None]]


def track(folder: Path, tool: str, output: Path | None = None, follow: bool = False) -> tuple[int, str]:
    """Hands the figures of the run in `folder` over, with `follow` those too that it wins until it ends.

    Figures of the end, which no step has, go to the last step. Returns how many rows were sent, and what shows them.
    `output` is the folder of TensorBoard's files, tensorboard/RUN if not given; those of an earlier call go. UserError
    for an unknown tool, or one that is not installed.
    """
    if tool not in SINKS:
        raise UserError(f"--to {tool}: there are {', '.join(SINKS)}")
    told = outcome(folder)
    (send, close), shown = SINKS[tool](folder, told, output)
    position = sent = step = 0
    seconds, names = 0.0, set[str]()
    try:
        while True:
            told = outcome(folder)  # before the rows: what an ended run logged last is among them
            rows, position = grown(folder / "metrics.jsonl", position)
            for row in rows:
                step, seconds = int(row.pop("step")), float(row.pop("time"))
                send(step, seconds, numbers(row))
                names |= row.keys()
            sent += len(rows)
            if not (follow and told["status"] == "running"):
                break
            time.sleep(POLL_S)
        if last := {name: value for name, value in numbers(told["metrics"]).items() if name not in names}:
            send(step, seconds, last)
    finally:
        close()
    return sent, shown


def _tensorboard(folder: Path, told: Mapping[str, Any], output: Path | None) -> tuple[Sink, str]:
    output = output or Path("tensorboard") / str(told["run"])
    writer_of = _library("tensorboard.summary").Writer
    for old in output.glob("events.out.tfevents.*"):
        old.unlink()
    writer = writer_of(str(output))
    began = datetime.fromisoformat(told["started"]).timestamp() if told["started"] else time.time()

    def send(step: int, seconds: float, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, step, wall_time=began + seconds)

    return (send, writer.close), f"tensorboard --logdir {output}"


def _trackio(folder: Path, told: Mapping[str, Any], output: Path | None) -> tuple[Sink, str]:
    if output is not None:
        raise UserError("--output: trackio has a place of its own; leave it out, or set TRACKIO_DIR")
    trackio = _library("trackio")
    trackio.init(project=PROJECT, name=str(told["run"]), config=read_config(folder))
    return (lambda step, _, figures: trackio.log(dict(figures), step=step), trackio.finish), (
        f"trackio show --project {PROJECT}"
    )


def _library(name: str) -> Any:
    """UserError where it is not installed."""
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise UserError(f"--to {package}: {package} is not installed; pip install {package}") from None


SINKS = {"tensorboard": _tensorboard, "trackio": _trackio}
