"""A reply as it grows: whole characters, up to the first stop, and the tokens that they are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..sampling.continuous import Chosen
from ..sampling.spelling import Spelling

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Token:
    """A token of a reply. `text` is what it added: empty where a character goes on in the next token, so the texts of
    all tokens join to the reply's. `logprob` and `top` are those of `Chosen`, `top` with texts."""

    text: str
    logprob: float | None
    top: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Piece:
    """What a reply gained. `finish`: why it ended here; None while it goes on."""

    text: str
    tokens: tuple[Token, ...]
    finish: Finish | None = None


@dataclass
class Reply:
    """Tokens in, pieces out. `stops`: texts before which the reply ends; what may begin one is held back.

    `decode`: token ids to text, without special tokens. `most`: tokens that the reply may have.
    """

    decode: Callable[[Sequence[int]], str]
    stops: Sequence[str]
    eos_id: int | None
    most: int
    count: int = 0  # tokens taken, the EOS among them
    finish: Finish | None = None
    _text: str = ""
    _shown: int = 0
    _held: list[tuple[int, Token]] = field(default_factory=list)  # not given away yet, by where their text begins

    def __post_init__(self) -> None:
        self._spelling = Spelling(self.decode)

    def take(self, chosen: Chosen) -> Piece | None:
        """What there is to show now; None for nothing. The piece that ends the reply always comes."""
        self.count += 1
        ended = chosen.token == self.eos_id
        last = ended or self.count == self.most
        gained = "" if ended else self._spelling.add(chosen.token)
        gained += self._spelling.rest() if last else ""
        begin = len(self._text)
        self._text += gained
        if not ended:
            top = tuple((self.decode([token]), logprob) for token, logprob in chosen.top)
            self._held.append((begin, Token(gained, chosen.logprob, top)))
        elif gained:  # the EOS ends a character that will never be whole: it belongs to the tokens before
            start, token = self._held[-1]
            self._held[-1] = (start, Token(token.text + gained, token.logprob, token.top))
        self.finish = "stop" if self._cut(begin) or ended else "length" if last else None
        shown = len(self._text) - (0 if self.finish else self._may_stop())
        if self.finish is None and shown <= self._shown:
            return None
        return self._piece(shown)

    def _cut(self, begin: int) -> bool:
        """Cut the text before its first stop; `begin`: where the newest token's text begins."""
        found = [self._text.find(stop, max(0, begin - len(stop) + 1)) for stop in self.stops]
        places = [place for place in found if place >= 0]
        if places:
            self._text = self._text[: min(places)]
        return bool(places)

    def _may_stop(self) -> int:
        """Length of the longest end of the text with which a stop begins."""
        longest = max(map(len, self.stops), default=1) - 1
        sizes = range(min(longest, len(self._text)), 0, -1)
        return next((n for n in sizes if any(stop.startswith(self._text[-n:]) for stop in self.stops)), 0)

    def _piece(self, shown: int) -> Piece:
        """Everything up to `shown` that was not shown yet, with the tokens that it completes.

        At the end a token's text is cut where the reply is, and tokens of the stop alone are left out.
        """
        text, self._shown = self._text[self._shown : shown], shown
        ready: list[Token] = []
        while self._held:
            at, token = self._held[0]
            if self.finish is None and at + len(token.text) > shown:
                break
            del self._held[0]
            if at < shown or (not token.text and self.finish != "stop"):
                ready.append(Token(token.text[: shown - at], token.logprob, token.top))
        return Piece(text, tuple(ready), self.finish)
