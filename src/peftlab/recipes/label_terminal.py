"""Pairs in the terminal: the prompt, two answers, and a line for what the person thinks of them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Protocol

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..data.labels import Journal, Pair
from ..errors import Interrupted
from ..runs.sanitize import sanitize

with contextlib.suppress(ImportError):
    import readline  # noqa: F401  - gives input() its line editing

KEYS = {"a": "left", "d": "right", "t": "tie", "s": "skip", "u": "undo", "q": "quit"}
AT_THE_END = {"u": "undo", "q": "quit"}
WIDE = 100  # columns from which two answers fit side by side


class Listening(Protocol):
    """What lets a signal end the wait for a line."""

    def heard(self) -> AbstractContextManager[None]:
        """A block in which a signal raises Interrupted."""
        ...


def ask_all(journal: Journal, console: Console, signals: Listening) -> None:
    """Until the person quits, also by Ctrl+D; at the end there is still the last choice to take back."""
    while True:
        pair = journal.current()
        if pair is None:
            console.print("\nall pairs are labelled")
        else:
            _show(journal, pair, console)
        shown_at = time.monotonic()
        said = _ask(journal, console, signals, AT_THE_END if pair is None else KEYS)
        if said == "quit":
            return
        if said != "undo":
            journal.choose(said, time.monotonic() - shown_at)
        elif not journal.undo():
            console.print("there is nothing to take back")


def _ask(journal: Journal, console: Console, signals: Listening, keys: Mapping[str, str]) -> str:
    """One of the words of `keys`, typed as a word or as its key; asks again where the line is neither."""
    known = ", ".join(f"{key} {word}" for key, word in keys.items())
    while True:
        try:
            with signals.heard():
                line = input(f"{len(journal.choices)} of {len(journal.pairs)} done; {known} > ").strip().lower()
        except EOFError:
            console.print()
            return "quit"
        except Interrupted:
            console.print()  # what is told next begins a line
            raise
        if line in keys or line in keys.values():
            return keys.get(line, line)
        console.print(f"expected one of: {known}", markup=False)


def _show(journal: Journal, pair: Pair, console: Console) -> None:
    """Texts go in as plain text: neither rich's markup nor an escape sequence in them means anything."""
    answers = [
        Panel(Text(sanitize(text)), title=f"{side} ({key})", title_align="left", border_style="cyan")
        for (side, text), key in zip(journal.sides(pair).items(), KEYS, strict=False)
    ]
    console.print()
    console.print(Panel(Text(sanitize(pair.record.prompt)), title="prompt", title_align="left", border_style="dim"))
    if console.width < WIDE:
        console.print(*answers, sep="\n")
        return
    table = Table.grid(expand=True)
    table.add_column(ratio=1)
    table.add_column(ratio=1)
    table.add_row(*answers)
    console.print(table)
