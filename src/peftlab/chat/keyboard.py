"""Where turns come from: an editable line with history at a terminal, plain lines where input is piped."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from ..runs.sanitize import sanitize

Read = Callable[[], str]  # one turn; raises EOFError at the end, KeyboardInterrupt on Ctrl+C
PROMPT, MORE = "you> ", "...> "


def keyboard(history: Path, words: Callable[[str], Sequence[str]]) -> Read:
    """The terminal's keyboard where there is one, else standard input.

    `words`: what may follow the beginning of a command, for the Tab key.
    """
    if sys.stdin.isatty() and sys.stdout.isatty():
        return _editor(history, words)
    return piped(sys.stdin, sys.stdout)


@contextmanager
def hushed() -> Iterator[None]:
    """What is typed meanwhile is not shown, where it would run into a reply; it is read afterwards, and Ctrl+C acts."""
    if not sys.stdin.isatty():
        yield
        return
    import termios

    before = termios.tcgetattr(sys.stdin)
    quiet = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    termios.tcsetattr(sys.stdin, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


def piped(source: TextIO, out: TextIO) -> Read:
    """Turns from lines; a backslash at the end of one joins the next to it. Each is told again, for whoever reads."""

    def read() -> str:
        lines: list[str] = []
        while not lines or lines[-1].endswith("\\"):
            line = source.readline()
            if not line and not lines:
                raise EOFError
            lines.append(line.rstrip("\n"))
            if not line:
                break
        turn = "\n".join(line.removesuffix("\\") for line in lines)
        if turn.strip():
            out.write(PROMPT + sanitize(turn) + "\n")
        return turn

    return read


def _editor(history: Path, words: Callable[[str], Sequence[str]]) -> Read:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import Completer, Completion
    from prompt_toolkit.key_binding import KeyBindings

    class Names(Completer):
        def get_completions(self, document: Any, complete_event: Any) -> Iterable[Completion]:
            line = document.text_before_cursor
            start = line.rpartition(" ")[2]
            return (Completion(w, -len(start)) for w in words(line) if w.startswith(start))

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: Any) -> None:
        buffer = event.current_buffer
        if buffer.complete_state:
            buffer.complete_state = None
        elif buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: Any) -> None:
        event.current_buffer.newline(copy_margin=False)

    session: PromptSession[str] = PromptSession(
        history=_history(history),
        completer=Names(),
        complete_while_typing=False,
        key_bindings=keys,
        multiline=True,
        prompt_continuation=lambda width, number, wrapped: " " * width if wrapped else MORE,
    )
    return lambda: session.prompt(PROMPT)


def _history(path: Path) -> Any:
    """What was typed before, in a file that only its owner reads; this chat's alone where it cannot be written."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(0o600)
        with path.open("ab"):
            return FileHistory(path)
    except OSError:
        return InMemoryHistory()
