"""What a model or a file says, made safe for a terminal.

Dropped: escape sequences with their parameters (CSI, OSC, DCS, SOS, PM, APC, in their ESC and their C1
spelling), every C0 control except newline and tab, DEL, C1, and the controls that reorder text (bidi). A lone
surrogate, which no UTF-8 stream can carry, becomes U+FFFD. Everything else stays, markup included: printing
it as plain text is the caller's part. Grammar: ECMA-48 (1991), section 5.
"""

from __future__ import annotations

import re

BIDI = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
_SUSPECT = re.compile(f"[\x00-\x08\x0b-\x1f\x7f-\x9f{BIDI}\ud800-\udfff]")
_STRINGS_7BIT = frozenset("PX]^_")  # after ESC: DCS, SOS, OSC, PM, APC
_STRINGS_8BIT = frozenset("\x90\x98\x9d\x9e\x9f")

_TEXT, _ESCAPE, _ESCAPE_MORE, _CSI, _STRING, _STRING_ESCAPE = range(6)


class StreamSanitizer:
    """`sanitize` over a stream: the pieces of any split, fed in order, join to the sanitized whole.

    A control string that never ends is cut at the next newline, so that a model cannot hide the rest of what
    it says.
    """

    def __init__(self) -> None:
        self._state = _TEXT

    def feed(self, chunk: str) -> str:
        """The part of `chunk` that may be shown."""
        if self._state == _TEXT and not _SUSPECT.search(chunk):
            return chunk
        return "".join(map(self._step, chunk))

    def flush(self) -> str:
        """Ends the stream: forgets a sequence still open. Nothing was held back, nothing is left to show."""
        self._state = _TEXT
        return ""

    def _step(self, char: str) -> str:
        state, self._state = self._state, _TEXT
        if state in (_ESCAPE, _STRING_ESCAPE):
            if state == _STRING_ESCAPE and char == "\\":
                return ""
            return self._after_escape(char)
        if state == _ESCAPE_MORE:
            return self._after_escape(char, more=True)
        if state == _CSI and " " <= char <= "~":
            self._state = _CSI if char < "@" else _TEXT
            return ""
        if state == _STRING and char not in "\n\x07\x18\x1a\x9c":
            self._state = _STRING_ESCAPE if char == "\x1b" else _STRING
            return ""
        return self._text(char)

    def _after_escape(self, char: str, more: bool = False) -> str:
        if " " <= char <= "/":
            self._state = _ESCAPE_MORE
        elif not more and char == "[":
            self._state = _CSI
        elif not more and char in _STRINGS_7BIT:
            self._state = _STRING
        elif not "0" <= char <= "~":
            return self._text(char)
        return ""

    def _text(self, char: str) -> str:
        if not _SUSPECT.match(char):
            return char
        if char == "\x1b":
            self._state = _ESCAPE
        elif char == "\x9b":
            self._state = _CSI
        elif char in _STRINGS_8BIT:
            self._state = _STRING
        return "\ufffd" if "\ud800" <= char <= "\udfff" else ""


def sanitize(text: str) -> str:
    """`text` without anything that could steer a terminal."""
    return StreamSanitizer().feed(text)
