"""A preview as lines for a terminal: learned tokens in colour, or between brackets where there is none."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.text import Text

from ..runs.sanitize import sanitize

EXCERPT = 80
LEARNED, CUT, QUIET = "bold green", "red", "dim"
OPEN, CLOSE, BETWEEN = "[[", "]]", "|"


def show(found: dict[str, Any], console: Console) -> None:
    """Print the rows of `preview`, then the figures of its sample; the table of lengths is the caller's."""
    colour = console.color_system is not None and not console.no_color
    told = not console.is_terminal  # in a pipe a line stays one; the tokens' own spaces are never broken away
    console.print(_legend(found, colour), soft_wrap=told, highlight=False)
    for line in _rows(found["rows"], colour):
        console.print(line, soft_wrap=True, highlight=False)
    console.print(_sample(found), soft_wrap=told, highlight=False)


def _legend(found: dict[str, Any], colour: bool) -> Text:
    line = Text(f"{found['job']} with {sanitize(found['model'])}: tokens are divided by {BETWEEN}; ")
    if any(row["tokens"] == "learned" for row in found["lengths"]):
        line.append("these" if colour else f"those in {OPEN} {CLOSE}", LEARNED).append(" count for the loss")
    else:
        learns = "what it samples" if found["job"] in ("ppo", "rloo") else "the label"
        line.append(f"all are read, none is learned: the loss is on {learns}")
    return line


def _rows(rows: list[dict[str, Any]], colour: bool) -> Iterator[Text]:
    for row in rows:
        label = f", label {plain(row['label'])}" if row["label"] else ""
        yield Text(f"\nrow {plain(row['id'])}{label}", "bold")
        for piece in row["pieces"]:
            learned = f", {sum(piece['learned'])} learned" if any(piece["learned"]) else ""
            of = f" of {piece['whole']}" if piece["cuts"] else ""
            blocks = f", in {piece['blocks']} blocks" if piece["blocks"] > 1 else ""
            yield Text(f"{piece['name']}: {len(piece['tokens'])}{of} tokens{learned}{blocks}", QUIET)
            yield _tokens(piece, colour)
            for cut in piece["cuts"]:
                where = f"after token {cut['after']}" if cut["after"] else "before the first"
                yield Text(f"cut: {cut['tokens']} tokens {where}: {excerpt(cut['text'])}", CUT)


def _tokens(piece: dict[str, Any], colour: bool) -> Text:
    line = Text()
    marked = zip(piece["tokens"], piece["learned"], strict=True)
    for learned, group in itertools.groupby(marked, lambda pair: pair[1]):
        if line:
            line.append(BETWEEN, QUIET)
        bracketed = learned and not colour
        line.append(OPEN if bracketed else "")
        for number, (token, _) in enumerate(group):
            if number:
                line.append(BETWEEN, QUIET)
            line.append(plain(token), LEARNED if learned else "")
        line.append(CLOSE if bracketed else "")
    return line


def _sample(found: dict[str, Any]) -> Text:
    whole = found["sample"] == found["records"]
    of = f"all {found['records']} records" if whole else f"a sample of {found['sample']} of {found['records']} records"
    labels = "".join(f"; {plain(name)} {count}" for name, count in sorted(found["labels"].items()))
    return Text(f"\n{of}: {found['training_rows']} rows to train on ({found['how']}){labels}\n")


def plain(text: str) -> str:
    """On one line, with its line breaks and tabs to be seen, and nothing that a terminal obeys."""
    return sanitize(text.replace("\r", "\\r").replace("\n", "\\n").replace("\t", "\\t"))


def excerpt(text: str) -> str:
    """Both ends of a long text."""
    line = plain(text)
    return line if len(line) <= EXCERPT else f"{line[: EXCERPT // 2]} ... {line[-EXCERPT // 2 :]}"
