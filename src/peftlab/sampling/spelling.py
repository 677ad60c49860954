"""Text of a reply that grows token by token, for chat and web."""

from __future__ import annotations

from collections.abc import Callable, Sequence

WAITING = 8  # tokens that spell nothing and are kept for the next one


class Spelling:
    """What each token adds to a text, in whole characters; a token's cost does not grow with the text.

    `decode`: token ids to text. A character of several tokens decodes to U+FFFD until it is whole, and comes with its
    last token; broken bytes, which make none, are told at the end.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self.decode = decode
        # The tokens that added text last, and behind them those that are not told yet. The former are decoded again:
        # a word may look otherwise without the one before it.
        self._ids: list[int] = []
        self._told = 0

    def add(self, token: int) -> str:
        """What this token makes whole; empty while a character goes on in the next one."""
        self._ids.append(token)
        more = self._more()
        waiting = len(self._ids) - self._told
        if not more and waiting > WAITING:  # a token that spells nothing may be a space before the next: keep the last
            del self._ids[self._told]
        if not more or more.endswith("\ufffd"):
            return ""
        self._ids, self._told = self._ids[self._told :], waiting
        return more

    def rest(self) -> str:
        """At the end: what the last tokens spell though it is not whole."""
        more = self._more()
        self._told = len(self._ids)
        return more

    def _more(self) -> str:
        return self.decode(self._ids)[len(self.decode(self._ids[: self._told])) :]
