"""A recorded rollout as lines for a terminal: tokens in colour, and a table whose numbers say the same without it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..report.alarms import UNCHECKED, Alarm
from ..report.inspector import measure_of, strength
from ..report.read import Row, as_number
from ..report.recorded import COLUMNS, MEASURES, parts_of, tokens_of
from ..report.text import NONE, clean, fixed
from .preview_view import EXCERPT, excerpt, plain

PLUS, MINUS = "cyan", "magenta"  # legible on a light and on a dark ground, unlike blue and yellow
WEAK, STRONG = 0.15, 0.5  # shares of the full colour: below WEAK none, from STRONG on reversed
SHORT = {"ref_logprob": "ref"}  # of the table's head, so that 80 columns hold it
FIRST = ("kl", "advantage", "reward", "logprob", "value", "ref_logprob")  # which columns a narrow terminal shows
WIDEST, NARROWEST = 20, 8  # columns of a token in the table
QUIET = "dim"


def show_rollouts(
    place: str,
    answers: Sequence[Row],
    by: str,
    scales: Mapping[str, float],
    elsewhere: str,
    alarms: Sequence[Alarm],
    console: Console,
) -> None:
    """Print one prompt and the answers to it. `elsewhere`: options that show the same prompt at other steps."""
    critic = any("value" in token for row in answers for token in tokens_of(row))
    full = scales[by] if coloured(console) else math.inf  # without colours nothing is bold or reversed either
    console.print(Text(shown(place), "bold"))
    console.print(Text(f"prompt: {excerpt(clean(answers[0].get('prompt', '')))}"))
    console.print(_legend(by, scales[by], critic, coloured(console)))
    for row in answers:
        console.print()
        console.print(_scores(row))
        console.print(_strip(row, by, full))
        for block in _table(row, by, full, console.width):
            console.print(block)
    console.print()
    if elsewhere:
        console.print(Text(f"The same prompt at other steps: {elsewhere}"))
    for line in _alarms(alarms):
        console.print(line)


def show_list(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print what is recorded, a line a prompt and step."""
    table = _grid()
    table.expand = True
    for name in ("step", "prompt", "id", "answers", "reward"):
        table.add_column(name, justify="left" if name == "id" else "right", no_wrap=True)
    table.add_column("text", no_wrap=True, overflow="ellipsis", ratio=1)
    for row in rows:
        numbers = row["step"], row["prompt"], shown(row["prompt_id"]), row["answers"], _number(row["reward"], True, 2)
        table.add_row(*(Text(str(cell)) for cell in (*numbers, shown(row["text"][:EXCERPT]))))
    console.print(table)


def coloured(console: Console) -> bool:
    """Whether colours reach the reader: not in a pipe, and not where NO_COLOR is set."""
    return console.color_system is not None and not console.no_color


def shown(text: object) -> str:
    """On one line; what a terminal would obey, or would not show, by its number."""
    return plain(clean(text))


def style_of(value: float | None, full: float) -> str:
    """The colour of a number: its sign's, reversed where it is strong, none where it is weak."""
    share = strength(value, full)
    if abs(share) < WEAK:
        return ""
    return f"{'reverse ' if abs(share) >= STRONG else ''}{PLUS if share > 0 else MINUS}"


def _legend(by: str, full: float, critic: bool, colour: bool) -> Text:
    measure = measure_of(by, full, critic)
    line = Text(f"by {measure.title}: ")
    line.append(f"+ {measure.plus}", PLUS if colour else "").append(", ")
    line.append(f"- {measure.minus}", MINUS if colour else "")
    strong = f" from {STRONG * full:.2g} on"
    if colour:
        return line.append("; ").append("reversed", f"reverse {PLUS}").append(strong)
    return line.append(f"; the signs in column {by} say which, strong{strong}")


def _scores(row: Row) -> Text:
    parts = "".join(f"  {shown(name)} {_number(value, True, 2)}" for name, value in parts_of(row).items())
    score = _number(as_number(row.get("score")), True, 2)
    return Text(f"reward {score}{'; parts:' if parts else ''}{parts}", "bold")


def _strip(row: Row, by: str, full: float) -> Text:
    line = Text()
    for token in tokens_of(row):
        line.append(shown(token.get("token", "")), style_of(as_number(token.get(by)), full))
    return line


def _table(row: Row, by: str, full: float, width: int) -> list[Table | Text]:
    """The row's tokens, with as many columns as there is room for, that of `by` always; and which were left out."""
    tokens = tokens_of(row)
    said = [shown(token.get("token", "")).replace(" ", "·") for token in tokens]
    cells = {
        name: [_number(as_number(token.get(name)), name in MEASURES) for token in tokens]
        for name in COLUMNS
        if any(name in token for token in tokens)
    }
    widths = {name: max(map(len, [SHORT.get(name, name), *column])) for name, column in cells.items()}
    longest = max([NARROWEST, *(min(WIDEST, cell_len(word)) for word in said)])
    room = width - len(str(len(tokens))) - 1  # for the token and the numbers, each number behind a blank
    kept: list[str] = []
    for name in sorted(cells, key=lambda name: (name != by, FIRST.index(name))):
        if kept and room - widths[name] - 1 < longest:
            break
        kept.append(name)
        room -= widths[name] + 1
    table = _grid()
    table.add_column("#", justify="right", no_wrap=True, min_width=len(str(len(tokens))))
    table.add_column("token", no_wrap=True, overflow="ellipsis", max_width=max(1, min(longest, room)))
    columns = [name for name in cells if name in kept]
    for name in columns:
        table.add_column(SHORT.get(name, name), justify="right", no_wrap=True, min_width=widths[name])
    for at, token in enumerate(tokens):
        style = style_of(as_number(token.get(by)), full)
        numbers = [Text(cells[name][at], style if name == by else "") for name in columns]
        table.add_row(str(at + 1), Text(said[at], style), *numbers)
    left_out = [SHORT.get(name, name) for name in cells if name not in kept]
    return [table, *([Text(f"no room for {', '.join(left_out)}", QUIET)] if left_out else [])]


def _alarms(alarms: Sequence[Alarm]) -> list[Text]:
    fired = [Text(f"Alarm, {alarm.title}: {shown(alarm.words)}", "bold red") for alarm in alarms if alarm.fired]
    quiet = [alarm.title for alarm in alarms if alarm.fired is False]
    told = [f"no alarm: {', '.join(quiet)}"] if quiet else []
    unchecked: dict[str, list[str]] = {}  # why -> which
    for alarm in alarms:
        if alarm.fired is None:
            unchecked.setdefault(alarm.words.removeprefix(UNCHECKED).rstrip("."), []).append(alarm.title)
    told += [f"not checked, {shown(why)}: {', '.join(titles)}" for why, titles in unchecked.items()]
    return [*fired, Text("; ".join(told), QUIET)]


def _grid() -> Table:
    return Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style=QUIET)


def _number(value: float | None, signed: bool = False, decimals: int = 3) -> str:
    """As on the page, but in ASCII, for awk and grep."""
    return fixed(value, decimals, signed).replace("−", "-").replace(NONE, "-")
