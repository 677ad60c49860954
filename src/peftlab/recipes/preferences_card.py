"""What `peftlab data preferences` tells of the pairs that it built."""

from __future__ import annotations

import hashlib
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..runs.sanitize import sanitize

SHOWN = 4


def told(file: Path, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The figures of a split that lies in `file`, and its first pairs."""
    margins = [row["margin"] for row in rows]
    labels = Counter(row["label"] for row in rows if "label" in row)
    return {
        "file": file.name,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "prompts": len({row["prompt"] for row in rows}),
        "rows": len(rows),
        "labels": {str(label): labels[label] for label in sorted(labels)},
        "margin": {"least": min(margins), "median": statistics.median(margins), "most": max(margins)},
        "examples": [{name: row[name] for name in ("prompt", "chosen", "rejected", "margin")} for row in rows[:SHOWN]],
    }


def card(summary: dict[str, Any]) -> str:
    """The summary for a person."""
    kept = sum(split["rows"] for split in summary["splits"].values())
    possible = summary["possible pairs"]
    weights = ", ".join(f"{name} {weight:.3g}" for name, weight in summary["weights"].items())
    lines = [
        "# preferences", "", f"`{summary['command']}`", "",
        f"{summary['k']} answers of {summary['policy']} ({summary['fingerprint']}) to each of {summary['prompts']} "
        f"prompts, scored by {summary['scorer']} ({weights}).", "",
        f"{kept} of {possible} possible pairs were kept ({kept / possible:.1%}).", "",
        "| dropped | pairs |", "|---|---|",
        *(f"| {why} | {count} |" for why, count in summary["dropped"].items()), "",
    ]
    for name, split in summary["splits"].items():
        margin = ", ".join(f"{which} {value:.3g}" for which, value in split["margin"].items())
        lines += [f"## {name}: {split['rows']} pairs of {split['prompts']} prompts in {split['file']}", "",
                  f"Margin: {margin}.", ""]
        for pair in split["examples"]:
            lines += [f"- {_line(pair['prompt'])}", f"  - chosen ({pair['margin']:.3g}): {_line(pair['chosen'])}",
                      f"  - rejected: {_line(pair['rejected'])}"]
        lines.append("")
    return "\n".join(lines)


def _line(text: str, most: int = 200) -> str:
    line = " ".join(sanitize(text).split())
    return line if len(line) <= most else f"{line[: most // 2]} ... {line[-most // 2 :]}"
