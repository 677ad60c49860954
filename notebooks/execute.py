"""Runs notebooks from top to bottom and keeps what they print: `python notebooks/execute.py [NAME ...]`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent


def executed(path: Path) -> Any:
    """The notebook in `path` with the outputs of a fresh kernel; CellExecutionError where a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    # No times, and one output for lines that were printed one by one: what is kept changes only where the figures do.
    options = {"record_timing": False, "coalesce_streams": True}
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(HERE)}}, **options).execute()
    notebook.metadata["language_info"] = {"name": "python"}  # not the version of whoever ran it
    return notebook


if __name__ == "__main__":
    known = sorted(HERE.glob("*.ipynb"))
    asked = [Path(word) if Path(word).is_file() else HERE / f"{word}.ipynb" for word in sys.argv[1:]]
    if missing := [path.stem for path in asked if not path.is_file()]:
        sys.exit(f"{missing[0]}: no such notebook; there are {', '.join(path.stem for path in known)}")
    for path in asked or known:
        nbformat.write(executed(path), path)
