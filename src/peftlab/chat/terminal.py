"""The chat's terminal: read a line, stream a reply. Everything a model says is sanitized before it is printed."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TextIO

from ..errors import UserError
from ..runs.sanitize import StreamSanitizer, sanitize
from ..sampling.sampler import Decoding
from .session import DEFAULT, Session, transcript

with contextlib.suppress(ImportError):
    import readline  # noqa: F401  - gives input() its line editing and history

SETTINGS: dict[str, Callable[[str], Any]] = {
    "temperature": float, "top_p": float, "top_k": int, "max_new_tokens": int
}


def told(decoding: Decoding) -> str:
    """The settings as one would type them."""
    return "  ".join(f"{key}={getattr(decoding, key):g}" for key in SETTINGS)


HELP = f"""\
/help                  this list
/set KEY=VALUE         {", ".join(SETTINGS)}; a chat begins with
                       {told(DEFAULT)}
/set                   the settings now
/system TEXT           set the system text (empty: none)
/history               the turns so far
/undo                  take back your last turn and its reply
/retry                 another reply to your last turn
/clear                 forget the conversation
/quit                  leave (also Ctrl+D)
Ctrl+C                 stop a reply; what was said is kept"""


class Terminal:
    """A read-eval-print loop over a session."""

    def __init__(
        self, session: Session, read: Callable[[str], str] = input, out: TextIO = sys.stdout, model: str = ""
    ) -> None:
        """`model`: what the banner calls the model; empty for no banner."""
        self.session, self.read, self.out, self.model = session, read, out, model
        self.commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: self.say(HELP),
            "/set": self.set,
            "/system": self.system,
            "/history": lambda _: self.say("\n".join(map(sanitize, transcript(session.turns))) or "(nothing yet)"),
            "/undo": self.undo,
            "/retry": lambda _: self.retry(),
            "/clear": lambda _: session.clear(),
        }

    def run(self) -> None:
        """Until /quit or the end of input."""
        if self.model:
            self.say(f"{sanitize(self.model)}, {self._manner()}\n{' '.join(self.commands)} /quit")
        while True:
            try:
                line = self.read("you> ").strip()
            except EOFError:
                self.say("")
                return
            except KeyboardInterrupt:
                self.say("\n(/quit or Ctrl+D leaves)")
                continue
            if line == "/quit":
                return
            if line.startswith("/"):
                self.command(line)
            elif line:
                self.answer(line)

    def command(self, line: str) -> None:
        """Run one /command; a wrong one is answered, never fatal."""
        name, _, rest = line.partition(" ")
        if name not in self.commands:
            self.say(f"unknown command {sanitize(name)}; /help lists them")
            return
        try:
            self.commands[name](rest.strip())
        except UserError as error:
            self.say(str(error))

    def answer(self, text: str) -> None:
        """Stream the reply to one turn."""
        before, cleaner = self.session.dropped, StreamSanitizer()
        pieces = self.session.reply(text)
        self.out.write("model> ")
        try:
            for piece in pieces:
                self.out.write(cleaner.feed(piece))
                self.out.flush()
            self.say(cleaner.flush())
        except KeyboardInterrupt:
            pieces.close()  # type: ignore[attr-defined]
            self.say(cleaner.flush() + " (stopped)")
        if before == 0 and self.session.dropped:
            self.say(f"(the context of {self.session.context} tokens is full: oldest turns are dropped from now on)")

    def _manner(self) -> str:
        template = self.session.sampler.tokenizer.chat_template
        return "asked by its chat template" if template else "without a chat template: it goes on with what you write"

    def set(self, text: str) -> None:
        if not text:
            self.say(told(self.session.decoding))
            return
        key, _, value = text.partition("=")
        if key.strip() not in SETTINGS:
            raise UserError(f"/set {key}: known keys are {', '.join(SETTINGS)}")
        try:
            number = SETTINGS[key.strip()](value)
        except ValueError:
            raise UserError(f"/set {key}: {value.strip()!r} is not a number") from None
        limits = {"max_new_tokens": self.session.context - 1, "top_p": 1}
        limit = limits.get(key.strip(), sys.maxsize)
        if not (0 < number <= limit or (number == 0 and key.strip() in ("temperature", "top_k"))):
            raise UserError(f"/set {key}: {number} is out of range")
        self.session.decoding = replace(self.session.decoding, **{key.strip(): number})

    def system(self, text: str) -> None:
        self.session.system = text

    def undo(self, _: str = "") -> None:
        if self._take_back() is None:
            self.say("(nothing to take back)")

    def retry(self) -> None:
        asked = self._take_back()
        if asked is None:
            self.say("(nothing to answer again)")
        else:
            self.answer(asked)

    def _take_back(self) -> str | None:
        """Remove the last turn and its reply; returns what was asked."""
        if len(self.session.turns) < 2:
            return None
        asked, _ = self.session.turns[-2:]
        del self.session.turns[-2:]
        return asked.content

    def say(self, text: str) -> None:
        self.out.write(text + "\n")
        self.out.flush()
