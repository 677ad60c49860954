"""Whatever a model says, a terminal only shows it."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftlab.runs.sanitize import BIDI, StreamSanitizer, sanitize

# Pieces that steer terminals, so that hypothesis meets whole sequences often.
PIECES = [
    "\x1b",
    "\x1b[",
    "\x9b",
    "\x1b]52;c;",
    "\x9d0;title",
    "\x07",
    "\x1b\\",
    "\x9c",
    "\x1bP",
    "\x1b(B",
    "31m",
    "\x18",
    "\n",
    "\t",
    "\r",
    "\x7f",
    "\u202e",
    "\u2066",
    "\ud800",
    "a",
    "é",
    "漢",
    "[/foo]",
    ";",
    "?",
    "é́",
]
hostile = st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=20).map("".join)
FORBIDDEN = re.compile(f"[\x00-\x08\x0b-\x1f\x7f-\x9f{BIDI}\ud800-\udfff]")


@given(hostile)
def test_nothing_that_steers_a_terminal_comes_out(text):
    assert not FORBIDDEN.search(sanitize(text))


@given(hostile, st.lists(st.integers(0, 60)))
def test_any_split_gives_what_one_feed_gives(text, cuts):
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    stream = StreamSanitizer()
    pieces = [stream.feed(text[low:high]) for low, high in zip(places, places[1:], strict=False)]
    assert "".join(pieces) + stream.flush() == sanitize(text)


@given(
    st.text(
        st.characters(exclude_categories=("Cc", "Cs"), exclude_characters=BIDI, include_characters="\n\t")
    )
)
def test_plain_text_is_unchanged(text):
    assert sanitize(text) == text


@given(hostile)
def test_sanitizing_twice_changes_nothing(text):
    assert sanitize(sanitize(text)) == sanitize(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b[?1049hscreen", "screen"),
        ("\x9b2Jclear", "clear"),
        ("\x1b]0;title\x07after", "after"),
        ("\x1b]52;c;aGk=\x1b\\after", "after"),
        ("\x9d8;;http://x\x9clink", "link"),
        ("\x1bPq#0\x1b\\sixel", "sixel"),
        ("\x1b(Bcharset", "charset"),
        ("\x1b#8fill", "fill"),
        ("over\rwrite", "overwrite"),
        ("lines\r\nkept\tso", "lines\nkept\tso"),
        ("\x1b]0;never closed\nstill read", "\nstill read"),
        ("\x1b]0;cut\x1b[31mshort", "short"),
        ("\x1b[12\nx", "\nx"),
        ("\x1b[1é", "é"),
        ("lone\x1b", "lone"),
        ("\x1b\x1b[31mtwice", "twice"),
        ("user\u202egnp.exe", "usergnp.exe"),
        ("half \ud83d", "half \ufffd"),
        ("[/foo] [bold]", "[/foo] [bold]"),
    ],
)
def test_known_sequences(text, shown):
    assert sanitize(text) == shown


def test_flush_forgets_an_open_sequence():
    stream = StreamSanitizer()
    assert stream.feed("a\x1b]0;ti") + stream.flush() + stream.feed("b") == "ab"
