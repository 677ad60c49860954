"""What the groups of verbs share: where runs are, options of one meaning, how results are printed."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from ..runs.names import RUNS
from ..runs.progress import doing, folded, overflows
from ..runs.sanitize import sanitize

Overrides = Annotated[list[str] | None, typer.Argument(help="key=value pairs that override the config")]
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps")]


def examples(*commands: str) -> str:
    """The end of a verb's help: commands to type, one a line. tests/test_docs.py checks that each can be typed."""
    return "\n\n".join(["Examples:" if len(commands) > 1 else "Example:", *commands])


def loading() -> None:
    """The libraries take seconds to import, and a model some more: on a terminal that is said at once."""
    doing("loading")


def print_value(value: Any, as_json: bool) -> None:
    if as_json or not isinstance(value, dict):
        print(json.dumps(value, indent=1))
        return
    width = max(map(len, value), default=0)
    for key, item in value.items():
        print(folded(f"{key:{width}}  {cell(item)}", sys.stdout, width + 2))


def print_plan(plan: dict[str, Any], as_json: bool) -> None:
    """A dry run for a person: the config as a file would have it, then the sizes of the job."""
    if as_json:
        print_value(plan, True)
        return
    from ..config import to_toml

    print(f"config\n\n{to_toml(plan['config'])}\nsizes\n")
    print_value({name: _size(name, size) for name, size in plan.items() if name != "config"}, False)


def _size(name: str, size: Any) -> Any:
    """A size of the job as `print_value` takes it: of bytes with their unit."""
    if name != "bytes" and not name.startswith("bytes of "):
        return size
    return {part: in_bytes(own) for part, own in size.items()} if isinstance(size, dict) else in_bytes(size)


def in_bytes(size: float) -> str:
    """So many bytes in the unit that suits them."""
    unit, name = next(((u, n) for u, n in ((1e9, "GB"), (1e6, "MB")) if size >= u), (1e3, "kB"))
    return f"{size / unit:.1f} {name}"


def print_summary(summary: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_value(summary, True)
        return
    print_figures(summary)
    print(f"\n{summary['run']}: {summary['status']} in {summary['time']['wall_s']:.0f} s; report: "
          f"{RUNS / summary['run'] / 'report.html'}")


def print_figures(summary: dict[str, Any]) -> None:
    """The figures of a summary beside those from before, with their intervals."""
    rows = [
        {"metric": name, "before": summary["baseline"].get(name), "after": value,
         "95% interval": interval(summary, name)}
        for name, value in summary["metrics"].items()
    ]
    print_rows(rows, False)


def print_rows(rows: list[dict[str, Any]], as_json: bool, may_go: Sequence[str] = ()) -> None:
    """A plain table whose columns are as wide as their widest cell; readable when piped.

    On a terminal too narrow for it a line is broken at words, and goes on below its last column if that begins in the
    terminal's left half or has 24 columns, else two columns in. For it to have half the terminal, columns of `may_go`
    are left out, in their order.
    """
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    if not rows:
        print("(none)")
        return
    table = [list(rows[0]), *[[cell(value) for value in row.values()] for row in rows]]
    widths = [max(len(line[i]) for line in table) for i in range(len(rows[0]))]
    last = sum(widths[:-1]) + 2 * len(widths) - 2
    if may_go and overflows(last + widths[-1], sys.stdout) and overflows(2 * last, sys.stdout):
        print_rows([{name: row[name] for name in row if name != may_go[0]} for row in rows], False, may_go[1:])
        return
    for line in table:
        text = "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        print(folded(text, sys.stdout, last))


def short(text: str, most: int) -> str:
    """The first line of a text, cut: a long one would push every column off the screen."""
    line = text.partition("\n")[0]
    return line if len(line) <= most else line[: most - 3] + "..."


def interval(found: dict[str, Any], name: str) -> str | None:
    """The 95% interval of a metric of a summary or an evaluation, to the digits of its figure; None without one."""
    ends = found["intervals"].get(name)
    return None if ends is None else " to ".join(map(cell, ends))


def cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{k} {cell(v)}" for k, v in value.items())
    return sanitize(str(value))
