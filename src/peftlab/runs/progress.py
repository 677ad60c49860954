"""One line of progress: on a terminal it rewrites itself, elsewhere it comes every ten seconds and at the end."""

from __future__ import annotations

import sys
import time

EVERY_S = 10.0


class Progress:
    """Shows on standard error how far a job of `total` steps is."""

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
        print(f"\r{line:<79}" if live else line, end="\n" if last or not live else "", file=sys.stderr, flush=True)
