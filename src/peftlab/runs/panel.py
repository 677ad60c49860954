"""A run on a terminal while it trains: steps, time left, figures beside their healthy range, one sample.

What is shown is read from the run's own logs, so every recipe that logs is shown, and nothing has to tell of itself.
"""

from __future__ import annotations

import datetime
import json
import time
from pathlib import Path
from typing import Any, TextIO

from .atomic import grown
from .metrics import METRICS, Metric, healthy_text, numbers
from .sanitize import sanitize

# What a person watches, in this order; of a run those are shown that it logs.
FIGURES = (
    "reward/mean", "reward/group_std", "kl/reference", "policy/entropy", "policy/approx_kl", "policy/clip_fraction",
    "value/explained_variance", "rollout/length", "train/loss", "train/pair_accuracy", "train/reward_margin",
    "train/grad_norm", "train/lr",
)  # fmt: skip
WIDEST, LEAST_HEIGHT = 100, 18  # columns; and lines of a terminal, below which a panel would scroll off it
MOST_BYTES = 1 << 20  # of the end of rollouts.jsonl, which is read for a sample
MOST_CHARACTERS = 240  # of a sample


class Pace:
    """How long a job of `total` steps has run, and how long it will by the steps since the first that was noted."""

    def __init__(self, total: int) -> None:
        self.total, self.began = total, time.monotonic()
        self._first: tuple[int, float] | None = None  # a step, and when it ended: it alone pays for what is done once

    def note(self, step: int) -> None:
        """`step` has ended."""
        self._first = self._first or (step, time.monotonic())

    def gone(self) -> str:
        """"0:01:30 so far"."""
        return f"{_clock(time.monotonic() - self.began)} so far"

    def left(self, step: int) -> str:
        """"about 0:12:00 left" after `step`; empty after the first that was noted, and after the last."""
        if self._first is None or not self._first[0] < step < self.total:
            return ""
        since, then = self._first
        return f"about {_clock((self.total - step) * (time.monotonic() - then) / (step - since))} left"


class Panel:
    """What is known of a run whose logs are in `folder`."""

    def __init__(self, name: str, folder: Path, pace: Pace) -> None:
        self.name, self.folder, self.pace = name, folder, pace
        self.first: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self._read = 0

    def render(self, step: int, file: TextIO) -> str | None:
        """The panel after `step`, for the terminal that `file` is; None where that is too low or knows no cursor."""
        from rich.console import Console

        console = Console(file=file, highlight=False)
        if console.is_dumb_terminal or console.height < LEAST_HEIGHT:
            return None
        console.width = min(console.width, WIDEST)
        self._follow()
        with console.capture() as captured:
            console.print(self._box(step))
        return captured.get()

    def _follow(self) -> None:
        """Reads the rows that metrics.jsonl has won."""
        rows, self._read = grown(self.folder / "metrics.jsonl", self._read)
        for row in rows:
            figures = numbers(row)
            self.first = figures | self.first
            self.last |= figures

    def _box(self, step: int) -> Any:
        from rich.box import ROUNDED
        from rich.console import Group
        from rich.panel import Panel as Box
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        bar = Table.grid(padding=(0, 2))
        total = max(1, self.pace.total)
        bar.add_row(
            ProgressBar(total=total, completed=step, width=24), Text(f"{100 * step // total}%  {self._times(step)}")
        )
        table = Table(box=None, padding=(0, 3, 0, 0), pad_edge=False, header_style="dim")
        for column in ("", "now", "first", "wanted", ""):
            table.add_column(column, justify="right" if column in ("now", "first") else "left", no_wrap=True)
        for entry in (METRICS[name] for name in FIGURES if name in self.last):
            now, first = self.last[entry.name], self.first[entry.name]
            words, style = _verdict(entry, now)
            wanted = healthy_text(entry) or entry.better or ""
            table.add_row(entry.name, f"{now:.4g}", f"{first:.4g}", wanted, Text(words, style))
        sample = self._sample()
        parts: list[Any] = [bar, Text(), table, *([Text(), Text(sample, overflow="fold")] if sample else [])]
        title = Text(f" {self.name}: step {step} of {self.pace.total} ", "bold")
        return Box(Group(*parts), title=title, title_align="left", box=ROUNDED, padding=(0, 1))

    def _times(self, step: int) -> str:
        """How long it has trained, and what is left."""
        left = "then the evaluation" if step >= self.pace.total else self.pace.left(step)
        return "; ".join(filter(None, (self.pace.gone(), left)))

    def _sample(self) -> str:
        """The last rollout that was recorded, in one line; empty where there is none."""
        try:
            with (self.folder / "rollouts.jsonl").open("rb") as log:
                log.seek(max(0, log.seek(0, 2) - MOST_BYTES))
                row = json.loads(log.read().rpartition(b"\n")[0].rpartition(b"\n")[2])
            asked, said = (_line(str(row[key])) for key in ("prompt", "completion"))
        except (OSError, ValueError, KeyError, TypeError):
            return ""
        if len(asked) > MOST_CHARACTERS // 2:
            asked = f"... {asked[-MOST_CHARACTERS // 2 :]}"
        return f"step {row.get('step')}: {asked} -> {said[: MOST_CHARACTERS - len(asked)]}"


def _verdict(entry: Metric, value: float) -> tuple[str, str]:
    """Whether a figure is where it should lie, in a word and a style; empty where the field has no range."""
    if entry.healthy is None:
        return "", ""
    low, high = entry.healthy
    inside = (low is None or value >= low) and (high is None or value <= high)
    return ("ok", "green") if inside else ("OUTSIDE", "bold red")


def _clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


def _line(text: str) -> str:
    return " ".join(sanitize(text).split())
