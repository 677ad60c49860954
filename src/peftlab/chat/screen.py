"""What reaches the terminal: replies wrapped at words while they stream, notes, two replies side by side.

Everything said here is sanitized; rich would pass escape sequences through.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from typing import TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..runs.sanitize import StreamSanitizer, sanitize

PIPED_WIDTH = 80


class Screen:
    """Plain text on `out`; bold labels where it is a terminal that shows them (rich heeds NO_COLOR and TERM)."""

    def __init__(self, out: TextIO) -> None:
        self.out, self.terminal = out, out.isatty()

    @property
    def width(self) -> int:
        """Columns; 80 where it is no terminal."""
        return shutil.get_terminal_size((PIPED_WIDTH, 24)).columns if self.terminal else PIPED_WIDTH

    def note(self, text: str) -> None:
        """A line, or several, of the chat's own; a long one is wrapped at words on a terminal."""
        self._console().print(Text(sanitize(text)), soft_wrap=not self.terminal)

    def label(self, text: str) -> None:
        """Who speaks, at the beginning of a line."""
        self._console().print(Text(f"{sanitize(text)}> ", style="bold"), end="")

    def stream(self, label: str, pieces: Iterable[str]) -> None:
        """Say these pieces as they come, behind a label. An interrupt or an error ends the line and goes on to
        the caller."""
        self.label(label)
        cleaner = StreamSanitizer()
        wrapper = Wrapper(self.width, len(sanitize(label)) + 2) if self.terminal else None
        begun = False
        try:
            for piece in pieces:
                # A model that goes on with a text begins with the space behind it; here stands one already.
                text = cleaner.feed(piece) if begun else cleaner.feed(piece).lstrip(" ")
                begun = begun or bool(text)
                self.write(wrapper.feed(text) if wrapper else text)
        except BaseException as error:
            end = " (stopped)\n" if isinstance(error, KeyboardInterrupt) else "\n"
            self.write((wrapper.flush() if wrapper else "") + end)
            raise
        self.write((wrapper.flush() if wrapper else "") + "\n")

    def columns(self, heads: Sequence[str], texts: Sequence[str]) -> None:
        """Texts side by side under their heads, wrapped at words within the width."""
        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, width=min(self.width, 120) - 1)
        for head in heads:
            table.add_column(Text(sanitize(head), style="bold"), ratio=1, overflow="fold")
        table.add_row(*(Text("-" * cell_len(sanitize(head))) for head in heads))
        table.add_row(*(Text(sanitize(text).strip().expandtabs(4) or "(nothing)") for text in texts))
        console = self._console()
        with console.capture() as drawn:
            console.print(table)
        self.write("".join(line.rstrip() + "\n" for line in drawn.get().splitlines()))

    def write(self, text: str) -> None:
        """Text that is safe already."""
        self.out.write(text)
        self.out.flush()

    def _console(self) -> Console:
        return Console(file=self.out, highlight=False, markup=False, emoji=False, width=self.width)


class Wrapper:
    """Breaks a stream of text into lines of at most `width` cells, at white space where there is any.

    A word is held back until it ends, so that it is never torn; `flush` gives what is held.
    """

    def __init__(self, width: int, used: int = 0) -> None:
        self.width, self.used = width, used  # cells of the present line
        self.space, self.word = "", ""

    def feed(self, text: str) -> str:
        """What of the text so far may be shown."""
        return "".join(map(self._step, text))

    def flush(self) -> str:
        """The word that is held back, and an end to it."""
        shown, self.space = self._word(), ""
        return shown

    def _step(self, char: str) -> str:
        if not char.isspace():
            self.word += char
            full = cell_len(self.word) > self.width - 3  # a character may take two cells
            return self._word() if full else ""
        shown = self._word()
        if char == "\n":
            self.used, self.space = 0, ""
            return shown + "\n"
        self.space += " " * 4 if char == "\t" else char
        return shown

    def _word(self) -> str:
        if not self.word:
            return ""
        size = cell_len(self.word)
        if self.used + len(self.space) + size < self.width:
            self.used, shown = self.used + len(self.space) + size, self.space + self.word
        else:
            self.used, shown = size, ("\n" if self.used else "") + self.word
        self.word = self.space = ""
        return shown
