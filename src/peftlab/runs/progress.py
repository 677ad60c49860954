"""Standard error while a job runs: one line of progress, and lines that do not run into it.

On a terminal the line of progress rewrites itself; elsewhere it comes every ten seconds and at the end.
"""

from __future__ import annotations

import sys
import time
from typing import ClassVar

EVERY_S = 10.0


class Progress:
    """Shows on standard error how far a job of `total` steps is. `open`: a line on the terminal has no end yet."""

    open: ClassVar[bool] = False

    def __init__(self, total: int) -> None:
        self.total = total
        self.shown = time.monotonic()

    def show(self, step: int, figures: str) -> None:
        """`figures`: what to say of the step, for example "loss 3.41"."""
        live, last = sys.stderr.isatty(), step >= self.total
        if not live and not last and time.monotonic() - self.shown < EVERY_S:
            return
        self.shown = time.monotonic()
        line = f"  step {step}/{self.total}  {figures}"
        Progress.open = live and not last
        print(f"\r{line:<79}" if live else line, end="" if Progress.open else "\n", file=sys.stderr, flush=True)


def say(message: str) -> None:
    """A line on standard error of its own, below the progress that stands there."""
    if Progress.open:
        print(file=sys.stderr)
        Progress.open = False
    print(message, file=sys.stderr, flush=True)
