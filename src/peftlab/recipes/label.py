"""Pairs of answers, judged by a person: `peftlab label`.

A choice is on disk before the next pair shows, whatever ends the program; the same command goes on from there.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console

from ..data.labels import CHOICES, Journal, journal_of, read_pairs
from ..errors import Interrupted, UserError
from ..evaluation.intervals import wilson
from ..runs.atomic import write_rows
from ..runs.lock import locked_file
from ..runs.sanitize import sanitize
from ..runs.signals import EndSignals
from .label_terminal import ask_all


def label(prefs: Path, output: Path | None, web: bool, port: int, seed: int) -> None:
    """Ask a person about every pair that has no label yet; then write the pairs in the person's order.

    Raises UserError for files that cannot be used, Interrupted where a signal ended the work.
    """
    if port and not web:
        raise UserError(f"--port {port}: goes with --web only")
    console = Console(highlight=False)
    pairs = read_pairs(prefs)
    path, labelled = outputs(prefs, output)
    with locked_file(path) as handle, EndSignals() as signals:
        journal = Journal(path, handle, pairs, seed)
        if journal.cut:
            console.print(f"{sanitize(str(path))}: cut off a choice that was only half written", markup=False)
        try:
            if web:
                _serve(journal, prefs.name, port, signals)
            else:
                ask_all(journal, console, signals)
        except Interrupted as stopped:
            told = f"{stopped}; {_progress(journal)}; the same command goes on"
            raise Interrupted(stopped.signum, told) from None
        finally:
            write_rows(labelled, journal.labelled())
    for line in [*report(summary(journal)), f"{_progress(journal)}: {path}, {labelled}"]:
        console.print(sanitize(line), markup=False, soft_wrap=True)


def outputs(prefs: Path, output: Path | None = None) -> tuple[Path, Path]:
    """The journal and the labelled pairs; neither may write over the pairs or over labels of another journal."""
    path = output or journal_of(prefs)
    labelled = path.with_name(f"{path.name.removesuffix('.jsonl').removesuffix('.labels')}.labelled.jsonl")
    for ours in (path, labelled):
        if ours.exists() and prefs.exists() and ours.samefile(prefs):
            raise UserError(f"--output {path}: would write over {prefs}, the pairs themselves")
    if labelled.exists() and not path.exists():
        raise UserError(f"{labelled} is there without its journal {path}; move it away, or choose another --output")
    return path, labelled


def _serve(journal: Journal, file: str, port: int, signals: EndSignals) -> None:
    from ..web.app import create_app
    from ..web.label import label_router
    from ..web.serve import Loopback

    server = Loopback(port)
    router = label_router(journal, file, lambda: summary(journal), server.stop)
    print(f"open {server.url('/label')}\nCtrl+C ends; every choice is saved", flush=True)
    with contextlib.closing(server), signals.heard(server.stop):
        server.run(create_app(server.token, server.port, [router]))


def summary(journal: Journal) -> dict[str, Any]:
    """How often each choice was made, and how far a person agrees with the file's order.

    {CHOICES: count, "left": how often the left answer won, "decided": pairs with a winner, and, where there are any,
    "agreement": share of `chosen` among them, "interval": its 95% interval}.
    """
    made = list(journal.choices.values())
    counts = Counter(choice.choice for choice in made)
    decided = counts["chosen"] + counts["rejected"]
    left = sum(choice.choice == choice.left for choice in made)
    found: dict[str, Any] = {**{name: counts[name] for name in CHOICES}, "left": left, "decided": decided}
    if decided:
        found |= {"agreement": counts["chosen"] / decided, "interval": wilson(counts["chosen"], decided)}
    return found


def report(found: dict[str, Any]) -> list[str]:
    """`summary` in sentences."""
    lines = [f"{found['decided']} with a winner, {found['tie']} tied, {found['skip']} skipped"]
    if found["decided"]:
        low, high = found["interval"]
        lines += [
            f"agrees with the file's order in {found['chosen']} of {found['decided']}: {found['agreement']:.3f} "
            f"(95% interval {low:.3f} to {high:.3f})",
            f"the left answer won {found['left']} of {found['decided']}",
        ]
    return lines


def _progress(journal: Journal) -> str:
    return f"{len(journal.choices)} of {len(journal.pairs)} pairs are labelled and saved"
