"""Standard error while a job runs: how far it is, and lines that do not run into that.

On a terminal a training run has a panel that redraws itself in place, any other job a line; elsewhere a line comes
with the first step, then every ten seconds, and with the last one. No cursor is hidden and no mode is set, so whatever
ends the process leaves the terminal whole.
"""

from __future__ import annotations

import contextlib
import math
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar, TextIO

from .launched import rank
from .panel import Pace, Panel
from .sanitize import sanitize

EVERY_S, LIVE_EVERY_S = 10.0, 0.2  # between two looks: of a log, and of a terminal, which a fast job shall not wait for
LEAST_COLUMNS = 24  # that a table's last column may be broken into, where it begins in the terminal's right half
PATIENCE_S = 2.0  # in which a launcher that saw one process end has ended the others


class Progress:
    """Shows on standard error how far a job of `total` steps is; nothing where `quiet`.

    `open`: what stands on the terminal is to be redrawn, a line without its end or the panel `drawn`, with the cursor
    below it. `run`: name and folder of the run under way, which has a panel. `counting`: whether batches are counted,
    of what `doing` said, and when a pipe was last `told` of them. `heed`: what raises, between two batches, where a
    signal asked the run under way to stop.
    """

    open: ClassVar[bool] = False
    quiet: ClassVar[bool] = False
    drawn: ClassVar[str] = ""
    run: ClassVar[tuple[str, Path] | None] = None
    counting: ClassVar[bool] = False
    doing: ClassVar[str] = ""
    told: ClassVar[float] = 0.0
    heed: ClassVar[Callable[[], None]] = lambda: None

    def __init__(self, total: int) -> None:
        self.total, self.pace = total, Pace(total)
        self.shown = -math.inf
        self.panel = Panel(*Progress.run, self.pace) if Progress.run else None

    def show(self, step: int, figures: str) -> None:
        """`figures`: what to say of the step in a line, for example "loss 3.41". To be called after every step.

        The first step and the last are always shown; each but the first with the time that is left by the pace so far.
        """
        live, last = sys.stderr.isatty(), step >= self.total
        self.pace.note(step)
        waited = time.monotonic() - self.shown
        if Progress.quiet or rank() or (not last and waited < (LIVE_EVERY_S if live else EVERY_S)):
            return
        self.shown = time.monotonic()
        if live and self.panel and (drawn := self.panel.render(step, sys.stderr)):
            _write(_erased() + drawn)
            Progress.open, Progress.drawn = True, drawn
            return
        line = "  ".join(filter(None, (f"  step {step}/{self.total}", figures, self.pace.left(step))))
        Progress.open, Progress.drawn = live and not last, ""
        width = shutil.get_terminal_size().columns - 1  # a full line would make the terminal begin another
        _write((f"\r{line[:width]:<{width}}" if live else line) + ("" if Progress.open else "\n"))


@contextlib.contextmanager
def watched(name: str, folder: Path) -> Iterator[None]:
    """Gives the run `name` in `folder` a panel on a terminal while the block runs; the last one drawn stays."""
    Progress.run = name, folder
    try:
        yield
    finally:
        if Progress.open and not Progress.drawn:  # a run that ends before its last step leaves a line without its end
            _write("\n")
        Progress.open, Progress.drawn = False, ""
        Progress.run = None


@contextlib.contextmanager
def counting() -> Iterator[None]:
    """While the block runs, loops over `batch_starts` tell how far they are."""
    Progress.counting, Progress.doing, Progress.told = not Progress.quiet, "", time.monotonic()
    try:
        yield
    finally:
        Progress.counting = False


def batch_starts(total: int, size: int) -> Iterator[int]:
    """Where each batch of `total` rows starts. A line tells the share that is done, and goes with the last batch.

    In a pipe, where no line goes, one comes every ten seconds, with what was said to be `doing`. Raises Interrupted
    before a batch where a signal asked a run to stop that is not in the middle of a step.
    """
    live = sys.stderr.isatty()
    for start in range(0, total, size):
        Progress.heed()
        yield start
        if not Progress.counting:
            continue
        share = f"{min(1, (start + size) / total):.0%}"
        if live:
            Progress.open = start + size < total
            _write(f"\r  {share}" if Progress.open else f"\r{'':5}\r")
        elif time.monotonic() - Progress.told >= EVERY_S:
            Progress.told = time.monotonic()
            _write(f"  {'  '.join(filter(None, (Progress.doing, share)))}\n")


def say(message: str) -> None:
    """A line on standard error of its own, safe for a terminal: above a panel, below a line of progress.

    Of several processes the first one says it.
    """
    if rank():
        return
    text = folded_text(sanitize(message), sys.stderr)
    if Progress.open and Progress.drawn:
        _write(f"{_erased()}{text}\n{Progress.drawn}")
        return
    if Progress.open:
        _write("\n")
        Progress.open = False
    _write(f"{text}\n")


def doing(what: str) -> None:
    """Says on a terminal what the next seconds go to; in a pipe with the first count of them, if it comes to one."""
    Progress.doing = sanitize(what)
    if sys.stderr.isatty() and not Progress.quiet:
        say(f"{what} ...")


def folded(line: str, file: TextIO, below: int = 0) -> str:
    """A line as it goes to `file`: on a terminal too narrow for it broken at words, the rest below column `below`.

    In a pipe it stays one line, as does one that begins with two spaces or a backtick: a command, to be copied whole.
    """
    whole = not overflows(len(line), file) or line.startswith(("  ", "`"))
    return line if whole else _broken(line, below)


def folded_text(text: str, file: TextIO) -> str:
    """Every line of a text `folded`; the rest of a list's point goes below its first word."""
    lines = []
    for line in text.split("\n"):
        point = re.match(" *- ", line) if overflows(len(line), file) else None
        lines.append(_broken(line, point.end()) if point else folded(line, file))
    return "\n".join(lines)


def _broken(line: str, below: int) -> str:
    width = shutil.get_terminal_size().columns
    indent = " " * (below if below <= max(width // 2, width - LEAST_COLUMNS) else 2)
    parts = textwrap.wrap(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return "\n".join(parts)


def overflows(length: int, file: TextIO) -> bool:
    """Whether a line of so many characters is more than the terminal `file` shows in one; never so in a pipe."""
    return file.isatty() and length > shutil.get_terminal_size().columns


def complain(message: str, lost: bool = False) -> None:
    """Says what ends this process. Of several it waits for those that have more to tell, and is ended meanwhile.

    The first speaks at once, and the others after it, since all may have met the same. One that has only `lost` another
    waits longest: that other knows why.
    """
    time.sleep(PATIENCE_S * (4 if lost else min(rank(), 1)))
    if rank():
        _write(f"process {rank()}: {sanitize(message)}\n")
    else:
        say(message)


def _erased() -> str:
    """What takes the panel off the terminal: up to its first line, and all below is cleared (ECMA-48: CUU, ED)."""
    lines = Progress.drawn.count("\n") if Progress.open else 0
    return f"\x1b[{lines}A\x1b[J" if lines else ""


def _write(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()
